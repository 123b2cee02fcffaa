"""Kernels against the ceilings of the machine, measured in the same run: checks first, then timings, as JSON.

    python -m benchmark.kernels --output kernels.json             # a GPU; under four minutes
    python -m benchmark.kernels --check-only
    python -m benchmark.kernels --sections cpu                    # needs no GPU

Ceilings: a bf16 GEMM for arithmetic, a device copy (bytes read plus written) for GPU memory, the copy engine for the
link, a sum over a large tensor for host memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmark.kernel_cases import Row, check
from benchmark.kernel_timings import attention_rows, ceilings, norm_rows, page_rows, quant_rows
from benchmark.kernel_timings_cpu import cpu_rows
from benchmark.kernel_tuning import tuning_rows
from benchmark.machine import machine


def main() -> int:
    sections = ("attention", "pages", "quant", "norm", "cpu", "tune")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument(
        "--only", type=int, help="check only this one of the attention shapes (a bad address ends the process)"
    )
    parser.add_argument("--check-only", action="store_true", help="compare with the oracle and stop")
    parser.add_argument(
        "--sections", nargs="+", choices=sections, default=sections[:5], help="what to time; tune tries tile shapes"
    )
    parser.add_argument(
        "--cpu-sequences", type=int, default=128, help="sequences of 512 tokens in CPU attention (of 14 MiB each)"
    )
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    result: Row = {"machine": machine(), "checks": [], "rows": []}

    def add(rows: list[Row]) -> None:
        result["rows"] += rows
        for row in rows:
            print(
                json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}),
                file=sys.stderr,
                flush=True,
            )

    if cuda or arguments.check_only:
        result["checks"] = check("cuda" if cuda else "cpu", arguments.only)
        wrong = [row for row in result["checks"] if not row["ok"]]
        print(
            f"{len(result['checks']) - len(wrong)} checks passed, {len(wrong)} failed",
            *wrong,
            sep="\n",
            file=sys.stderr,
            flush=True,
        )
    if not arguments.check_only:
        if cuda:
            result["ceilings"] = ceilings()
            add([result["ceilings"]])
            works = {"attention": attention_rows, "pages": page_rows, "quant": quant_rows, "norm": norm_rows}
            for name in arguments.sections:
                if name in works:
                    add(works[name](result["ceilings"]))
                    torch.cuda.empty_cache()
        if "cpu" in arguments.sections:
            add(cpu_rows(arguments.cpu_sequences))
        if cuda and "tune" in arguments.sections:
            for row in tuning_rows():
                add([row])
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["ok"] for row in result["checks"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
