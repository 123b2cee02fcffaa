"""A working slab that a layer has, and what of the layer crosses the link to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from flexbatch.kernels.coded_matrix import CodedMatrix
from flexbatch.kernels.expert_codes import ExpertStacks
from flexbatch.memory.cpu_experts import LeftOut, Ranges
from flexbatch.memory.files import align
from flexbatch.memory.handles import Handle


@dataclass
class SlabLease:
    """The lease of a working slab by one layer, from its first fetch to its release."""

    slab: int
    ranges: Ranges
    """What crosses the link of the layer's part in host memory."""
    left_out: LeftOut | None = None
    """Experts that the CPU computes."""
    by_hit: bool = False
    """Whether experts in host memory come when a router has chosen them, and only these."""
    arrived: Tensor | None = None
    """Those that came by that: whether each did [E], on the compute device."""
    handles: list[Handle] = field(default_factory=list)
    slices_fetched: int = 0
    waits_for_disk: bool = False
    """Whether its part from the disk has not been copied from staging to the slab yet."""

    @property
    def num_bytes(self) -> int:
        """Of the ranges."""
        return sum(last - first for first, last in self.ranges)


Place = tuple[int, int]
"""A layer and its slab; -1 where it needs none."""


def place_of(layer: int, leases: Mapping[int, SlabLease]) -> Place:
    return layer, leases[layer].slab if layer in leases else -1


@dataclass(frozen=True)
class KeptViews:
    """Views of a layer's weights in the slabs that it has had: making them takes 0.1 ms of Python."""

    dense: dict[Place, dict[str, Tensor]] = field(default_factory=dict)
    coded: dict[tuple[Place, str], dict[str, CodedMatrix]] = field(default_factory=dict)
    """Of a stage of a layer."""
    stacks: dict[Place, tuple[ExpertStacks, ExpertStacks]] = field(default_factory=dict)

    def clear(self) -> None:
        self.dense.clear()
        self.coded.clear()
        self.stacks.clear()


def slices(num_bytes: int, index: int, count: int, alignment: int = 256) -> tuple[int, int]:
    """The ``index``-th of ``count`` contiguous byte ranges, cut at multiples of ``alignment``."""
    step = align(math.ceil(num_bytes / count), alignment)
    return min(index * step, num_bytes), min((index + 1) * step, num_bytes)


def gaps(ranges: Ranges, end: int) -> Ranges:
    """The bytes up to ``end`` that are in none of the ranges."""
    whole = ((0, 0), *ranges, (end, end))
    return tuple((before, start) for (_, before), (start, _) in pairwise(whole) if start > before)
