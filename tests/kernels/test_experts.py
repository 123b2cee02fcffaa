"""Products of routed tokens with experts: the loop against plain arithmetic for each token, whatever stretches the
experts lie in."""

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


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("cut", CUTS)
def test_products_equal_those_of_each_token(cut, tokens):
    x, chosen, shares, gate_up, down = routed(TOKENS[tokens], 3)
    # Gate and up lie in other stretches than down, as they do when they are placed apart.
    parts = units(gate_up, CUTS[cut], True), units(down, CUTS["two"], True)
    found = experts.expert_mlp(x, chosen, shares, *map(stacks_of, parts), SILU)
    torch.testing.assert_close(found, one_by_one(x, chosen, shares, gate_up, down), atol=1e-5, rtol=1e-5)


def test_biases_are_those_of_each_expert():
    """Added to the rows of their experts, of both products; gates and ups have limits here."""
    x, chosen, shares, gate_up, down = routed(9, 3)
    first, second = torch.randn(EXPERTS, 2 * WIDTH), torch.randn(EXPERTS, HIDDEN)
    parts = units(gate_up, CUTS["many"], True), units(down, CUTS["two"], True)
    activate = GatedActivation(gain=1.7, limit=0.8)
    found = experts.expert_mlp(x, chosen, shares, *map(stacks_of, parts), activate, (first, second))
    for token, row in enumerate(x):
        total = torch.zeros(HIDDEN)
        for expert, share in zip(chosen[token].tolist(), shares[token].tolist(), strict=True):
            gate, up = (gate_up[expert] @ row + first[expert]).chunk(2)
            gate, up = gate.clamp(max=0.8), up.clamp(-0.8, 0.8)
            total += share * (down[expert] @ ((up + 1) * gate * torch.sigmoid(1.7 * gate)) + second[expert])
        torch.testing.assert_close(found[token], total, atol=1e-5, rtol=1e-5)


def test_choices_of_experts_that_are_elsewhere_leave_the_others_alone():
    """Their number is above those of all experts, and nobody computes them."""
    x, chosen, _, gate_up, down = routed(9, 3)
    biases = torch.randn(EXPERTS, 2 * WIDTH), torch.randn(EXPERTS, HIDDEN)
    parts = stacks_of(units(gate_up, CUTS["one"], True)), stacks_of(units(down, CUTS["one"], True))
    elsewhere = (chosen == 0) | (chosen == 3)
    every = experts.rows_by_loop(x, chosen, *parts, SILU, biases)
    few = experts.rows_by_loop(x, torch.where(elsewhere, EXPERTS, chosen), *parts, SILU, biases)
    torch.testing.assert_close(few[~elsewhere], every[~elsewhere], atol=1e-6, rtol=1e-6)


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


def test_experts_of_a_layer_are_in_one_form():
    codes = expert_codes.ExpertCodes(
        *reference.quantize(torch.ones(1, 32, 32), 4, 32), 32, expert_codes.CodeForm(4, 32)
    )
    with pytest.raises(AssertionError, match="unlike forms"):
        stacks_of([(0, codes), (1, torch.ones(1, 32, 32))])
