"""Predicted against measured passes by their kind, from what `benchmark.policy_runs` has recorded: where a job's
throughput is off, which passes are, and what of them the prediction puts where.

    python -m benchmark.pass_errors runs.jsonl --hardware machine.json

Kinds: "graph" (a decode pass that is one CUDA graph), "pieces" (one of several), "decode" and "mixed" (with prompts),
launched kernel by kernel. Columns, of the average pass in milliseconds: measured, of the fastest quarter of passes the
slowest, predicted, of the prediction what the host does once a pass, what launching takes, and the busiest resource;
the error is predicted / measured - 1. Where passes are alike, what lies between the quarter and the average is the
host's noise; what other processes kept busy of it meanwhile comes with the counts of passes, predicted and run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmark.policy_error import plan_of
from benchmark.set_up import as_words
from flexbatch.policy.affine import point_of
from flexbatch.policy.cost import RESOURCES, PassModel
from flexbatch.policy.hardware import Hardware, load_hardware
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.plan import Plan
from flexbatch.policy.stdout import data_apart, run_process


@dataclass(frozen=True)
class KindOfPass:
    """The passes of one kind in a job; seconds of the average one."""

    setting: str
    kind: str
    count: int
    measured: float
    quarter: float
    """Of the fastest quarter, the slowest."""
    predicted: float
    host: float
    launching: float
    busy: dict[str, float]
    """Predicted, by resource."""
    measured_busy: dict[str, float]
    """Of the passes that were timed, by resource; empty where none was."""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def busiest(self) -> str:
        return max(self.busy, key=lambda name: self.busy[name])


def kinds_of(run: dict, hardware: Hardware) -> Iterator[KindOfPass]:
    """The kinds of passes that a recorded run had; none without its passes."""
    if run.get("passes"):
        yield from kinds_of_passes(run["name"], plan_of(run, hardware), run["passes"], run.get("graphs", 1) > 0)


def kinds_of_passes(name: str, plan: Plan, passes: list[dict], graphs: bool = True) -> Iterator[KindOfPass]:
    """The kinds of the passes that `observed.PassLog` has kept; there must be some."""
    load = PassLoad(*np.array([each["load"] for each in passes], dtype=float).T)
    measured = np.array([each["seconds"] for each in passes])
    policy = plan.policy
    model, point = PassModel(plan.shape, plan.hardware, policy, load, graphs), point_of(policy)
    rows = {each: np.broadcast_to(value, measured.shape) for each, value in model.resource_seconds(point).items()}
    columns = [np.broadcast_to(each, measured.shape) for each in (model.pass_seconds(point), model.host_seconds)]
    launched = np.broadcast_to(model.launched(point), measured.shape) - columns[1]
    graph, pieces = (each & model.on_gpu(point) for each in (model.in_graphs, model.in_pieces))
    others, mixed = ~graph & ~pieces, np.asarray(load.prompt_tokens) > 0
    for kind, which in (("graph", graph), ("pieces", pieces), ("decode", others & ~mixed), ("mixed", others & mixed)):
        if not which.any():
            continue
        busy = {resource: float(rows[resource][which].mean()) for resource in RESOURCES}
        timed = [passes[index]["busy"] for index in np.flatnonzero(which) if passes[index]["busy"]]
        seen = {each: sum(one.get(each, 0.0) for one in timed) / len(timed) for each in RESOURCES if timed}
        mean, *means = [float(each[which].mean()) for each in (measured, *columns, launched)]
        quarter = float(np.percentile(measured[which], 25))
        yield KindOfPass(name, kind, int(which.sum()), mean, quarter, *means, busy, seen)


def table(kinds: Iterable[KindOfPass]) -> list[str]:
    lines = [
        "| setting | kind | passes | measured | quarter | predicted | error | host | launching | busiest resource |"
    ]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for each in kinds:
        numbers = [1e3 * value for value in (each.measured, each.quarter, each.predicted, each.host, each.launching)]
        shown = [f"{value:.1f}" for value in numbers]
        resource = f"{each.busiest} {1e3 * each.busy[each.busiest]:.1f}"
        lines.append(
            f"| {each.setting} | {each.kind} | {each.count} | {shown[0]} | {shown[1]} | {shown[2]} | "
            f"{each.error:+.0%} | {shown[3]} | {shown[4]} | {resource} |"
        )
    return lines


def counts(run: dict, hardware: Hardware) -> str:
    """Passes predicted and run, and what of the job was outside of passes."""
    plan, passes = plan_of(run, hardware), run["passes"]
    outside = run["seconds"] - sum(each["seconds"] for each in passes) if "seconds" in run else 0.0
    made = as_words(run.get("set_up", {}))
    host = run.get("host", {})
    others = f"; others kept {host['other_cores']:.1f} of {host['cores']:.0f} cores busy" if host else ""
    return (
        f"{run['name']}: {plan.passes:.0f} passes predicted, {len(passes)} run; {outside:.2f} s outside of passes "
        f"(set-up: {made}); throughput {job_error(run, hardware):+.1%}, "
        f"{job_error(run, hardware, beside_set_up=True):+.1%} beside set-up{others}"
    )


def job_error(run: dict, hardware: Hardware, beside_set_up: bool = False) -> float:
    """Predicted over measured throughput of the whole job, less 1. Set-up is priced by no plan: it comes once."""
    rate, predicted = run["tokens_per_second"], plan_of(run, hardware).predicted_tokens_per_second
    if beside_set_up and "seconds" in run:
        made = sum(each["seconds"] for each in run.get("set_up", {}).values())
        rate *= run["seconds"] / (run["seconds"] - made)
    return predicted / rate - 1


def summary(runs: list[dict], hardware: Hardware) -> str:
    """Of all jobs, with and without set-up."""
    whole, beside = ([abs(job_error(run, hardware, each)) for run in runs] for each in (False, True))
    return (
        f"{len(runs)} jobs: throughput {statistics.median(whole):.1%} median, {max(whole):.1%} worst; beside set-up "
        f"{statistics.median(beside):.1%} median, {max(beside):.1%} worst"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmark.pass_errors", description=(__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    )
    parser.add_argument("runs", type=Path, help="JSON lines of benchmark.policy_runs")
    parser.add_argument("--hardware", required=True, help="a shipped machine or a JSON file of flexbatch profile")
    options = parser.parse_args(arguments)
    with data_apart() as data:
        recorded = [json.loads(line) for line in options.runs.read_text().splitlines() if line.strip()]
        runs = [run for run in recorded if run.get("passes")]
        if not runs:
            print(f"error: {options.runs} holds no runs with passes", file=sys.stderr)
            return 2
        hardware = load_hardware(options.hardware)
        lines = table(kind for run in runs for kind in kinds_of(run, hardware))
        print("\n".join([*lines, "", *(counts(run, hardware) for run in runs), summary(runs, hardware)]), file=data)
    return 0


if __name__ == "__main__":
    sys.exit(run_process(main))
