"""Passes of few tokens bring only those experts from host memory that their tokens go to.

Which these are the device knows when a layer's router has spoken, and nobody else: the host waits for nothing, the
kernel that copies reads the choices where they are. So such a copy runs between router and products, and nothing hides
it; with few enough experts it is sooner done than the copy of all that a layer ahead would hide.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.memory.cpu_experts import NAMES, CpuExperts, Ranges, parts_of
from flexbatch.memory.slab_lease import SlabLease, gaps
from flexbatch.memory.weight_plan import PlacedTensor, WeightPlan
from flexbatch.models.specs import expert_role
from flexbatch.policy.limits import hit_expert_tokens


class HitExperts:
    """Where every expert in host memory lies in the slab of its layer. Experts on the disk cross whole, and so do
    those that are expanded before they are multiplied, which happens before the router."""

    def __init__(self, plan: WeightPlan, device: torch.device) -> None:
        experts = plan.arch.experts
        assert experts is not None, "a model without experts has none that are hit"
        self.plan, self.device, self.count = plan, device, experts.count
        self.max_tokens = hit_expert_tokens(experts.count, experts.top_k)
        self.parts = {layer: self._parts(layer) for layer in range(plan.arch.num_layers)}
        """By layer (expert, first byte, end) of what is copied for it."""
        self.ranges = {layer: self._others(layer) for layer in self.parts}
        """What of a layer's slab in host memory crosses whatever is hit."""
        bounds = [bound for parts in self.parts.values() for _, *ends in parts for bound in ends]
        together = functools.reduce(operator.or_, bounds, 8)
        self.word = together & -together
        """Bytes that divide all of these, at most 8."""
        self.tables: dict[int, Tensor] = {}
        self.fetched_bytes = torch.zeros((), dtype=torch.int64, device=device)
        """Bytes, since they were last asked for."""

    def _parts(self, layer: int) -> list[tuple[int, int, int]]:
        experts = self.plan.arch.experts_of(layer)
        expanded = {each.spec.role for each in self.plan.expanded(layer, "post")}
        placed = {each.spec.role: each for each in self.plan.layers[layer]}
        found = []
        for first, count in experts.units if experts else ():
            for name in NAMES:
                matrices: PlacedTensor = placed[f"{expert_role(first, name)}.weight"]
                if matrices.tier == "cpu" and matrices.spec.role not in expanded:
                    for expert in range(first, first + count):
                        found += [(expert, *part) for part in parts_of(matrices, first, count, frozenset({expert}))]
        return sorted(found, key=lambda part: part[1])

    def _others(self, layer: int) -> Ranges:
        return gaps(tuple((start, end) for _, start, end in self.parts[layer]), self.plan.layer_bytes(layer, "cpu"))

    def fetch(self, lease: SlabLease, layer: int, source: Tensor, target: Tensor, chosen: Tensor) -> None:
        """Copy the experts ``chosen`` [T, K] that are neither here yet nor left to the CPU. source, target: the layer's
        slab in host memory, and what of the working slab it goes to."""
        wanted = torch.zeros(self.count, dtype=torch.bool, device=self.device).scatter_(0, chosen.flatten(), True)
        if lease.left_out is not None:
            wanted &= ~lease.left_out.on_device
        if lease.arrived is not None:
            new = wanted & ~lease.arrived
            lease.arrived |= wanted
            wanted = new
        else:
            lease.arrived = wanted.clone()
        if layer not in self.tables:
            self.tables[layer] = torch.tensor(self.parts[layer], dtype=torch.int64).to(self.device)
        parts = self.tables[layer]
        self.fetched_bytes += ((parts[:, 2] - parts[:, 1]) * wanted[parts[:, 0]]).sum()
        ops.copy_parts(source, target, parts, wanted, self.word)

    def take_bytes(self) -> int:
        """Of what was brought since the last call; waits for the device."""
        found = int(self.fetched_bytes)
        self.fetched_bytes.zero_()
        return found

    def check(self) -> None:
        """Invariant: what crosses whatever is hit and what does not make up the layer."""
        for layer, parts in self.parts.items():
            spared = sum(end - start for _, start, end in parts)
            crossing = sum(end - start for start, end in self.ranges[layer])
            assert spared + crossing == self.plan.layer_bytes(layer, "cpu"), (layer, spared, crossing)


def leased(slab: int, layer: int, whole: int, elsewhere: CpuExperts | None, hits: HitExperts | None) -> SlabLease:
    """The lease of a slab by a layer with ``whole`` bytes in host memory: without the experts that the CPU computes,
    and where they come as they are hit, without any."""
    ranges: Ranges = ((0, whole),)
    left_out = elsewhere.chosen.get(layer) if elsewhere is not None else None
    if elsewhere is not None and left_out is not None and left_out.experts:
        ranges = elsewhere.ranges[layer]
    else:
        left_out = None
    by_hit = hits is not None and bool(hits.parts.get(layer))
    return SlabLease(slab, hits.ranges[layer] if hits is not None and by_hit else ranges, left_out, by_hit)
