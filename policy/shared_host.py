"""What one of several processes on a host has of its machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from flexbatch.policy.curve import Curve
from flexbatch.policy.hardware import Hardware

OF_THE_HOST = frozenset(
    {"disk_read", "disk_write", "host_bandwidth", "cpu_attention", "cpu_attention_during_h2d"}
    | {"cpu_attention_8", "cpu_attention_4", "cpu_experts", "cpu_experts_8", "cpu_experts_4"}
)
ON_CORES = OF_THE_HOST - {"disk_read", "disk_write", "host_bandwidth", "cpu_attention_during_h2d"}
"""What cores compute from host memory, links idle."""
OF_A_CPU = frozenset(
    {"h2d", "d2h", "link_both", "gather", "scatter", "gemm", "gpu_bandwidth", "attention_decode"}
    | {"attention_prefill", "expand", "h2d_during_cpu_attention", "attention_expand"}
)
"""Also rates of the host, where it is the compute device."""
OF_A_LINK = frozenset({"h2d", "d2h", "link_both", "gather", "scatter", "h2d_during_cpu_attention"})
"""What GPUs have less of where they share a switch, or together more links than host memory can fill."""


def shared_by(hardware: Hardware, ranks: int, tensor_ranks: int = 1) -> Hardware:
    """The machine of one rank: a GPU and its link, and an equal part of the host's memory bandwidth, disk and cores.
    tensor_ranks: those that share every layer."""
    names = OF_THE_HOST | (OF_A_CPU if hardware.device == "cpu" else frozenset())
    if hardware.links_together is not None and hardware.device != "cpu":
        hardware = scaled(hardware, OF_A_LINK, hardware.links_together.at(ranks))
    rank = beside_others(scaled(hardware, names, 1 / ranks), ranks)
    return dataclasses.replace(rank, tensor_ranks=tensor_ranks)


def beside_others(rank: Hardware, ranks: int) -> Hardware:
    """A rank's equal part of the host, with what measured processes had of theirs while all of them were busy."""
    shares = rank.cpu_attention_together, rank.cpu_attention_together_during_h2d, rank.h2d_together_during_cpu_attention
    if rank.device == "cpu" or ranks == 1 or any(share is None for share in shares):
        return rank
    alone, attention, link = (share.at(ranks) for share in shares if share is not None)
    rank = scaled(rank, ON_CORES, alone)
    links = 1.0 if rank.links_together is None else rank.links_together.at(ranks)
    # No more than each has without the other: every measurement has its errors.
    attended = min(attention * rank.cpu_attention_during_h2d, rank.cpu_attention.values[0])
    copied = min(link / links * rank.h2d_during_cpu_attention, rank.h2d)
    return dataclasses.replace(
        rank,
        cpu_attention_during_h2d=attended,
        h2d_during_cpu_attention=copied,
        host_bandwidth=max(rank.host_bandwidth, attended + copied),
    )


def scaled(hardware: Hardware, names: Iterable[str], factor: float) -> Hardware:
    """With these rates times a factor."""

    def times(value: Any) -> Any:
        if isinstance(value, Curve):
            return Curve(value.points, tuple(factor * each for each in value.values))
        return factor * value if value else value

    return dataclasses.replace(hardware, **{name: times(getattr(hardware, name)) for name in names})
