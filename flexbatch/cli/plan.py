"""The command `flexbatch plan`: what a job would take on a machine that one has, or does not have.

    flexbatch plan llama-3.1-70b --gpu "RTX 4090" --cpu-memory 64GiB --num-prompts 10000
    flexbatch plan ./config.json --gpu h100 --weight-bits 4 --sweep gpu_memory=16GiB:80GiB:5 --plot memory.png

MODEL is a public shape, a Hugging Face config.json, a folder that holds one, or a Hub id, of which nothing but
config.json is fetched; neither weights nor a tokenizer are read. The plan goes to stdout. It is the plan that
`flexbatch run` would follow on such a machine with such prompts. Exit code 4: it does not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from flexbatch.cli.command import run_command, set_up_logging
from flexbatch.cli.early_checks import check_gpus, check_plot
from flexbatch.cli.help import JOB, CommandParser
from flexbatch.cli.settings import add_arguments, read_settings
from flexbatch.config import EngineConfig, option, parse_bytes
from flexbatch.planner import tables
from flexbatch.policy.stdout import run_process
from flexbatch.validation.devices import named_machine
from flexbatch.validation.errors import DONE, ConfigurationError

if TYPE_CHECKING:
    from flexbatch.execution.job import Job
    from flexbatch.models.described import Description
    from flexbatch.planner.meshes import Meshes
    from flexbatch.planner.planner import Planner
    from flexbatch.policy.hardware import Hardware
    from flexbatch.policy.plan import Plan
    from flexbatch.policy.sweep_request import SweepRequest

PLANNED = (
    *("gpu_memory", "cpu_memory", "weight_bits", "cache_bits", "allow_bits", "percent", "gpu_batch_size"),
    *("num_gpu_batches", "cpu_attention", "cpu_experts", "prefill_chunk", "prefill_budget", "overlap", "dtype"),
    "piece_tokens",
    *("parallel", "data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size"),
)
"""The engine's settings that change a plan."""
MORE = 2**30
"""Bytes of which the plan says what they would buy."""


@dataclass(frozen=True)
class PlanConfig:
    """The job, and what is shown of its plan."""

    prompt_len: tuple[int, ...] = option(
        (512,), "tokens of a prompt; several are taken as equally likely", nargs="+", metavar="N"
    )
    max_tokens: tuple[int, ...] = option(
        (128,),
        "tokens to generate for a prompt; several are taken as equally likely",
        nargs="+",
        metavar="N",
        aliases=("--gen-len",),
    )
    num_prompts: int = option(10_000, "prompts of the job", aliases=("--limit",))
    disk: str | None = option(
        None, "free space of the disk, with --gpu (default: that of the machine's profile)", metavar="SIZE"
    )
    gpus: int | None = option(
        None, "GPUs of the machine, for --parallel auto (default: those that are seen here, without --gpu)"
    )
    json: bool = option(False, "print the plan as one JSON document")
    plot: str | None = option(
        None, "draw time per resource and memory per tier, or with --sweep throughput against memory", metavar="PNG"
    )
    sweep: str | None = option(
        None, "what other memory would give, e.g. gpu_memory=8GiB:48GiB:5", metavar="KIND=FIRST:LAST:STEPS"
    )

    def __post_init__(self) -> None:
        for name in ("prompt_len", "max_tokens", "num_prompts", *(("gpus",) if self.gpus is not None else ())):
            values = getattr(self, name)
            least = min((values,) if isinstance(values, int) else values or (0,))
            if least < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} {least} must be at least 1")
        if self.disk is not None:
            parse_bytes(self.disk, "--disk")

    def job(self, context: int) -> Job:
        """As many prompts as asked for, of all pairs of lengths in turn. Raises ConfigurationError."""
        from flexbatch.execution.job import Job

        longest = max(self.prompt_len) + max(self.max_tokens)
        if longest > context:
            raise ConfigurationError(
                f"--prompt-len {max(self.prompt_len)} and --max-tokens {max(self.max_tokens)} make {longest} tokens, "
                f"more than the model's context of {context}: lower one of them"
            )
        pairs = itertools.cycle(itertools.product(self.prompt_len, self.max_tokens))
        return Job.of(itertools.islice(pairs, self.num_prompts), context)


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "flexbatch plan",
        description="Say what a job would take, on this machine or one that you do not have: whether it fits, how fast "
        "it is, what limits it, and what would help. Neither weights nor a tokenizer are read.",
        first="gpu cpu_memory gpu_memory weight_bits cache_bits num_prompts prompt_len max_tokens sweep plot",
        texts={
            "gpu": 'the machine: "RTX 4090", h100, cpu, ... (default: this one)',
            "cpu_memory": "its host memory to use",
            "gpu_memory": "its GPU memory to use",
            "cache_bits": "16, 8 or 4: fewer hold more sequences",
            "num_prompts": "prompts of the job (default: 10,000)",
            "prompt_len": "tokens of a prompt, or several (default: 512)",
            "max_tokens": "new tokens each, or several (default: 128)",
            "sweep": "what other memory would give: gpu_memory=8GiB:48GiB:5",
            "plot": "draw the plan, or the sweep",
        },
        examples="""
            flexbatch plan llama-3.1-70b --gpu "RTX 4090" --cpu-memory 64GiB --weight-bits 4
            flexbatch plan ./config.json --gpu h100 --sweep gpu_memory=16GiB:80GiB:5 --plot memory.png
            """,
    )
    parser.add_argument("model", metavar="MODEL", help="public shape, config.json, folder or Hub id")
    parser.group_of("hardware", "machine").add_argument(
        "--gpu",
        "--hardware",
        dest="hardware",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help='a card such as "RTX 4090" or h100 in a common host, cpu, or a JSON file of flexbatch profile (default: '
        "this machine)",
    )
    add_arguments(parser, PlanConfig, JOB)
    add_arguments(parser, EngineConfig, "engine", PLANNED)
    parser.group_of("config", JOB).add_argument(
        "--config", metavar="FILE", help="YAML file of settings: any flag by its name"
    )
    return parser


def chosen_hardware(engine: EngineConfig, config: PlanConfig) -> Hardware | None:
    """The machine that is named, None for this one. Raises ConfigurationError."""
    hardware = named_machine(engine.hardware, "--gpu")
    if hardware is None:
        if config.disk is not None:
            raise ConfigurationError(
                f"--disk {config.disk} is for a machine that --gpu names; of this machine the free space counts"
            )
        return None
    return hardware.with_memory(disk=None if config.disk is None else parse_bytes(config.disk))


def command(args: argparse.Namespace, environ: Mapping[str, str], data: TextIO) -> int:
    """Everything after parsing; returns the exit code. What needs no torch is checked before it is imported."""
    engine, config = read_settings([EngineConfig, PlanConfig], args, environ, args.config)
    hardware = chosen_hardware(engine, config)
    check_gpus(config.gpus, engine.parallel is not None, hardware is not None)
    request = sweep_request(config.sweep)
    check_plot("--plot", config.plot)
    from flexbatch.models.described import describe

    described = describe(engine.model)
    job = config.job(min(described.arch.max_positions, engine.max_model_len or described.arch.max_positions))
    meshes = None
    if engine.parallel is not None:
        engine, meshes = planned_mesh(engine, described, job, hardware, config.gpus)
    if request is not None:
        # Where the largest size does not hold the job, none does.
        largest = dataclasses.replace(engine, **{request.kind: request.last})
        print_sweep(request, planner_of(largest, described, job, hardware), config, data)
        return DONE
    planner = planner_of(engine, described, job, hardware)
    report = planner.describe(job)
    plan = with_more_memory(planner, report.pop("plan"))
    caches = smaller_caches(planner, plan)
    if config.json:
        from flexbatch.policy.explain import engines_summary, summary

        together = engines_summary(plan, engine.data_parallel_size)
        smaller = {str(bits): summary(other) for bits, other in caches.items()}
        found = {**report, **summary(plan), **together, "smaller_caches": smaller}
        found |= {} if meshes is None else {"meshes": [each.summary() for each in meshes.plans]}
        print(json.dumps(found, indent=2, default=str), file=data)
    else:
        from flexbatch.policy.explain import engines_text, explain

        if meshes is not None:
            print(meshes.text(), end="\n\n", file=data)
        print(engines_text(plan, engine.data_parallel_size), end="", file=data)
        print(explain(plan, f"{tables.shares(report)}\n{tables.memory(report)}", caches), file=data)
    if config.plot is not None:
        from flexbatch.policy.whatif import plot_plan

        plot_plan(plan, config.plot)
    return DONE


def planner_of(engine: EngineConfig, described: Description, job: Job, hardware: Hardware | None) -> Planner:
    """The engine's own planner, for a model of which config.json alone is known. Raises DoesNotFitError."""
    from flexbatch.models.opened import planned_model
    from flexbatch.planner.planner import Planner

    # Sampling settings and drafts need more of a model than its sizes, and change no placement.
    engine = dataclasses.replace(engine, model=described.name, generation_config="none", draft=None, tree=None)
    return Planner(engine, job, dry=True, model=planned_model(described), hardware=hardware)


def planned_mesh(
    engine: EngineConfig, described: Description, job: Job, hardware: Hardware | None, gpus: int | None
) -> tuple[EngineConfig, Meshes]:
    """--parallel auto: the settings of the fastest mesh, and the plans of all. Raises ConfigurationError, and
    DoesNotFitError where none holds the job."""
    from flexbatch.planner.meshes import Meshes, gpus_here

    meshes = Meshes.planned(
        engine,
        gpus or gpus_here(engine),
        lambda settings: planner_of(settings, described, job, hardware).describe(job)["plan"],
    )
    return meshes.config(engine), meshes


def with_more_memory(planner: Planner, plan: Plan) -> Plan:
    """The plan with what a GiB more would buy, also where no linear program said it."""
    if plan.tokens_per_second_per_gib or planner.problem.is_fixed:
        return plan
    gains = {}
    for tier in ("gpu", "cpu"):
        budgets = {**planner.problem.budgets, tier: planner.problem.budgets[tier] + MORE}
        other = searched_again(planner, budgets)
        gains[tier] = max(0.0, other.predicted_tokens_per_second - plan.predicted_tokens_per_second) if other else 0.0
    return dataclasses.replace(plan, tokens_per_second_per_gib=gains)


def smaller_caches(planner: Planner, plan: Plan) -> dict[int, Plan]:
    """What the next smaller bits of the cache would give, by these bits."""
    bits = plan.policy.cache_bits // 2
    if bits < 4:
        return {}
    config = dataclasses.replace(planner.config, cache_bits=bits, allow_bits=None)
    other = searched_again(planner, planner.problem.budgets, config)
    return {} if other is None else {bits: other}


def searched_again(planner: Planner, budgets: dict[str, int], config: EngineConfig | None = None) -> Plan | None:
    """The optimizer's plan for other memory or settings; None where nothing fits."""
    from flexbatch.planner.choose import without_reserves
    from flexbatch.planner.problem import constraints_of
    from flexbatch.policy.optimizer import choose
    from flexbatch.policy.plan import DoesNotFit

    problem = planner.problem if config is None else dataclasses.replace(planner.problem, config=config)
    hardware = without_reserves(planner.hardware)
    try:
        return choose(problem.shape, hardware, problem.workload, constraints_of(problem, budgets), problem.known)
    except DoesNotFit:
        return None


def sweep_request(text: str | None) -> SweepRequest | None:
    """What --sweep asks for. Raises ConfigurationError."""
    if text is None:
        return None
    from flexbatch.policy.sweep_request import SweepRequest

    try:
        return SweepRequest.parse(text, parse_bytes)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def print_sweep(request: SweepRequest, planner: Planner, config: PlanConfig, data: TextIO) -> None:
    """--sweep: throughput against the memory of one tier."""
    from flexbatch.planner.choose import without_reserves
    from flexbatch.planner.problem import constraints_of
    from flexbatch.policy.explain import summary
    from flexbatch.policy.whatif import plot_sweep, sweep, sweep_table

    problem = planner.problem
    constraints = constraints_of(problem, problem.budgets)
    plans = sweep(problem.shape, without_reserves(planner.hardware), problem.workload, constraints, request)
    rows = [{"bytes": size, "plan": summary(plan) if plan else None} for size, plan in plans]
    print(json.dumps(rows, indent=1) if config.json else sweep_table(request, plans), file=data)
    if config.plot is not None:
        plot_sweep(request, plans, config.plot)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = make_parser().parse_args(argv)
    set_up_logging("WARNING", argv)  # what was chosen is the command's own output
    return run_command(lambda data: command(args, os.environ, data))


if __name__ == "__main__":
    sys.exit(run_process(main))
