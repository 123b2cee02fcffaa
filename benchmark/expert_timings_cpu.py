"""``python -m benchmark.expert_timings_cpu [-o FILE]``: experts computed by the processor, alone and beside the link.

Gigabytes of weights a second, and the operations that this is, by their format and by the rows that every expert is
given; one JSON line for each. The experts of all formats take as many bytes, more than the processor's caches.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmark.kernel_cases import MIB, Row
from benchmark.kernel_timings_cpu import beside_the_link, host_seconds
from benchmark.machine import machine
from flexbatch.calibrate.experts import FORMS, call_of, expert_bytes, stored_experts
from flexbatch.kernels import native

SHAPES = {"qwen3-30b-a3b": (2048, 768), "gpt-oss": (2880, 2880), "mixtral-8x7b": (4096, 14336)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def expert_timings(total_bytes: int, threads: int, shapes: dict[str, tuple[int, int]] = SHAPES) -> list[Row]:
    rows: list[Row] = []
    cuda = torch.cuda.is_available()
    for name, (hidden, width) in shapes.items():
        for form in FORMS:
            each = expert_bytes(form, hidden, width, torch.bfloat16)
            count = max(1, total_bytes // each)
            table = stored_experts(form, count, hidden, width, torch.bfloat16)
            for given in ROWS:
                call = call_of(table, given, torch.bfloat16, threads)
                seconds = host_seconds(call, 3)
                row: Row = {"kernel": "experts", "shape": name, "form": form, "experts": count, "rows": given}
                row |= {"threads": threads, "gbps": count * each / seconds / 1e9}
                row["gflops"] = 6 * hidden * width * count * given / seconds / 1e9
                rows.append(row | (beside_the_link(call, count * each) if cuda else {}))
                print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the results and the machine")
    parser.add_argument("--mib", type=int, default=2048, help="weights of a measurement (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="default: as many as torch uses")
    options = parser.parse_args()
    if native.library() is None:
        sys.exit("the kernels cannot be compiled on this machine: there is nothing to time")
    rows = expert_timings(options.mib * MIB, options.threads or torch.get_num_threads())
    if options.output:
        options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
