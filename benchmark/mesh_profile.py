"""Profiles for `benchmark.parallel` from one of a GPU of this host: of the whole host, with what is between its GPUs,
and of one GPU with its part of the cores.

    python -m benchmark.mesh_profile hardware.json --whole all.json --one one.json --gpus 2

The profile may have been measured with all cores or with one GPU's part of them (its ``source`` says with how many
threads). What cores and host memory do with the others is measured as the ratio of both, in seconds, and not a whole
profile again, which takes a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from pathlib import Path

import torch

from flexbatch.calibrate.host_together import HostTogether
from flexbatch.calibrate.interconnect import SHORTER, with_interconnect
from flexbatch.parallel import numa
from flexbatch.parallel.mesh import Mesh
from flexbatch.policy.hardware import Hardware, read_hardware
from flexbatch.policy.shared_host import ON_CORES, scaled
from flexbatch.policy.stdout import run_process


class OneGpu:
    """Who measures alone, as `HostTogether` wants it."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        self.mesh = Mesh(0, 1, "127.0.0.1:0", 0, 1, hosts_store=True)
        self.device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        self.dtype, self.shorter = (torch.bfloat16, 1) if cuda else (torch.float32, SHORTER)

    def slowest(self, seconds: float) -> float:
        return seconds


def rates(cores: list[int]) -> tuple[float, ...]:
    """Bytes a second attended with these cores, attended beside the link, and copied beside that."""
    undo, threads = numa.run_on(cores), torch.get_num_threads()
    torch.set_num_threads(len(cores))
    try:
        return HostTogether(OneGpu(), None, len(cores)).rates()
    finally:
        undo()
        torch.set_num_threads(threads)


def with_rates(hardware: Hardware, before: tuple[float, ...], after: tuple[float, ...]) -> Hardware:
    """A profile that was measured where ``before`` was, as it would have been measured where ``after`` was."""
    alone, beside, link = (new / old for new, old in zip(after, before, strict=True))
    other = scaled(hardware, ON_CORES, alone)
    attended = min(beside * hardware.cpu_attention_during_h2d, other.cpu_attention.values[0])
    copied = min(link * hardware.h2d_during_cpu_attention, hardware.h2d)
    most = max(attended + copied, alone * hardware.host_bandwidth if alone < 1 else hardware.host_bandwidth)
    return dataclasses.replace(
        other, cpu_attention_during_h2d=attended, h2d_during_cpu_attention=copied, host_bandwidth=most
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hardware", type=Path, help="of one GPU of this host")
    parser.add_argument("--whole", type=Path, required=True)
    parser.add_argument("--one", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    given = parser.parse_args()
    known, cores = read_hardware(given.hardware), sorted(os.sched_getaffinity(0))
    part = cores[: max(1, len(cores) // given.gpus)]
    found = re.search(r"(\d+) threads", str(known.source.get("load average", "")))
    of_part = found is not None and int(found[1]) <= len(part) < len(cores)
    with_all, with_part = rates(cores), rates(part)
    one, whole = (
        (known, with_rates(known, with_part, with_all)) if of_part else (with_rates(known, with_all, with_part), known)
    )
    given.one.write_text(one.to_json())
    given.whole.write_text(whole.to_json())
    sys.stderr.write(f"profile of {'a part' if of_part else 'all'} of the cores; GB/s with a part: {with_part}, all: ")
    sys.stderr.write(f"{with_all}\n")
    given.whole.write_text(with_interconnect(whole, given.gpus).to_json())
    return 0


if __name__ == "__main__":
    sys.exit(run_process(main))
