"""Triton products of routed tokens with experts against the loop over the experts: matrices in every form, lying
anywhere, and tokens that go to all experts, to one, or leave some without any."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexbatch.kernels import expert_products, experts, reference
from flexbatch.kernels.expert_codes import CodeForm, ExpertCodes, GatedActivation, stacks_of
from flexbatch.kernels.expert_products import ExpertLaunch

EXPERTS = 7
FORMS = {
    "16 bits": CodeForm(),
    "8 bits": CodeForm(8, 32),
    "4 bits": CodeForm(4, 32),
    "4 bits, large groups": CodeForm(4, 256),
    "mxfp4": CodeForm(4, 32, floats=True),
}
SMALL = ExpertLaunch(rows=32, tokens=16, step=32, warps=4, stages=2)
"""Of codes. 16 bits have 64 bytes in a step, as tensor cores multiply 16 inputs at a time and no fewer."""
GATES = {
    "silu": GatedActivation(),
    "gelu": GatedActivation("gelu"),
    "gelu_tanh": GatedActivation("gelu_tanh"),
    "clamped": GatedActivation("silu", 1.7, 0.8),
}


def stack(form: CodeForm, rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor | ExpertCodes:
    """Random matrices of all experts."""
    random = torch.Generator().manual_seed(seed)
    values = (torch.randn(EXPERTS, rows, columns, generator=random) / columns**0.5).to(dtype)
    if form.bits == 16:
        return values
    if form.floats:
        codes = torch.randint(256, (EXPERTS, rows, columns // 2), generator=random, dtype=torch.uint8)
        scales = torch.randint(116, 126, (EXPERTS, rows, columns // 32), generator=random, dtype=torch.uint8)
        return ExpertCodes(codes, scales, columns, form)
    return ExpertCodes(*reference.quantize(values, form.bits, form.group), columns, form)


def scattered(matrices: torch.Tensor | ExpertCodes, sizes: list[int], device: torch.device) -> list:
    """The matrices as units of ``sizes`` experts that lie apart, the last first, with NaN or codes of ones between."""
    found = []
    for first, size in sorted(zip([0, *torch.tensor(sizes).cumsum(0).tolist()], sizes, strict=False), reverse=True):
        part = slice(first, first + size)
        if isinstance(matrices, torch.Tensor):
            found.append((first, apart(matrices[part], device)))
        else:
            tensors = (apart(each[part], device) for each in (matrices.codes, matrices.parameters))
            found.append((first, ExpertCodes(*tensors, matrices.columns, matrices.form)))
    return found


def apart(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that starts at a multiple of 16 bytes, in a larger piece of memory."""
    before = 64
    filler = 255 if values.dtype == torch.uint8 else torch.nan
    memory = torch.full((values.numel() + 2 * before,), filler, dtype=values.dtype, device=device)
    found = memory[before : before + values.numel()].view(values.shape)
    return found.copy_(values)


def routed(kind: str, tokens: int, choices: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and shares. The first and the last expert have no tokens, or one has all of them."""
    random = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, EXPERTS - 2, generator=random).argsort(1)[:, :choices] + 1
    if kind == "all to one":
        chosen = torch.full_like(chosen, 4)
    return chosen, torch.rand(tokens, choices, generator=random)


@pytest.mark.parametrize(
    ("form", "kind", "tokens", "gate", "sizes"),
    [
        ("16 bits", "some", 19, "clamped", (24, 37)),
        ("16 bits", "all to one", 17, "silu", (33, 50)),
        ("8 bits", "some", 1, "gelu", (64, 80)),
        ("8 bits", "all to one", 17, "clamped", (48, 64)),
        ("4 bits", "some", 19, "silu", (32, 80)),
        ("4 bits", "all to one", 16, "gelu_tanh", (46, 96)),
        ("4 bits, large groups", "some", 9, "silu", (32, 300)),
        ("mxfp4", "some", 19, "clamped", (32, 96)),
        ("mxfp4", "all to one", 33, "silu", (64, 32)),
    ],
)
def test_kernels_equal_the_loop(form, kind, tokens, gate, sizes, device):
    """Sizes: width of an expert, hidden size; not all are multiples of tiles, steps or groups."""
    width, hidden = sizes
    gate_up, down = (
        stack(FORMS[form], rows, columns, torch.float32, seed)
        for rows, columns, seed in ((2 * width, hidden, 1), (hidden, width, 2))
    )
    x, (chosen, shares) = torch.randn(tokens, hidden), routed(kind, tokens, 3)
    biases = torch.randn(EXPERTS, 2 * width) / 4, torch.randn(EXPERTS, hidden) / 4
    wanted = experts.by_loop(x, chosen, shares, stacks_of([(0, gate_up)]), stacks_of([(0, down)]), GATES[gate], biases)
    tables = (stacks_of(scattered(each, cut, device)) for each, cut in ((gate_up, [3, 3, 1]), (down, [1, 4, 2])))
    given = (each.to(device) for each in (x, chosen, shares))
    found = expert_products.expert_mlp(
        *given,
        *tables,
        GATES[gate],
        tuple(each.to(device) for each in biases),
        launch=replace(SMALL, step=64) if form == "16 bits" else SMALL,
    )
    torch.testing.assert_close(found.cpu(), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["8 bits", "4 bits", "mxfp4"])
def test_codes_become_the_numbers_that_expansion_gives(form, dtype, device):
    """Bit for bit: rows of the identity pick single weights."""
    columns = 64
    matrices = stack(FORMS[form], 32, columns, dtype, 3)
    table = stacks_of(scattered(matrices, [4, 3], device))
    chosen = torch.tensor([2, 5]).repeat_interleave(columns).to(device)
    order, tiles = expert_products.tiles_of(chosen, EXPERTS, SMALL.tokens)
    rows = torch.eye(columns, dtype=dtype, device=device).repeat(2, 1)
    if form != "8 bits":
        rows = expert_products.halves(rows)
    found = expert_products.down_rows(rows, order, tiles, table, None, SMALL).view(2, columns, -1).cpu()
    wanted = matrices.dense(dtype)
    assert torch.equal(found, wanted[[2, 5]].transpose(1, 2))


@pytest.mark.parametrize(
    "counts", [[0, 0, 5], [16, 0, 17, 0], [1] * 9, [0, 200, 0, 0, 0, 3], [0], [70]], ids=lambda each: str(sum(each))
)
def test_tiles_hold_every_row_once(counts, device):
    """And each only rows of one expert."""
    chosen = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    chosen = chosen[torch.randperm(len(chosen))].to(device)
    if not len(chosen):
        return
    order, tiles = (each.cpu() for each in expert_products.tiles_of(chosen, len(counts), 16))
    seen = []
    for expert, first, end in tiles.tolist():
        if expert >= 0:
            rows = order[first : min(end, first + 16)]
            assert len(rows) and (chosen.cpu()[rows] == expert).all()
            seen += rows.tolist()
    assert sorted(seen) == list(range(len(chosen))), "every row once"
    assert len(tiles) <= len(chosen) // 16 + len(counts), "no more tiles than there may be"


def test_tokens_do_not_depend_on_their_company(device):
    """The same launch gives a token the same bits, whoever else is there."""
    gate_up, down = stack(FORMS["4 bits"], 64, 64, torch.float32, 1), stack(FORMS["4 bits"], 64, 32, torch.float32, 2)
    tables = [stacks_of(scattered(each, [7], device)) for each in (gate_up, down)]
    x, (chosen, shares) = torch.randn(9, 64), routed("some", 9, 2)
    given = [each.to(device) for each in (x, chosen, shares)]
    whole = expert_products.expert_mlp(*given, *tables, GatedActivation(), launch=SMALL)
    alone = expert_products.expert_mlp(*(each[7:8] for each in given), *tables, GatedActivation(), launch=SMALL)
    assert torch.equal(whole[7:8], alone)


def test_choices_of_experts_that_are_elsewhere_leave_the_others_alone(device):
    """Their number is above those of all experts, and nobody computes them."""
    gate_up, down = stack(FORMS["4 bits"], 64, 64, torch.float32, 1), stack(FORMS["4 bits"], 64, 32, torch.float32, 2)
    tables = [stacks_of(scattered(each, [7], device)) for each in (gate_up, down)]
    x, (chosen, _) = torch.randn(9, 64, device=device), routed("some", 9, 2)
    elsewhere = (chosen == 1) | (chosen == 4)
    every, few = (
        expert_products.routed_rows(x, each.to(device), *tables, GatedActivation(), launch=SMALL).cpu().view(9, 2, -1)
        for each in (chosen, torch.where(elsewhere, EXPERTS, chosen))
    )
    assert elsewhere.any() and torch.equal(few[~elsewhere], every[~elsewhere])


def test_launches_go_by_the_tokens_of_an_expert():
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    found = [expert_products.launch_of(128 * each, 128, 4, x).tokens for each in (1, 4, 16, 17, 64, 256, 1024)]
    assert found == [16, 16, 16, 32, 64, 128, 128]
    assert expert_products.launch_of(3, 128, 16, x).tokens == 16, "fewer rows than experts"


@pytest.mark.parametrize("shared", [48 << 10, 99 << 10, 227 << 10])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_launches_fit_the_memory_that_a_program_may_share(bits, shared, monkeypatch):
    monkeypatch.setattr(expert_products, "shared_bytes", lambda device: shared)
    for tokens in (4, 30, 60, 1000):
        launch = expert_products.launch_of(8 * tokens, 8, bits, torch.ones(1, 1, dtype=torch.float16))
        assert launch.stages * expert_products.stage_bytes(launch, bits, 2) <= shared and launch.stages >= 1


def test_steps_are_no_shorter_than_a_product_of_tensor_cores():
    """The interpreter would multiply them, a GPU does not compile them."""
    gate_up, down = (stack(FORMS["16 bits"], rows, 32, torch.float32, 1) for rows in (64, 32))
    chosen, shares = routed("some", 3, 2)
    with pytest.raises(AssertionError, match="8 inputs"):
        expert_products.expert_mlp(
            torch.randn(3, 32),
            chosen,
            shares,
            stacks_of([(0, gate_up)]),
            stacks_of([(0, down)]),
            GatedActivation(),
            launch=SMALL,
        )


@pytest.mark.parametrize("form", ["16 bits", "mxfp4"])
def test_a_token_that_is_no_number_spoils_no_other(form, device):
    """Though it shares experts, and tiles, with all of them; and one that goes to an expert nobody else has."""
    gate_up, down = (stack(FORMS[form], rows, 32, torch.float32, seed) for rows, seed in ((64, 1), (32, 2)))
    x, (chosen, shares) = torch.randn(18, 32), routed("some", 18, 3)
    tables = [stacks_of(scattered(each, [3, 4], device)) for each in (gate_up, down)]
    launch = replace(SMALL, step=64) if form == "16 bits" else SMALL
    found = []
    for spoilt in (False, True):
        if spoilt:
            x[5], x[11] = torch.nan, torch.inf
            chosen[11, 0] = 0
        given = (each.to(device) for each in (x, chosen, shares))
        found.append(expert_products.expert_mlp(*given, *tables, GatedActivation(), launch=launch).cpu())
    others = [index for index in range(18) if index not in (5, 11)]
    assert torch.equal(found[0][others], found[1][others]) and found[1][others].isfinite().all()
    assert not found[1][[5, 11]].isfinite().all(1).any()
