"""Which experts of a layer the CPU computes where they lie, and what of the layer crosses the link then.

They are chosen before a layer's weights are sent for, which is a layer before its router says what is needed: the least
used of those in host memory, by the tokens that the passes before have given them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.kernels.experts_reference import StoredExperts, StoredMatrices
from flexbatch.kernels.native_experts import ExpertTable
from flexbatch.memory.disk_cache import aligned_empty
from flexbatch.memory.files import align
from flexbatch.memory.weight_plan import PlacedTensor, WeightPlan
from flexbatch.memory.weight_tensors import WeightTensors
from flexbatch.models.specs import expert_role

Ranges = tuple[tuple[int, int], ...]
"""Stretches of bytes of a layer's slab in host memory."""
NAMES = ("gate_up", "down")


@dataclass(frozen=True)
class LeftOut:
    """Experts of a layer that do not cross the link: who they are, and for each expert [E] whether it is one of them,
    on the host and on the compute device."""

    experts: frozenset[int]
    on_host: Tensor
    on_device: Tensor


class CpuExperts:
    """Of every layer, ``share`` of the experts that lie in host memory."""

    def __init__(self, plan: WeightPlan, tensors: WeightTensors, share: float, device: torch.device) -> None:
        assert plan.arch.experts is not None, "a model without experts leaves none to the CPU"
        self.plan, self.tensors, self.share, self.device = plan, tensors, share, device
        self.placed = [{tensor.spec.role: tensor for tensor in layer} for layer in plan.layers]
        self.here = {layer: self._experts_here(layer) for layer in range(plan.arch.num_layers)}
        """Experts in host memory by layer."""
        self.chosen: dict[int, LeftOut] = {}
        self.ranges: dict[int, Ranges] = {}
        """What crosses the link by layer, where some experts do not."""
        self.tables: dict[int, ExpertTable] = {}
        self.choose(None)

    def _units(self, layer: int) -> list[tuple[int, int]]:
        """(first expert, number) of what of a layer is placed in host memory, both matrices of it. None of a layer
        whose experts are in several forms, which a checkpoint may have: they are expanded on the compute device."""
        experts = self.plan.arch.experts_of(layer)
        units = experts.units if experts else ()
        if any(len({self._matrices(layer, first, name).form for first, _ in units}) > 1 for name in NAMES):
            return []
        return [
            (first, count)
            for first, count in units
            if all(self._matrices(layer, first, name).tier == "cpu" for name in NAMES)
        ]

    def _experts_here(self, layer: int) -> tuple[int, ...]:
        return tuple(expert for first, count in self._units(layer) for expert in range(first, first + count))

    def _matrices(self, layer: int, first: int, name: str) -> PlacedTensor:
        return self.placed[layer][f"{expert_role(first, name)}.weight"]

    def choose(self, counts: Tensor | None, passes: int = 0) -> None:
        """Anew, by the tokens [layers, experts] of every expert in so many passes; None: there are none."""
        self.passes = passes
        assert self.plan.arch.experts is not None
        masks = torch.zeros(len(self.here), self.plan.arch.experts.count, dtype=torch.bool)
        found = {}
        for layer, here in self.here.items():
            tokens = [0] * (max(here, default=0) + 1) if counts is None else counts[layer].tolist()
            coldest = sorted(here, key=lambda expert: (tokens[expert], expert))
            found[layer] = coldest[: round(self.share * len(here))]
            masks[layer, found[layer]] = True
        on_device = masks.to(self.device)
        for layer, experts in found.items():
            chosen = frozenset(experts)
            if layer not in self.chosen or chosen != self.chosen[layer].experts:
                self.chosen[layer] = LeftOut(chosen, masks[layer], on_device[layer])
                self.ranges[layer] = self._others(layer, chosen)

    def _others(self, layer: int, chosen: frozenset[int]) -> Ranges:
        """The layer's slab without the experts ``chosen``."""
        left_out = sorted(
            part
            for first, count in self._units(layer)
            for name in NAMES
            for part in parts_of(self._matrices(layer, first, name), first, count, chosen)
        )
        cursor, ranges = 0, []
        for start, end in [*left_out, (self.plan.layer_bytes(layer, "cpu"),) * 2]:
            if start > cursor:
                ranges.append((cursor, start))
            cursor = end
        return tuple(ranges)

    def table(self, layer: int) -> ExpertTable:
        """The layer's experts for the kernel. Made at the first use: biases are copied from the tier that they are
        on."""
        if layer not in self.tables:
            arch, experts = self.plan.arch, self.plan.arch.experts
            assert experts is not None
            gate_up, down = (self._stored(layer, name) for name in NAMES)
            biases = [self._bias(layer, f"expert_biases.{name}") for name in NAMES]
            stored = StoredExperts(
                gate_up, down, arch.hidden_size, experts.width, arch.activation, experts.gain, experts.clamp, *biases
            )
            self.tables[layer] = ExpertTable.of(stored, experts.count)
        return self.tables[layer]

    def _stored(self, layer: int, name: str) -> StoredMatrices:
        values: dict[int, Tensor] = {}
        parameters: dict[int, Tensor] = {}
        forms = set()
        for first, count in self._units(layer):
            placed = self._matrices(layer, first, name)
            view = self.tensors.views[layer, placed.spec.role]
            forms.add(placed.form)
            for tensor, kept in ((view.dense, values), (view.codes, values), (view.parameters, parameters)):
                if tensor is not None:
                    kept |= dict(enumerate(tensor.unflatten(0, (count, -1)), first))
        (form,) = forms
        return StoredMatrices(values, parameters, form.bits, form.group, form.floats)

    def _bias(self, layer: int, role: str) -> Tensor | None:
        placed = self.placed[layer].get(role)
        if placed is None:
            return None
        if placed.tier != "disk":
            dense = self.tensors.views[layer, role].dense
            assert dense is not None
            return dense.cpu()
        buffer = aligned_empty(align(placed.num_bytes))
        self.tensors.files[layer, role].read(buffer, 0)
        return buffer[: placed.num_bytes].view(self.tensors.dtype).view(placed.spec.shape)

    def check(self) -> None:
        """Invariants: only what is here is computed here, and what does not cross the link is just that."""
        for layer, left_out in self.chosen.items():
            chosen = left_out.experts
            assert chosen <= set(self.here[layer]), (layer, chosen)
            crossing = sum(end - start for start, end in self.ranges[layer])
            spared = sum(
                end - start
                for first, count in self._units(layer)
                for name in NAMES
                for start, end in parts_of(self._matrices(layer, first, name), first, count, chosen)
            )
            assert crossing + spared == self.plan.layer_bytes(layer, "cpu"), (layer, crossing, spared)


def parts_of(placed: PlacedTensor, first: int, count: int, experts: frozenset[int]) -> Ranges:
    """Where some of the ``count`` experts from ``first`` on lie in the slab of their layer."""
    arrays = [(placed.offset, placed.dense_bytes)]
    if placed.quantized:
        codes = math.prod(placed.codes_shape)
        arrays = [(placed.offset, codes), (placed.offset + placed.codes_bytes, placed.num_bytes - placed.codes_bytes)]
    return tuple(
        (start + index * size // count, start + (index + 1) * size // count)
        for start, size in arrays
        for index in range(count)
        if first + index in experts
    )


def cut(ranges: Ranges, start: int, end: int) -> Ranges:
    """The bytes [start, end) of what ``ranges`` are, one after another."""
    cursor, parts = 0, []
    for first, last in ranges:
        begin, stop = max(start - cursor, 0), min(end - cursor, last - first)
        if begin < stop:
            parts.append((first + begin, first + stop))
        cursor += last - first
    return tuple(parts)
