"""A part of a model's layers, run by the plan of all of them, where the whole does not fit the time: the same block,
the same shares of a layer and of its cache on each tier, so that a layer's bytes and products are those of the model,
and a pass takes one N-th but for the embedding, the head and what it costs at all."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmark.scenarios import GIB, Scenario
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.units import parse_size

if TYPE_CHECKING:
    from flexbatch.config import EngineConfig
    from flexbatch.execution.job import Job
    from flexbatch.policy.plan import Plan

PART_GIB = 8
"""Of the host, besides a part's share: reserves, staging and scratch are those of all layers."""


def layers_field(model: str) -> str:
    return "n_layer" if "n_layer" in SHAPES[model] else "num_hidden_layers"


def layers_of(model: str) -> int:
    return SHAPES[model][layers_field(model)]


def with_layers(model: str, layers: int, name: str, **changed: Any) -> str:
    """``name``, by which the engine now knows the public shape with so many layers. changed: other fields."""
    SHAPES[name] = {**SHAPES[model], **changed, layers_field(model): layers}
    return name


def cut(model: str, share: int) -> str:
    """The name under which the engine knows the public shape with one ``share``-th of its layers, rounded up: of a
    mixture of experts whose first layers are dense, those with experts, or the part would weigh less a layer than all
    (one of 46 layers of GLM-4.5-Air is dense, of 12 it would be a twelfth)."""
    if share == 1:
        return model
    sparse = {key: 0 for key in ("first_k_dense_replace",) if key in SHAPES[model]}
    return with_layers(model, -(-layers_of(model) // share), f"{model}-cut", **sparse)


def host_gib(gib: float, share: int) -> float:
    """Host memory of a part of the layers that need ``gib``. Of the GPU's, a part is given all: slabs and workspace are
    as large as those of all layers, and nothing is chosen by what is left."""
    return gib if share == 1 else gib / share + PART_GIB


def part_of(
    scenario: Scenario, settings: dict[str, Any], share: int, prompt_lens: list[int]
) -> tuple[Scenario, dict[str, Any]]:
    """The scenario and its settings with one ``share``-th of the layers: placed as it is, or by what is chosen for all
    layers."""
    if share == 1:
        return scenario, settings
    if "percent" not in settings:
        # The allocator's settings are made before torch is loaded.
        from flexbatch.config import EngineConfig
        from flexbatch.execution.job import Job

        job = Job(tuple(length + scenario.gen_len - 1 for length in prompt_lens), tuple(prompt_lens))
        config = EngineConfig(model=scenario.model, dummy_weights=True, **scenario.engine_settings(settings))
        settings = {**settings, **chosen_for_all(config, job)[1]}
    if "cpu_memory" in settings:
        host = parse_size(str(settings["cpu_memory"])) / GIB
        settings = {**settings, "cpu_memory": f"{host_gib(host, share):.3f}GiB"}
    return replace(scenario, model=cut(scenario.model, share)), settings


def chosen_for_all(config: EngineConfig, job: Job) -> tuple[Plan, dict[str, Any]]:
    """The plan of all layers, which stderr tells, and the engine settings that a part runs by."""
    from benchmark.observed import fixed_by
    from flexbatch import LLM

    plan = LLM.plan(config, job)["plan"]
    predicted = f"{plan.predicted_tokens_per_second:.1f} tok/s, limited by {plan.limiting_row}"
    print(f"{config.model}: all layers {predicted}", file=sys.stderr, flush=True)
    return plan, fixed_by(plan.policy)
