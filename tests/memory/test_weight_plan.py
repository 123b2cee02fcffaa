"""The weight plan: every tensor once, within one tensor of the split, in slabs without overlap."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.memory.weight_plan import (
    GATHERED_ROLES,
    QUANTIZED_ROLES,
    SLAB_ALIGNMENT,
    WeightPlan,
    plan_weights,
    slab_alignment,
    stage_of,
)
from flexbatch.models import families
from flexbatch.models.shapes import shape
from flexbatch.models.specs import weight_specs
from flexbatch.policy.balancer import dealt
from flexbatch.policy.policy import TIERS, Split
from tests.memory.rigs import splits, tiny_arch
from tests.models.test_arch import configuration


@st.composite
def plans(draw: st.DrawFn) -> WeightPlan:
    arch = tiny_arch(draw(st.integers(1, 5)), draw(st.booleans()))
    bits, group = draw(st.sampled_from([(16, 64), (8, 64), (4, 64), (4, 7), (8, 1)]))
    prequantized = draw(st.sampled_from([None, {"qkv.weight": (4, 16)}, {"o.weight": (8, 4), "down.weight": (4, 32)}]))
    return plan_weights(arch, draw(splits()), bits, group, draw(st.sampled_from([2, 4])), prequantized)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_tensor_has_one_home_within_one_tensor_of_the_split(plan: WeightPlan) -> None:
    tensors = plan.all_tensors
    assert sorted((t.spec.layer, t.spec.role) for t in tensors) == sorted(
        (spec.layer, spec.role) for spec in weight_specs(plan.arch)
    )
    placed = [t for t in tensors if t not in plan.resident]
    total = sum(t.num_bytes for t in placed)
    for tier, part in zip(TIERS, plan.split.fractions, strict=True):
        there = sum(t.num_bytes for t in placed if t.tier == tier)
        assert abs(there - part * total) <= max(t.num_bytes for t in placed) + 1e-6
    assert sum(plan.realized_percent.values()) == pytest.approx(100)
    whole = sum(t.num_bytes for t in tensors)
    for tier, percent in plan.realized_percent.items():
        assert percent == pytest.approx(100 * sum(t.num_bytes for t in tensors if t.tier == tier) / whole)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_slabs_are_aligned_without_overlap_and_as_long_as_said(plan: WeightPlan) -> None:
    for layer, tensors in enumerate(plan.layers):
        for tier in TIERS:
            there = sorted((t for t in tensors if t.tier == tier), key=lambda t: t.offset)
            assert all(t.offset % slab_alignment(tier) == 0 for t in there)
            assert all(first.offset + first.num_bytes <= second.offset for first, second in pairwise(there))
            end = there[-1].offset + there[-1].num_bytes if there else 0
            assert end <= plan.layer_bytes(layer, tier) < end + slab_alignment(tier)
        assert (
            plan.streamed_bytes(layer)
            == plan.layer_bytes(layer, "disk") + plan.layer_bytes(layer, "cpu")
            <= plan.slab_bytes
        )
    for tier in TIERS:
        least = sum(t.num_bytes for t in plan.all_tensors if t.tier == tier)
        assert least <= plan.tier_bytes(tier) <= least + len(plan.all_tensors) * slab_alignment(tier)


@settings(max_examples=40, deadline=None)
@given(plans())
def test_matrices_of_blocks_alone_are_quantized_and_tables_alone_gathered(plan: WeightPlan) -> None:
    for tensor in plan.all_tensors:
        assert not tensor.quantized or QUANTIZED_ROLES.fullmatch(tensor.spec.role)
        dense = tensor.spec.numel * tensor.element_bytes
        assert tensor.dense_bytes == dense and (tensor.quantized or tensor.num_bytes == dense)
    assert {t.spec.role for t in plan.gathered} <= GATHERED_ROLES
    if plan.arch.tie_word_embeddings:
        assert "embed.weight" in {t.spec.role for t in plan.layers[-1]}
    for stage in ("pre", "post"):
        needed = [
            sum(t.dense_bytes for t in layer if t.quantized and stage_of(t.spec.role) == stage) for layer in plan.layers
        ]
        most = max(needed) + SLAB_ALIGNMENT * max(map(len, plan.layers))
        assert max(needed) <= plan.dequantization_bytes(stage) <= most


@pytest.mark.parametrize(("gpu", "cpu"), [(20, 80), (10, 90), (0, 100), (37, 21), (0, 0)])
def test_layers_of_a_large_model_carry_like_shares(gpu: float, cpu: float) -> None:
    """The traffic of a pass is even: FlexGen's rule, by contrast, puts 8 % of OPT-30B on the GPU for 20 80."""
    split = Split.from_percent(gpu, cpu)
    plan = plan_weights(shape("opt-30b"), split, 16, 64, 2)
    for tier, part in zip(TIERS, split.fractions, strict=True):
        assert plan.realized_percent[tier] == pytest.approx(100 * part, abs=100 * 4 * 7168**2 * 2 / 60e9)
    biggest = max(t.num_bytes for t in plan.layers[0])
    layer_bytes = sum(t.num_bytes for t in plan.layers[0])
    for layer in range(plan.arch.num_layers):
        for tier, part in zip(TIERS, split.fractions, strict=True):
            assert (
                abs(sum(t.num_bytes for t in plan.layers[layer] if t.tier == tier) - part * layer_bytes) <= 2 * biggest
            )


@pytest.mark.parametrize(
    ("group", "prequantized", "coded"),
    [
        (32, {}, {"gate_up", "down"}),
        (24, {}, set()),
        (32, {"experts.1.gate_up.weight": (8, 32)}, {"down"}),
        (32, {"experts.0.down.weight": (16, 32)}, {"gate_up"}),
    ],
)
def test_experts_are_multiplied_in_codes_where_all_of_a_layer_are_in_one_form(group, prequantized, coded):
    """And are in no buffer then; groups that are no power of two are not for the kernels."""
    arch = families.read_arch(configuration("mixtral").to_dict())
    plan = plan_weights(arch, Split(0, 1), 4, group, 2, prequantized)
    names = {role.split(".")[2] for _, role in plan.in_codes}
    assert names == coded
    for layer, tensors in enumerate(plan.layers[:-1]):
        for tensor in tensors:
            kept = (layer, tensor.spec.role) in plan.in_codes
            assert kept == (tensor.spec.role.startswith("experts.") and tensor.spec.role.split(".")[2] in coded)
            assert (tensor in plan.expanded(layer, stage_of(tensor.spec.role))) == (tensor.quantized and not kept)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 50), max_size=3),
    st.lists(st.integers(1, 50), max_size=3),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 8),
    splits(),
)
def test_a_head_is_resident_and_layers_share_what_is_left(head, embedding, layer, layers, split) -> None:
    """Whatever sizes the ends have: what a large head takes of the gpu tier's share is not taken from a few layers."""
    found = dealt(head, embedding, layer * layers, split)
    sizes = [*head, *embedding, *layer * layers]
    total = sum(sizes)
    if sum(head) <= split.gpu * total:
        assert found[: len(head)] == [0] * len(head)
    for tier, share in enumerate(split.fractions):
        there = sum(size for size, at in zip(sizes, found, strict=True) if at == tier)
        assert abs(there - share * total) <= sum(head) + sum(embedding) + max(layer)
        assert there == 0 or share > 0
        by_layer = [
            sum(size for size, at in zip(layer, found[start : start + len(layer)], strict=True) if at == tier)
            for start in range(len(head) + len(embedding), len(found), len(layer))
        ]
        assert max(by_layer) - min(by_layer) <= 3 * max(layer)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3-8b", "opt-1.3b", "opt-30b"])
def test_the_head_of_a_streamed_model_needs_no_slab(name: str) -> None:
    """Slabs of Llama-3-8B were 2 GiB for a head of 1, of which every pass read half."""
    arch = shape(name)
    plan = plan_weights(arch, Split(0.5, 0.5), 16, 64, 2)
    assert plan.streamed_bytes(arch.num_layers) == 0
    assert plan.slab_bytes <= 0.75 * sum(t.num_bytes for t in plan.layers[0])
    none = plan_weights(arch, Split(0, 1), 16, 64, 2)
    assert none.streamed_bytes(arch.num_layers) == none.slab_bytes or name == "opt-30b"
