"""Which experts are left to the CPU, and that what crosses the link is just the rest."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.memory.cpu_experts import CpuExperts, cut, parts_of
from flexbatch.memory.weight_plan import WeightPlan, plan_weights
from flexbatch.models import readers_experts
from flexbatch.models.quantized.scheme import Form
from flexbatch.policy.policy import Split
from tests.models.test_arch import configuration

EXPERTS, LAYERS = 12, 3


def plan_of(split: Split, bits: int = 16, floats: bool = False) -> WeightPlan:
    config = configuration("qwen3_moe").to_dict() | {
        "num_experts": EXPERTS,
        "num_hidden_layers": LAYERS,
        "mlp_only_layers": [1],
    }
    arch = readers_experts.qwen3_moe(config | {"hidden_size": 64, "moe_intermediate_size": 32})
    roles = (f"experts.{first}.{name}.weight" for first, _ in arch.experts.units for name in ("gate_up", "down"))
    forms = dict.fromkeys(roles, Form(4, 32, True)) if floats else {}
    return plan_weights(arch, split, bits, 16, 2, forms)


@pytest.mark.parametrize("split", [Split(0, 1), Split(0.3, 0.7), Split(0.3, 0.4, 0.3), Split(1, 0), Split(0, 0, 1)])
def test_both_matrices_of_an_expert_lie_together(split: Split) -> None:
    plan = plan_of(split)
    experts = CpuExperts(plan, SimpleNamespace(), 1.0, torch.device("cpu"))
    experts.check()
    for layer, placed in enumerate(plan.layers[:LAYERS]):
        tiers: dict[str, set[str]] = {}
        for tensor in placed:
            tiers.setdefault(tensor.spec.role.rsplit(".", 2)[0], set()).add(tensor.tier)
        assert all(len(found) == 1 for role, found in tiers.items() if role.startswith("experts."))
        here = sum(count for first, count in plan.arch.experts.units if tiers.get(f"experts.{first}") == {"cpu"})
        assert len(experts.here[layer]) == here == len(experts.chosen[layer].experts)


@pytest.mark.parametrize(("bits", "floats"), [(16, False), (8, False), (4, False), (4, True)])
def test_the_least_used_are_left_out_byte_by_byte(bits: int, floats: bool) -> None:
    plan = plan_of(Split(0.2, 0.8), bits, floats)
    experts = CpuExperts(plan, SimpleNamespace(), 0.5, torch.device("cpu"))
    counts = torch.randint(50, (LAYERS, EXPERTS), generator=torch.Generator().manual_seed(1))
    experts.choose(counts)
    experts.check()
    for layer in (0, 2):
        here, chosen = experts.here[layer], experts.chosen[layer].experts
        assert len(chosen) == round(0.5 * len(here)) > 0
        used = {expert: (int(counts[layer, expert]), expert) for expert in here}
        assert max(used[each] for each in chosen) < min(used[each] for each in set(here) - chosen)
        slab = torch.zeros(plan.layer_bytes(layer, "cpu"), dtype=torch.bool)
        for start, end in experts.ranges[layer]:
            slab[start:end] = True
        assert bool(slab.any()) and not slab.all()
        for tensor in (tensor for tensor in plan.layers[layer] if tensor.tier == "cpu"):
            if not tensor.spec.role.startswith("experts."):
                assert slab[tensor.offset : tensor.offset + tensor.num_bytes].all(), tensor.spec.role
        for first, count in plan.arch.experts.units:
            for name in ("gate_up", "down"):
                placed = experts.placed[layer][f"experts.{first}.{name}.weight"]
                for expert in range(first, first + count):
                    for start, end in parts_of(placed, first, count, frozenset([expert])) if expert in here else ():
                        assert slab[start:end].all() == slab[start:end].any() == (expert not in chosen)
    assert not experts.here[1] and experts.ranges[1] == ((0, plan.layer_bytes(1, "cpu")),)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=8, unique=True), st.integers(1, 5))
def test_slices_have_every_byte_once(points: list[int], count: int) -> None:
    ordered = sorted(points)[: len(points) // 2 * 2]
    ranges = tuple(zip(ordered[0::2], ordered[1::2], strict=True))
    total = sum(end - start for start, end in ranges)
    step = -(-total // count)
    parts = [cut(ranges, min(i * step, total), min((i + 1) * step, total)) for i in range(count)]
    found = [byte for part in parts for start, end in part for byte in range(start, end)]
    assert found == [byte for start, end in ranges for byte in range(start, end)]
