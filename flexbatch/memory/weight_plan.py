"""Where every weight tensor goes: pure arithmetic over shapes, done before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from flexbatch.kernels import reference
from flexbatch.kernels.coded_matrix import multiplied
from flexbatch.kernels.expert_codes import CodeForm
from flexbatch.memory.files import ALIGNMENT, align
from flexbatch.models.arch import Arch
from flexbatch.models.quantized.scheme import Form
from flexbatch.models.specs import WeightSpec, weight_specs
from flexbatch.policy.balancer import dealt, spread
from flexbatch.policy.policy import TIERS, Split

SLAB_ALIGNMENT = 256
"""Bytes. Every tensor in a slab starts at a multiple, which is what vector loads and cuBLAS want."""
QUANTIZED_ROLES = re.compile(r"(qkv|q|q_a|q_b|kv_a|k_up|v_up|o|(shared\.|experts\.\d+\.)?(gate_up|up|down))\.weight")
"""The matrices of a decoder layer. Norms, biases, routers, embedding and head keep the compute dtype: they are under
3 % of a large model and the most sensitive part."""
EXPERT_ROLES = re.compile(r"(experts\.\d+)\.(gate_up|down)\.weight")
PRE_ROLES = frozenset(f"{name}.weight" for name in ("qkv", "q", "q_a", "q_b", "kv_a", "k_up"))
"""Those that are multiplied with before attention."""
ABSORBED_ROLES = frozenset({"k_up.weight", "v_up.weight"})
"""Those of latent attention that are not multiplied with rows of tokens."""
GATHERED_ROLES = frozenset({"embed.weight", "pos_embed.weight", "adapters.embed.rows"})
"""Tables whose rows are gathered where they lie; a whole table never crosses the link."""


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor with its placement: ``offset`` is where it starts in the slab of its layer and tier, in bytes."""

    spec: WeightSpec
    tier: str
    bits: int
    group: int
    element_bytes: int
    offset: int = 0
    floats: bool = field(default=False, kw_only=True)
    """MXFP4: codes are floats, and parameters a byte for each group."""

    @property
    def form(self) -> Form:
        return Form(self.bits, self.group, self.floats)

    @property
    def quantized(self) -> bool:
        return self.bits != 16

    def multiplied(self, device: str) -> bool:
        """Whether "cuda" or the "cpu" can multiply tokens with the codes."""
        if self.floats or self.spec.role in ABSORBED_ROLES or self.spec.role.startswith("experts."):
            return False
        return multiplied(self.bits, self.group, self.spec.shape[1], self.element_bytes, device)

    @property
    def codes_shape(self) -> tuple[int, int]:
        rows, columns = self.spec.shape
        return rows, reference.code_bytes(columns, self.bits)

    @property
    def parameters_shape(self) -> tuple[int, ...]:
        rows, columns = self.spec.shape
        groups = reference.num_groups(columns, self.group)
        return (rows, groups) if self.floats else (rows, groups, 2)

    @property
    def dense_bytes(self) -> int:
        return math.prod(self.spec.shape) * (4 if self.spec.wide else self.element_bytes)

    @property
    def codes_bytes(self) -> int:
        return align(math.prod(self.codes_shape), 16)

    @property
    def num_bytes(self) -> int:
        """Bytes in the slab, without alignment."""
        if not self.quantized:
            return self.dense_bytes
        return self.codes_bytes + math.prod(self.parameters_shape) * (1 if self.floats else self.element_bytes)


@dataclass(frozen=True)
class WeightPlan:
    """The placement of every tensor. ``layers[j]`` are the tensors that layer j fetches or holds; ``gathered`` are
    tables outside any layer.

    With tied embeddings the table is a tensor of the head, and its rows are gathered from where it lies as well.
    """

    arch: Arch
    split: Split
    layers: tuple[tuple[PlacedTensor, ...], ...]
    gathered: tuple[PlacedTensor, ...]
    resident: tuple[PlacedTensor, ...]
    """Small tensors of the embedding stage (norm, projection) that stay on the compute device, whatever the split."""
    num_slabs: int = 2
    """Working slabs: layers that are in use or on their way together."""

    @cached_property
    def all_tensors(self) -> tuple[PlacedTensor, ...]:
        return (*self.gathered, *self.resident, *(tensor for layer in self.layers for tensor in layer))

    @cached_property
    def groups(self) -> dict[int, tuple[PlacedTensor, ...]]:
        """What is allocated together: the tensors of every layer, and as -1 those outside of any."""
        return {**dict(enumerate(self.layers)), -1: (*self.gathered, *self.resident)}

    def group_bytes(self, layer: int, tier: str) -> int:
        """What one of the `groups` takes on a tier."""
        return sum(align(each.num_bytes, slab_alignment(tier)) for each in self.groups[layer] if each.tier == tier)

    def layer_bytes(self, layer: int, tier: str) -> int:
        """Length of the slab of one layer on one tier."""
        return self.slab_lengths[tier][layer]

    @cached_property
    def slab_lengths(self) -> dict[str, tuple[int, ...]]:
        """`layer_bytes` of every layer by tier: every fetch asks, several times a tick."""
        return {
            tier: tuple(
                sum(align(tensor.num_bytes, slab_alignment(tier)) for tensor in layer if tensor.tier == tier)
                for layer in self.layers
            )
            for tier in TIERS
        }

    def streamed_bytes(self, layer: int) -> int:
        """Returns the bytes that cross the link for one layer of one pass: the disk part comes first in the working
        slab, then the cpu part."""
        return self.slab_lengths["disk"][layer] + self.slab_lengths["cpu"][layer]

    @cached_property
    def slab_bytes(self) -> int:
        """One working slab: the largest streamed layer."""
        return max(self.streamed_bytes(layer) for layer in range(len(self.layers)))

    @cached_property
    def in_codes(self) -> frozenset[tuple[int, str]]:
        """Layer and role of the experts' matrices that are multiplied as they are stored, and never expanded as a
        whole: those of layers that hold all of a name in one form that the kernels read."""
        found = set()
        for layer, tensors in enumerate(self.layers):
            for name in ("gate_up", "down"):
                mine = [each for each in tensors if is_expert(each.spec.role, name)]
                forms = {(each.form, each.spec.shape[1]) for each in mine}
                if len(forms) == 1 and mine[0].quantized:
                    form, columns = forms.pop()
                    if CodeForm(*form).multiplied(columns):
                        found |= {(layer, each.spec.role) for each in mine}
        return frozenset(found)

    def expanded(self, layer: int, stage: str) -> list[PlacedTensor]:
        """The matrices of a stage of a layer ("pre": before attention, "post": after it) that are multiplied in 16
        bits, and stored in fewer."""
        return [
            each
            for each in self.layers[layer]
            if each.quantized and stage_of(each.spec.role) == stage and (layer, each.spec.role) not in self.in_codes
        ]

    def dequantization_bytes(self, stage: str) -> int:
        """Size of the buffer for the dequantized tensors of one stage of any layer."""
        return max(
            sum(align(tensor.dense_bytes, SLAB_ALIGNMENT) for tensor in self.expanded(layer, stage))
            for layer in range(len(self.layers))
        )

    def tier_bytes(self, tier: str) -> int:
        """All weight bytes on ``tier``."""
        outside = sum(
            align(tensor.num_bytes, slab_alignment(tier))
            for tensor in (*self.gathered, *self.resident)
            if tensor.tier == tier
        )
        return outside + sum(self.layer_bytes(layer, tier) for layer in range(len(self.layers)))

    @cached_property
    def realized_percent(self) -> dict[str, float]:
        """Per cent of the weight bytes on each tier."""
        total = sum(tensor.num_bytes for tensor in self.all_tensors)
        return {
            tier: 100 * sum(tensor.num_bytes for tensor in self.all_tensors if tensor.tier == tier) / total
            for tier in TIERS
        }


def slab_alignment(tier: str) -> int:
    """Bytes at a multiple of which every tensor of a slab on ``tier`` starts."""
    return ALIGNMENT if tier == "disk" else SLAB_ALIGNMENT


def is_expert(role: str, name: str) -> bool:
    """Whether these are the matrices ``name`` of experts."""
    return role.startswith("experts.") and role.endswith(f".{name}.weight")


def stage_of(role: str) -> str:
    """The half of a layer that uses a matrix: "pre", up to attention, or "post"."""
    return "pre" if role in PRE_ROLES else "post"


def plan_weights(
    arch: Arch,
    split: Split,
    bits: int,
    group: int,
    element_bytes: int,
    prequantized: Mapping[str, Form] | None = None,
    num_slabs: int = 2,
    adapters: Sequence[WeightSpec] = (),
) -> WeightPlan:
    """Spread all tensors of the model over the tiers by error diffusion.

    ``prequantized`` maps roles of a checkpoint that is quantized already to their forms, which then win over ``bits``.
    ``adapters``: tensors of adapters, which are never quantized, and lie in host memory where weights lie there or on
    the disk.
    """
    specs = list(weight_specs(arch))
    formats = {spec: tensor_format(spec, bits, group, prequantized or {}) for spec in specs}
    floating = [spec for spec in specs if spec.layer >= 0 or spec.role in GATHERED_ROLES]
    unplaced = [placed_tensor(spec, "gpu", formats[spec], element_bytes) for spec in floating]
    head = arch.num_layers
    tiers = spread_tensors(unplaced, split, arch)
    groups: dict[int, list[PlacedTensor]] = {layer: [] for layer in range(-1, head + 1)}
    offsets: dict[tuple[int, str], int] = {}
    added = [
        PlacedTensor(spec, "gpu", 16, group, element_bytes)
        for spec in adapters
        if spec.layer >= 0 or spec.role in GATHERED_ROLES
    ]
    unplaced += added
    tiers += spread((tensor.num_bytes for tensor in added), Split(split.gpu, 1 - split.gpu))
    for tensor, tier in zip(unplaced, tiers, strict=True):
        spec = tensor.spec
        layer = group_of(spec, arch)
        offset = offsets.get((layer, tier), 0)
        offsets[layer, tier] = offset + align(tensor.num_bytes, slab_alignment(tier))
        groups[layer].append(placed_tensor(spec, tier, tensor.form, element_bytes, offset))
    resident = tuple(
        PlacedTensor(spec, "gpu", 16, group, element_bytes)
        for spec in (*specs, *adapters)
        if spec.layer < 0 and spec.role not in GATHERED_ROLES
    )
    return WeightPlan(
        arch, split, tuple(tuple(groups[layer]) for layer in range(head + 1)), tuple(groups[-1]), resident, num_slabs
    )


def group_of(spec: WeightSpec, arch: Arch) -> int:
    """The layer that a tensor is fetched with: a table of tied embeddings with the head."""
    tied = spec.role == "embed.weight" and arch.tie_word_embeddings
    return arch.num_layers if tied else spec.layer


def spread_tensors(tensors: Sequence[PlacedTensor], split: Split, arch: Arch) -> list[str]:
    """The tier of every tensor. Both matrices of experts go to one, where whoever computes them finds them together.

    As in `footprint.spread_weights`, which counts on it.
    """
    ends = {arch.num_layers: 0, -1: 1}
    parts: list[list[PlacedTensor]] = [[], [], []]
    for each in tensors:
        parts[ends.get(group_of(each.spec, arch), 2)].append(each)
    sizes = [by_piece((tensor.spec, tensor.num_bytes) for tensor in part) for part in parts]
    head, embedding, layers = (list(each.values()) for each in sizes)
    dealt_to = dealt(head, embedding, layers, split)
    tiers = dict(zip((piece for each in sizes for piece in each), (TIERS[tier] for tier in dealt_to), strict=True))
    return [tiers[piece_of(tensor.spec)] for tensor in tensors]


def piece_of(spec: WeightSpec) -> tuple[int, str]:
    """What a tensor is placed with, and its layer."""
    found = EXPERT_ROLES.fullmatch(spec.role)
    return spec.layer, found[1] if found else spec.role


def by_piece(sizes: Iterable[tuple[WeightSpec, int]]) -> dict[tuple[int, str], int]:
    """The sizes of what is placed together, in the order of the first tensor of each."""
    found: dict[tuple[int, str], int] = {}
    for spec, size in sizes:
        found[piece_of(spec)] = found.get(piece_of(spec), 0) + size
    return found


def tensor_format(spec: WeightSpec, bits: int, group: int, prequantized: Mapping[str, Form]) -> Form:
    if spec.role in prequantized:
        return Form(*prequantized[spec.role])
    return Form(bits if QUANTIZED_ROLES.fullmatch(spec.role) and len(spec.shape) == 2 else 16, group)


def placed_tensor(spec: WeightSpec, tier: str, form: Form, element_bytes: int, offset: int = 0) -> PlacedTensor:
    return PlacedTensor(spec, tier, form.bits, form.group, element_bytes, offset, floats=form.floats)
