"""Experts that come as they are hit, byte by byte: all of those that are wanted and nothing else, whatever is hit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.memory.cpu_experts import LeftOut
from flexbatch.memory.hit_experts import HitExperts, leased
from flexbatch.memory.weight_plan import WeightPlan
from flexbatch.policy.policy import Split
from tests.memory.rigs import splits
from tests.memory.test_cpu_experts import EXPERTS, LAYERS, plan_of

CPU = torch.device("cpu")
EMPTY = 255


def left_to_cpu(experts: frozenset[int]) -> LeftOut:
    mask = torch.zeros(EXPERTS, dtype=torch.bool)
    mask[list(experts)] = True
    return LeftOut(experts, mask, mask)


def owners_of(hits: HitExperts, plan: WeightPlan, layer: int) -> torch.Tensor:
    """Of every byte of a layer's slab in host memory its expert, -1 where it is nobody's."""
    owners = torch.full((plan.layer_bytes(layer, "cpu"),), -1)
    for expert, start, end in hits.parts[layer]:
        assert (owners[start:end] == -1).all(), "a byte of two experts"
        owners[start:end] = expert
    return owners


def chosen_by(experts: list[int]) -> torch.Tensor:
    """Choices [T, K] of tokens, one of them twice."""
    return torch.tensor(experts + experts[:1]).view(-1, 1)


@given(
    splits(),
    st.sampled_from([(16, False), (8, False), (4, False), (4, True)]),
    st.lists(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS), min_size=1, max_size=3),
    st.frozensets(st.integers(0, EXPERTS - 1), max_size=4),
)
def test_what_is_hit_comes_and_nothing_else(split, form, micro_batches, elsewhere):
    """By several micro-batches, which may hit the same; experts that the CPU computes stay where they are, on the GPU
    and on the disk there are others."""
    plan = plan_of(split, *form)
    hits = HitExperts(plan, CPU)
    hits.check()
    for layer in range(LAYERS):
        whole = plan.layer_bytes(layer, "cpu")
        lease = leased(0, layer, whole, None, hits)
        assert lease.by_hit is any(
            each.tier == "cpu" and each.spec.role.startswith("experts.") for each in plan.layers[layer]
        )
        if not lease.by_hit:
            assert lease.ranges == ((0, whole),)
            continue
        lease.left_out = left_to_cpu(elsewhere) if elsewhere else None
        owners = owners_of(hits, plan, layer)
        source = torch.randint(0, EMPTY, (whole,), dtype=torch.uint8)
        target = torch.full_like(source, EMPTY)
        crossed = 0
        for experts in micro_batches:
            hits.fetch(lease, layer, source, target, chosen_by(experts))
            crossed += hits.take_bytes()
        wanted = sorted({expert for experts in micro_batches for expert in experts} - elsewhere)
        here = torch.isin(owners, torch.tensor(wanted, dtype=owners.dtype))
        assert torch.equal(target, torch.where(here, source, EMPTY)) and crossed == int(here.sum())
        others = torch.zeros(whole, dtype=torch.bool)
        for start, end in lease.ranges:
            others[start:end] = True
        assert torch.equal(others, owners == -1), "what crosses whatever is hit is all but the experts"


@pytest.mark.parametrize("split", [Split(1, 0), Split(0, 0, 1), Split(0.5, 0, 0.5)])
def test_experts_elsewhere_are_never_fetched(split):
    hits = HitExperts(plan_of(split), CPU)
    assert not any(hits.parts.values())
    hits.check()
    assert hits.take_bytes() == 0


def test_all_experts_left_to_the_cpu_bring_nothing():
    plan = plan_of(Split(0, 1))
    hits = HitExperts(plan, CPU)
    lease = leased(0, 0, plan.layer_bytes(0, "cpu"), None, hits)
    lease.left_out = left_to_cpu(frozenset(range(EXPERTS)))
    source = torch.zeros(plan.layer_bytes(0, "cpu"), dtype=torch.uint8)
    target = torch.full_like(source, EMPTY)
    hits.fetch(lease, 0, source, target, chosen_by(list(range(EXPERTS))))
    assert (target == EMPTY).all() and hits.take_bytes() == 0
