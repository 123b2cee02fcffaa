"""Predicted against measured throughput of real runs: table, errors and plot.

``python -m benchmark.policy_error runs.jsonl --hardware hardware.json`` reads one run a line and writes
``benchmark/results/policy_error.{md,json}`` and, with matplotlib, ``policy_error.png``. A run: ``model`` (a public
shape) or ``shape`` (fields of ModelShape); ``percent`` (six numbers); ``gpu_batch_size``, ``num_gpu_batches``;
optional ``weight_bits``, ``cache_bits``, ``cpu_attention``, ``prefill_chunk``, ``prefill_budget``, ``overlap``,
``piece_tokens``, ``few_in_codes``, ``admission_passes``, ``async_scheduling`` (passes were composed one by one where
it is false or not there); ``prompt_lens`` and ``output_lens`` (lists, one of each a sequence); ``gpu_memory``,
``cpu_memory`` in bytes; ``tokens_per_second`` (measured); optional ``resource_seconds`` (busy seconds of the average
pass). Exit code 1 when the median error exceeds 10 % or the worst 25 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from flexbatch.planner.choose import without_reserves
from flexbatch.policy.explain import summary
from flexbatch.policy.hardware import Hardware, load_hardware
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.plan import Plan, price
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import public_shape
from flexbatch.policy.stdout import data_apart, run_process
from flexbatch.policy.units import GIB
from flexbatch.policy.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
MEDIAN_LIMIT, WORST_LIMIT = 0.10, 0.25
OPTIONAL = (
    *("weight_bits", "cache_bits", "cpu_attention", "prefill_chunk", "prefill_budget", "overlap", "piece_tokens"),
    *("few_in_codes", "admission_passes"),
)


def plan_of(run: dict, hardware: Hardware) -> Plan:
    """What the cost model says of a run's setting."""
    shape = ModelShape.from_dict(run["shape"]) if "shape" in run else public_shape(run["model"])
    splits = [Split.from_percent(*run["percent"][i : i + 2]) for i in (0, 2, 4)]
    options = {name: run[name] for name in OPTIONAL if name in run}
    options["cpu_experts"] = run.get("cpu_experts", 0.0) / 100
    options["async_scheduling"] = run.get("async_scheduling", False) is not False
    policy = Policy(*splits, run["gpu_batch_size"], run["num_gpu_batches"], **options)
    workload = Workload.from_lengths(run["prompt_lens"], run["output_lens"])
    # Budgets of a run are for its pools alone.
    machine = without_reserves(hardware).with_memory(run.get("gpu_memory"), run.get("cpu_memory"))
    return price(shape, machine, workload, policy)


def compare(runs: Iterable[dict], hardware: Hardware) -> list[dict]:
    """One record a run; ``error`` is predicted / measured - 1."""
    records = []
    for run in runs:
        plan = plan_of(run, hardware)
        error = plan.predicted_tokens_per_second / run["tokens_per_second"] - 1
        records.append(
            {"measured": run["tokens_per_second"], "error": error, "gpu_memory": run.get("gpu_memory"), **summary(plan)}
        )
    return records


def table(records: list[dict]) -> list[str]:
    lines = ["| model | bits | percent | block | GPU GiB | measured tok/s | predicted | error | bound | limited by |"]
    lines.append("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for r in records:
        percent = " ".join(f"{x:.0f}" for x in r["percent"])
        memory = f"{r['gpu_memory'] / GIB:.0f}" if r["gpu_memory"] else "all"
        lines.append(
            f"| {r['model']} | {r['weight_bits']} / {r['cache_bits']} | {percent} | "
            f"{r['gpu_batch_size']}x{r['num_gpu_batches']} | {memory} "
            f"| {r['measured']:.2f} | {r['predicted_tokens_per_second']:.2f} | {r['error']:+.1%} "
            f"| {r['bound_tokens_per_second']:.2f} | {r['limiting_resource']} |"
        )
    return lines


def plot(records: list[dict], path: Path) -> None:
    from flexbatch.policy.whatif import pyplot

    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 6), constrained_layout=True)
    measured, predicted = [r["measured"] for r in records], [r["predicted_tokens_per_second"] for r in records]
    ends = [0.8 * min(measured + predicted), 1.25 * max(measured + predicted)]
    axes.loglog(measured, predicted, "o")
    axes.plot(ends, ends, color="black")
    axes.fill_between(
        ends,
        [x * (1 - MEDIAN_LIMIT) for x in ends],
        [x * (1 + MEDIAN_LIMIT) for x in ends],
        alpha=0.2,
        label=f"{MEDIAN_LIMIT:.0%}",
    )
    axes.set_xlabel("measured tokens per second")
    axes.set_ylabel("predicted tokens per second")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmark.policy_error", description="Compare predicted with measured throughput."
    )
    parser.add_argument("runs", type=Path, help="JSON lines, one run each")
    parser.add_argument("--hardware", required=True, help="a shipped machine or a JSON file of flexbatch profile")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results", help="folder of the results")
    options = parser.parse_args(arguments)
    with data_apart() as data:
        runs = [json.loads(line) for line in options.runs.read_text().splitlines() if line.strip()]
        if not runs:
            print(f"error: {options.runs} holds no runs", file=sys.stderr)
            return 2
        hardware = load_hardware(options.hardware)
        records = compare(runs, hardware)
        errors = [abs(r["error"]) for r in records]
        accepted = f"{len(records)} settings: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}"
        options.output.mkdir(parents=True, exist_ok=True)
        text = [f"# Predicted against measured on {hardware.name}", "", accepted, "", *table(records), ""]
        (options.output / "policy_error.md").write_text("\n".join(text))
        (options.output / "policy_error.json").write_text(json.dumps(records, indent=1) + "\n")
        try:
            plot(records, options.output / "policy_error.png")
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)
        print(accepted, file=data)
        return int(statistics.median(errors) > MEDIAN_LIMIT or max(errors) > WORST_LIMIT)


if __name__ == "__main__":
    sys.exit(run_process(main))
