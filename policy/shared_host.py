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
    return dataclasses.replace(scaled(hardware, names, 1 / ranks), tensor_ranks=tensor_ranks)


def scaled(hardware: Hardware, names: Iterable[str], factor: float) -> Hardware:
    """With these rates times a factor."""

    def times(value: Any) -> Any:
        if isinstance(value, Curve):
            return Curve(value.points, tuple(factor * each for each in value.values))
        return factor * value if value else value

    return dataclasses.replace(hardware, **{name: times(getattr(hardware, name)) for name in names})
