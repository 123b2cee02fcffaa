"""Products of routed tokens with experts: the loop against plain arithmetic for each token, the grouped product against
the loop, whatever stretches the experts lie in."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from flexbatch.kernels import experts, reference

EXPERTS, WIDTH, HIDDEN = 7, 24, 16
SILU = partial(reference.gated_activation, activation="silu")
CUTS = {"one": [7], "two": [3, 4], "many": [1, 2, 1, 3], "each": [1] * 7}
TOKENS = {"one": 1, "few": 5, "many": 150}


def units(stack: torch.Tensor, sizes: list[int], apart: bool) -> list[tuple[int, torch.Tensor]]:
    parts = list(zip(torch.tensor([0, *sizes]).cumsum(0).tolist(), stack.split(sizes), strict=False))
    return [(first, part.clone() if apart else part) for first, part in parts]


def routed(tokens: int, choices: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Distinct experts for every token; the last expert is never chosen, and the first by all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    order = torch.rand(tokens, EXPERTS - 2, generator=generator).argsort(-1)[:, : choices - 1] + 1
    chosen = torch.cat([order, torch.zeros(tokens, 1, dtype=torch.long)], 1)
    gate_up = (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator) / 4).to(dtype)
    down = (torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator) / 4).to(dtype)
    return x, chosen, torch.rand(tokens, choices, generator=generator), gate_up, down


def one_by_one(x, chosen, shares, gate_up, down):
    rows = []
    for token, row in enumerate(x):
        total = torch.zeros(HIDDEN)
        for expert, share in zip(chosen[token].tolist(), shares[token].tolist(), strict=True):
            gate, up = (gate_up[expert] @ row).chunk(2)
            total += share * (down[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def grouped_product_here(dtype: torch.dtype) -> bool:
    product = experts.grouped_mm()
    if product is None:
        return False
    try:
        product(torch.ones(2, 16, dtype=dtype), torch.ones(1, 16, 16, dtype=dtype), offs=torch.tensor([2]).int())
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("way", ["by_loop", "by_groups", "expert_mlp"])
def test_products_equal_those_of_each_token(way, cut, tokens):
    if way == "by_groups" and not grouped_product_here(torch.float32):
        pytest.skip("this torch has no grouped product for processors")
    x, chosen, shares, gate_up, down = routed(TOKENS[tokens], 3)
    # Gate and up lie in other stretches than down, as they do when they are placed apart.
    parts = units(gate_up, CUTS[cut], True), units(down, CUTS["two"], True)
    found = getattr(experts, way)(x, chosen, shares, *parts, SILU)
    torch.testing.assert_close(found, one_by_one(x, chosen, shares, gate_up, down), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["by_loop", "by_groups"])
def test_biases_are_those_of_each_expert(way):
    """Added to the rows of their experts, of both products; gates and ups have limits here."""
    if way == "by_groups" and not grouped_product_here(torch.float32):
        pytest.skip("this torch has no grouped product for processors")
    x, chosen, shares, gate_up, down = routed(9, 3)
    first, second = torch.randn(EXPERTS, 2 * WIDTH), torch.randn(EXPERTS, HIDDEN)
    parts = units(gate_up, CUTS["many"], True), units(down, CUTS["two"], True)
    activate = partial(reference.clamped_gate, gain=1.7, limit=0.8)
    found = getattr(experts, way)(x, chosen, shares, *parts, activate, (first, second))
    for token, row in enumerate(x):
        total = torch.zeros(HIDDEN)
        for expert, share in zip(chosen[token].tolist(), shares[token].tolist(), strict=True):
            gate, up = (gate_up[expert] @ row + first[expert]).chunk(2)
            gate, up = gate.clamp(max=0.8), up.clamp(-0.8, 0.8)
            total += share * (down[expert] @ ((up + 1) * gate * torch.sigmoid(1.7 * gate)) + second[expert])
        torch.testing.assert_close(found[token], total, atol=1e-5, rtol=1e-5)


def test_16_bits_of_both_ways_differ_by_rounding_only():
    if not grouped_product_here(torch.bfloat16):
        pytest.skip("this torch has no grouped product for processors")
    x, chosen, shares, gate_up, down = routed(40, 3, dtype=torch.bfloat16)
    parts = units(gate_up, CUTS["many"], True), units(down, CUTS["each"], True)
    loop, groups = (way(x, chosen, shares, *parts, SILU) for way in (experts.by_loop, experts.by_groups))
    assert loop.dtype == groups.dtype == torch.bfloat16
    torch.testing.assert_close(groups.float(), loop.float(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_go_by_the_order_of_choices(dtype):
    """Large numbers that cancel show any other order, and sums in 16 bits."""
    rows = torch.tensor([[1e4], [1.0], [-1e4]]).view(1, 3, 1).to(dtype)
    shares = torch.ones(1, 3)
    expected = torch.tensor(1e4, dtype=dtype).float() + 1.0 - torch.tensor(1e4, dtype=dtype).float()
    assert experts.weighted(rows, shares).item() == expected.to(dtype).item() == 1.0
    swapped = torch.tensor([[1e8], [-1e8], [1.0]]).view(1, 3, 1)
    assert experts.weighted(swapped, shares).item() == 1.0
    assert experts.weighted(swapped[:, [0, 2, 1]], shares).item() == 0.0


def test_neighbors_are_one_stretch_and_nobody_else():
    stack = torch.arange(2.0 * 3 * 8).view(2, 3, 8).repeat(3, 1, 1)
    whole = experts.joined(units(stack, [2, 1, 3], False))
    assert len(whole) == 1 and whole[0][0] == 0 and torch.equal(whole[0][1], stack)
    apart = experts.joined(units(stack, [2, 1, 3], True))
    assert [first for first, _ in apart] == [0, 2, 3]
    gap = [(0, stack[:2]), (3, stack[3:])]
    assert [first for first, _ in experts.joined(gap)] == [0, 3], "a gap in numbers is a gap"
    turned = [(0, stack[2:4]), (2, stack[:2])]
    assert len(experts.joined(turned)) == 2, "and so is memory that runs the other way"


def test_the_grouped_product_is_for_gpus_and_bfloat16():
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    assert not experts.has_grouped_product(x, [(0, torch.ones(1, 16, 16, dtype=torch.bfloat16))])
