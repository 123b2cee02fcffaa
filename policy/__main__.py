"""``python -m flexbatch.policy``: choose or price a policy from sizes alone; no GPU, no weights. Data on stdout, the
rest on stderr.

Exit codes: 0 done, 2 usage, 4 does not fit the budgets.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TextIO

from flexbatch.policy.command_line import Parser
from flexbatch.policy.stdout import data_apart, run_process
from flexbatch.policy.units import parse_size


def parse_bytes(text: str) -> int:
    """Bytes of ``"16GiB"``. Raises argparse.ArgumentTypeError."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_choices(p: argparse.ArgumentParser) -> None:
    """What the optimizer chooses unless it is given."""
    p.add_argument(
        "--percent",
        type=float,
        nargs=6,
        metavar=("WG", "WC", "CG", "CC", "AG", "AC"),
        help="fix the splits, as FlexGen's --percent",
    )
    p.add_argument("--gpu-batch-size", type=int, help="fix the sequences in one micro-batch")
    p.add_argument("--num-gpu-batches", type=int, help="fix the micro-batches in one block")
    p.add_argument(
        "--cpu-attention", type=float, help="fix the share of the CPU's sequences that is attended there, 0 to 1"
    )
    p.add_argument("--prefill-chunk", type=int, help="fix the prompt tokens of a sequence in one pass")
    p.add_argument(
        "--weight-bits",
        type=int,
        nargs="+",
        default=[16],
        choices=(16, 8, 4),
        help="bits of the weights that may be chosen",
    )
    p.add_argument(
        "--cache-bits",
        type=int,
        nargs="+",
        default=[16],
        choices=(16, 8, 4),
        help="bits of the cache that may be chosen",
    )


def parser() -> argparse.ArgumentParser:
    p = Parser(
        "python -m flexbatch.policy",
        description="Choose the policy with the highest predicted throughput, or price a given one, from sizes alone: "
        "no GPU, no weights.",
        first={
            "--prompt-len": "prompt tokens (default: 512)",
            "--gen-len": "generated tokens (default: 32)",
            "--gpu-memory": "GPU memory budget (default: the machine's)",
            "--cpu-memory": "host memory budget (default: the machine's)",
            "--weight-bits": "bits that may be chosen, e.g. 16 4",
            "--percent": "fix the placement, as FlexGen's",
            "--json": "print the plan as JSON",
            "--plot": "draw it",
            "--sweep": "what if: gpu_memory=8GiB:48GiB:5",
        },
        examples="""
            python -m flexbatch.policy --hardware t4 --model-shape opt-30b
            """,
    )
    p.add_argument(
        "--hardware",
        required=True,
        help="a shipped machine (t4, h200, cpu) or a JSON file of flexbatch profile",
    )
    p.add_argument(
        "--model-shape",
        required=True,
        help="a public shape such as opt-30b or llama-3-70b, or a JSON file with the model's sizes",
    )
    p.add_argument(
        "--prompt-len", type=int, nargs="+", default=[512], help="prompt tokens; several are taken as equally likely"
    )
    p.add_argument(
        "--gen-len", type=int, nargs="+", default=[32], help="generated tokens; several are taken as equally likely"
    )
    p.add_argument("--num-sequences", type=int, help="size of the job (default: a job without end)")
    p.add_argument("--gpu-memory", type=parse_bytes, help="GPU memory budget, e.g. 16GiB (default: the machine's)")
    p.add_argument("--cpu-memory", type=parse_bytes, help="host memory budget (default: the machine's)")
    p.add_argument("--disk", type=parse_bytes, help="disk budget (default: the machine's)")
    add_choices(p)
    p.add_argument("--no-overlap", action="store_true", help="price a pass that waits for everything after every tick")
    p.add_argument("--json", action="store_true", help="print the plan as JSON")
    p.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="draw time per resource and memory per tier, or with --sweep throughput against memory",
    )
    p.add_argument(
        "--sweep",
        metavar="KIND=FIRST:LAST:STEPS",
        help="what if: e.g. gpu_memory=8GiB:48GiB:5 or cpu_memory=64GiB:256GiB:4",
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    with data_apart() as data:
        return command(options, data)


def command(options: argparse.Namespace, data: TextIO) -> int:
    """Everything after parsing; returns the exit code."""
    # Imported only now: --help answers without NumPy and SciPy.
    from flexbatch.policy.explain import explain, summary
    from flexbatch.policy.hardware import load_hardware
    from flexbatch.policy.optimizer import choose
    from flexbatch.policy.plan import DoesNotFit
    from flexbatch.policy.policy import Constraints
    from flexbatch.policy.shapes import load_shape
    from flexbatch.policy.whatif import SweepRequest, plot_plan, plot_sweep, sweep, sweep_table
    from flexbatch.policy.workload import Workload

    try:
        hardware, shape = load_hardware(options.hardware), load_shape(options.model_shape)
        workload = Workload.from_quantiles(options.prompt_len, options.gen_len, options.num_sequences)
        constraints = Constraints(
            percent=tuple(options.percent) if options.percent else None,
            gpu_batch_size=options.gpu_batch_size,
            num_gpu_batches=options.num_gpu_batches,
            cpu_attention=options.cpu_attention,
            prefill_chunk=options.prefill_chunk,
            weight_bits=tuple(options.weight_bits),
            cache_bits=tuple(options.cache_bits),
            overlap=not options.no_overlap,
            gpu_memory=options.gpu_memory,
            cpu_memory=options.cpu_memory,
            disk=options.disk,
        )
        request = SweepRequest.parse(options.sweep, parse_bytes) if options.sweep else None
    except (ValueError, OSError, argparse.ArgumentTypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if request is not None:
        plans = sweep(shape, hardware, workload, constraints, request)
        rows = [{"bytes": size, "plan": summary(plan) if plan else None} for size, plan in plans]
        print(json.dumps(rows, indent=1) if options.json else sweep_table(request, plans), file=data)
        if options.plot:
            plot_sweep(request, plans, options.plot)
        return 0
    try:
        plan = choose(shape, hardware, workload, constraints)
    except DoesNotFit as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    print(json.dumps(summary(plan), indent=1) if options.json else explain(plan), file=data)
    if options.plot:
        plot_plan(plan, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(run_process(main))
