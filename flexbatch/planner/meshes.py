"""Which mesh of several GPUs runs a job fastest: every one that their number allows is planned for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flexbatch.calibrate import machine
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.models.opened import OpenModel, open_configured
from flexbatch.parallel.mesh import MeshShape
from flexbatch.planner.budgets import offload_dir, resolve_device
from flexbatch.planner.planner import Planner
from flexbatch.planner.tables import table
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.plan import Plan
from flexbatch.policy.units import duration_text, size_text
from flexbatch.validation.devices import AUTO
from flexbatch.validation.errors import ConfigurationError, DoesNotFitError

logger = logging.getLogger("flexbatch")

NO_ROOM = "does not fit the memory"
AXES = "engines x stages x tensor ranks"
PLAN_ERROR = 0.02
"""Between meshes whose plans differ by less, the one with fewer ranks in an engine is taken: they wait for nobody."""


@dataclass(frozen=True)
class MeshPlan:
    """What one mesh would do: the plan of one of its ranks, or why there is none."""

    shape: MeshShape
    plan: Plan | None
    problem: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of all engines together."""
        return 0.0 if self.plan is None else self.shape.data * self.plan.predicted_tokens_per_second

    def summary(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            **sizes_of(self.shape),
            "predicted_tokens_per_second_together": self.tokens_per_second,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Meshes:
    """The plans of every product of engines, stages and tensor ranks, the smallest engines first."""

    plans: tuple[MeshPlan, ...]

    @classmethod
    def planned(cls, config: EngineConfig, gpus: int, plan: Callable[[EngineConfig], Plan]) -> Meshes:
        """plan: plans for settings; raises DoesNotFitError, or ConfigurationError where the model cannot be shared out
        like that."""
        found = []
        for shape in shapes_of(gpus):
            try:
                found.append(MeshPlan(shape, plan(with_shape(config, shape))))
            except DoesNotFitError:
                found.append(MeshPlan(shape, None, NO_ROOM))
            except ConfigurationError as error:
                found.append(MeshPlan(shape, None, str(error)))
        return cls(tuple(found))

    @property
    def best(self) -> MeshPlan:
        """The fastest. Raises DoesNotFitError, or ConfigurationError, where there is none."""
        fastest = max(self.plans, key=lambda each: each.tokens_per_second)
        if fastest.plan is None:
            told = "; ".join(f"{named(each.shape)}: {each.problem}" for each in self.plans)
            if any(each.problem == NO_ROOM for each in self.plans):
                raise DoesNotFitError(f"no mesh of {fastest.shape.size} GPUs holds the job ({AXES}): {told}")
            raise ConfigurationError(f"no mesh of {fastest.shape.size} GPUs runs this model ({AXES}): {told}")
        least = (1 - PLAN_ERROR) * fastest.tokens_per_second
        return next(each for each in self.plans if each.tokens_per_second >= least)

    def config(self, config: EngineConfig) -> EngineConfig:
        """Settings with the sizes of the fastest mesh."""
        return with_shape(config, self.best.shape)

    def text(self) -> str:
        """Every mesh with its throughput, what limits it, and what lies off its GPUs; and which one is taken."""
        rows, chosen = [], self.best
        for each in self.plans:
            shape, plan = each.shape, each.plan
            sizes = [f"{'-> ' if each is chosen else ''}{shape.data}", str(shape.pipeline), str(shape.tensor)]
            if plan is None:
                rows.append([*sizes, "-", "-", "-", each.problem])
                continue
            share = each.tokens_per_second / chosen.tokens_per_second
            off = shape.size * sum(plan.memory[tier].get("weights", 0) for tier in ("cpu", "disk"))
            rate = f"{each.tokens_per_second:,.4g}"
            rows.append([*sizes, rate, f"{share:.0%}", size_text(off), plan.limiting_resource])
        sizes = ["engines", "stages", "tensor ranks"]
        header = [*sizes, "tokens/s", "of the chosen", "weights off the GPUs", "limited by"]
        flags = " ".join(f"--{name.replace('_', '-')} {size}" for name, size in sizes_of(chosen.shape).items())
        return f"meshes of {chosen.shape.size} GPUs; chosen: {flags}\n{table(header, rows)}\n{self.why()}"

    def why(self) -> str:
        """What sets the one that is taken apart from the next best, and how the GPUs' connection is known."""
        chosen = self.best
        assert chosen.plan is not None
        parts = []
        others = [each for each in self.plans if each.plan is not None and each is not chosen]
        if others:
            second = max(others, key=lambda each: each.tokens_per_second)
            assert second.plan is not None
            gain = chosen.tokens_per_second / second.tokens_per_second - 1
            if gain < PLAN_ERROR:
                parts.append(
                    f"{named(second.shape)} differs by {abs(gain):.1%}, less than plans are off: of the two the one "
                    "with smaller engines, whose ranks wait for fewer others"
                )
            else:
                parts.append(
                    f"{named(chosen.shape)} is {gain:.0%} faster than {named(second.shape)}: "
                    f"{share_of_limit(chosen.plan)}; there {share_of_limit(second.plan)}"
                )
        parts.append(connection(chosen.plan.hardware))
        return "\n".join(parts)


def share_of_limit(plan: Plan) -> str:
    """How long a pass takes, and what of it is the resource that limits it."""
    busy = plan.limiting_seconds / plan.pass_seconds
    return f"a pass of {duration_text(plan.pass_seconds)}, {busy:.0%} of it {plan.limiting_resource}"


def connection(hardware: Hardware) -> str:
    """What plans take the connection between GPUs for, and where that is from."""
    if not hardware.interconnect:
        return f"sums between GPUs count as copies over the bus ({hardware.d2h / 1e9:.3g} GB/s): nothing was measured"
    known = hardware.source.get("interconnect", "published figures")
    links = hardware.links_together
    slower = f"; copies to all GPUs at once at {links.values[-1]:.0%} of a link each" if links is not None else ""
    sums = (
        f"sums between GPUs at {hardware.interconnect / 1e9:.3g} GB/s and {1e6 * hardware.interconnect_seconds:.0f} us"
    )
    return f"{sums} each ({known}){slower}"


def shapes_of(gpus: int) -> Iterator[MeshShape]:
    """Between those with as many ranks in an engine, more of them share every layer in the first ones: they have one
    block, where stages have one each."""
    for size in (size for size in range(1, gpus + 1) if gpus % size == 0):
        yield from (
            MeshShape(gpus // size, stages, size // stages) for stages in range(1, size + 1) if size % stages == 0
        )


def sizes_of(shape: MeshShape) -> dict[str, int]:
    """As settings."""
    return {
        "data_parallel_size": shape.data,
        "pipeline_parallel_size": shape.pipeline,
        "tensor_parallel_size": shape.tensor,
    }


def named(shape: MeshShape) -> str:
    return f"{shape.data} x {shape.pipeline} x {shape.tensor}"


def with_shape(config: EngineConfig, shape: MeshShape) -> EngineConfig:
    return dataclasses.replace(
        config,
        parallel=None,
        data_parallel_size=shape.data,
        pipeline_parallel_size=shape.pipeline,
        tensor_parallel_size=shape.tensor,
    )


def gpus_here(config: EngineConfig) -> int:
    """That an engine may use; 1 on the CPU, and where the settings name one."""
    device = resolve_device(config.device)
    return torch.cuda.device_count() if device.type == "cuda" and config.device in ("auto", "cuda") else 1


def with_chosen_mesh(
    config: EngineConfig, job: Job | None = None, model: OpenModel | None = None, measure: bool = True
) -> EngineConfig:
    """The settings, with ``parallel="auto"`` those of the mesh that is fastest by its plan, for a job or a typical one.
    measure: this machine, where its rates are not known. Raises DoesNotFitError, ConfigurationError."""
    if config.parallel is None:
        return config
    if (gpus := gpus_here(config)) == 1:
        return with_shape(config, MeshShape())
    if measure and config.hardware == AUTO:
        # The plans that follow find it in the cache.
        folders = offload_dir(config), machine.default_profile_dir()
        machine.this_machine(resolve_device(config.device), *folders, gpus=gpus)
    opened = open_configured(config) if model is None else model
    expected = job or Job.typical(opened.arch.context)

    def plan(settings: EngineConfig) -> Plan:
        return Planner(settings, expected, dry=True, model=opened).describe(expected)["plan"]

    meshes = Meshes.planned(config, gpus, plan)
    logger.info("%s", meshes.text())
    return meshes.config(config)
