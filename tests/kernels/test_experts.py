"""Products of routed tokens with experts: the loop against plain arithmetic for each token, the grouped product against
the loop, whatever stretches the experts lie in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flexbatch.kernels import expert_codes, experts, reference
from flexbatch.kernels.expert_codes import GatedActivation, stacks_of

EXPERTS, WIDTH, HIDDEN = 7, 24, 16
SILU = GatedActivation("silu")
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
    parts = parts if way == "by_groups" else tuple(map(stacks_of, parts))
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
    activate = GatedActivation(gain=1.7, limit=0.8)
    parts = parts if way == "by_groups" else tuple(map(stacks_of, parts))
    found = getattr(experts, way)(x, chosen, shares, *parts, activate, (first, second))
    for token, row in enumerate(x):
        total = torch.zeros(HIDDEN)
        for expert, share in zip(chosen[token].tolist(), shares[token].tolist(), strict=True):
            gate, up = (gate_up[expert] @ row + first[expert]).chunk(2)
            gate, up = gate.clamp(max=0.8), up.clamp(-0.8, 0.8)
            total += share * (down[expert] @ ((up + 1) * gate * torch.sigmoid(1.7 * gate)) + second[expert])
        torch.testing.assert_close(found[token], total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["rows_by_loop", "rows_by_groups"])
def test_choices_of_experts_that_are_elsewhere_leave_the_others_alone(way):
    """Their number is above those of all experts, and nobody computes them."""
    if way == "rows_by_groups" and not grouped_product_here(torch.float32):
        pytest.skip("this torch has no grouped product for processors")
    x, chosen, _, gate_up, down = routed(9, 3)
    biases = torch.randn(EXPERTS, 2 * WIDTH), torch.randn(EXPERTS, HIDDEN)
    parts = units(gate_up, CUTS["one"], True), units(down, CUTS["one"], True)
    parts = parts if way == "rows_by_groups" else tuple(map(stacks_of, parts))
    elsewhere = (chosen == 0) | (chosen == 3)
    every = getattr(experts, way)(x, chosen, *parts, SILU, biases)
    few = getattr(experts, way)(x, torch.where(elsewhere, EXPERTS, chosen), *parts, SILU, biases)
    torch.testing.assert_close(few[~elsewhere], every[~elsewhere], atol=1e-6, rtol=1e-6)


def test_16_bits_of_both_ways_differ_by_rounding_only():
    if not grouped_product_here(torch.bfloat16):
        pytest.skip("this torch has no grouped product for processors")
    x, chosen, shares, gate_up, down = routed(40, 3, dtype=torch.bfloat16)
    parts = units(gate_up, CUTS["many"], True), units(down, CUTS["each"], True)
    loop = experts.by_loop(x, chosen, shares, *map(stacks_of, parts), SILU)
    groups = experts.by_groups(x, chosen, shares, *parts, SILU)
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
    whole = expert_codes.joined(units(stack, [2, 1, 3], False))
    assert len(whole) == 1 and whole[0][0] == 0 and torch.equal(whole[0][1], stack)
    apart = expert_codes.joined(units(stack, [2, 1, 3], True))
    assert [first for first, _ in apart] == [0, 2, 3]
    gap = [(0, stack[:2]), (3, stack[3:])]
    assert [first for first, _ in expert_codes.joined(gap)] == [0, 3], "a gap in numbers is a gap"
    turned = [(0, stack[2:4]), (2, stack[:2])]
    assert len(expert_codes.joined(turned)) == 2, "and so is memory that runs the other way"


@pytest.mark.parametrize(
    ("bits", "tokens", "pieces", "grouped"),
    [(16, 64, 1, True), (16, 63, 1, False), (16, 64, 2, False), (4, 64, 1, False), (4, 1, 2, False)],
)
def test_torch_is_for_16_bits_in_one_piece_and_many_tokens(bits, tokens, pieces, grouped):
    size = 4 // pieces
    parts = [torch.ones(size, 32, 32) for _ in range(pieces)]
    form = expert_codes.CodeForm(bits, 32)
    coded = [expert_codes.ExpertCodes(*reference.quantize(each, 4, 32), 32, form) for each in parts]
    given = [(size * index, each) for index, each in enumerate(parts if bits == 16 else coded)]
    assert experts.is_grouped(4 * tokens, stacks_of(given), stacks_of(given)) == grouped


def test_the_grouped_product_is_for_gpus_and_bfloat16():
    stacks = stacks_of([(0, torch.ones(1, 16, 16, dtype=torch.bfloat16))])
    assert not experts.has_grouped_product(torch.ones(2, 16, dtype=torch.bfloat16), stacks)


def test_experts_of_a_layer_are_in_one_form():
    codes = expert_codes.ExpertCodes(
        *reference.quantize(torch.ones(1, 32, 32), 4, 32), 32, expert_codes.CodeForm(4, 32)
    )
    with pytest.raises(AssertionError, match="unlike forms"):
        stacks_of([(0, codes), (1, torch.ones(1, 32, 32))])
