"""Experts computed in C where they are stored, against the oracle and against experts on the compute device."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels import experts, mxfp4_reference, native, native_experts, reference
from flexbatch.kernels.expert_codes import stacks_of
from flexbatch.kernels.experts_reference import StoredExperts, StoredMatrices, expert_rows

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")
COUNT = 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def stored(
    random: torch.Generator, outputs: int, inputs: int, form: str, group: int, dtype: torch.dtype, here: list[int]
) -> StoredMatrices:
    """Matrices of the experts ``here`` in a form: dense, "4" or "8" bits, or "mxfp4"."""
    dense = {each: torch.randn(outputs, inputs, generator=random) / inputs**0.5 for each in here}
    if form == "dense":
        return StoredMatrices({each: matrix.to(dtype) for each, matrix in dense.items()})
    if form == "mxfp4":
        shape = outputs, inputs // mxfp4_reference.BLOCK
        codes = {each: torch.randint(256, (outputs, inputs // 2), generator=random).byte() for each in here}
        scales = {each: torch.randint(119, 124, shape, generator=random).byte() for each in here}
        return StoredMatrices(codes, scales, 4, mxfp4_reference.BLOCK, floats=True)
    pairs = {each: reference.quantize(matrix.to(dtype), int(form), group) for each, matrix in dense.items()}
    codes, parameters = ({each: pair[side] for each, pair in pairs.items()} for side in (0, 1))
    return StoredMatrices(codes, parameters, int(form), group)


def layer(
    seed: int, hidden: int, width: int, form: str, group: int, dtype: torch.dtype, biased: bool, here: list[int],
    **options: object,
) -> StoredExperts:  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    matrices = [
        stored(random, outputs, inputs, form, group, dtype, here)
        for outputs, inputs in ((2 * width, hidden), (hidden, width))
    ]
    biases = [torch.randn(COUNT, size, generator=random).to(dtype) if biased else None for size in (2 * width, hidden)]
    return StoredExperts(*matrices, hidden, width, gate_up_bias=biases[0], down_bias=biases[1], **options)


ACTIVATIONS = [
    {"activation": "silu"}, {"activation": "relu"}, {"activation": "gelu"}, {"activation": "gelu_tanh"},
    {"limit": 0.7, "gain": 1.702},
]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 3, 7, 130]), hidden=st.integers(1, 70), width=st.integers(1, 40),
    form=st.sampled_from(["dense", "8", "4", "mxfp4"]), group=st.sampled_from([16, 32, 64, 5, 128]),
    dtype=st.sampled_from(list(TOLERANCE)), options=st.sampled_from(ACTIVATIONS), biased=st.booleans(),
    scaled=st.booleans(), one=st.booleans(), long=st.booleans(), whole=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_layer(
    rows: int, hidden: int, width: int, form: str, group: int, dtype: torch.dtype, options: dict, biased: bool,
    scaled: bool, one: bool, long: bool, whole: bool, seed: int,
) -> None:  # fmt: skip
    """Every format and size, also of more inputs than are expanded together, with all rows on one expert or none.
    whole: of sizes that fit matrix tiles."""
    if long:
        hidden += 1000
    if form == "mxfp4" or whole:
        hidden, width = 32 * (hidden // 32 + 1), 32 * (width // 32 + 1)
    experts_here = layer(seed, hidden, width, form, group, dtype, biased, [0, 2, 3], **options)
    random = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(9, hidden, generator=random).to(dtype)
    tokens = torch.randint(9, (rows,), generator=random)
    chosen = torch.full((rows,), 2) if one else torch.tensor([0, 2, 3])[torch.randint(3, (rows,), generator=random)]
    scales = torch.rand(rows, generator=random) if scaled else None
    exact = x.double() if dtype == torch.float32 else x
    wanted = expert_rows(exact, tokens, chosen, widened(experts_here, dtype), scales)
    got = native_experts.expert_rows(
        x, tokens, chosen, native_experts.ExpertTable.of(experts_here, COUNT), scales, threads=2
    )
    size = max(1.0, float(wanted.abs().max())) if rows else 1.0
    assert got.shape == wanted.shape and (got.double() - wanted.double()).abs().le(TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("form", ["dense", "4", "8", "mxfp4"])
@pytest.mark.parametrize("rows", [1, 70])
def test_long_rows(form: str, rows: int) -> None:
    """Of several pieces, each of which has scales of its own; and more rows than share a piece."""
    here = layer(9, 1184, 544, form, 32, torch.float32, True, [1, 4])
    x, tokens = torch.randn(rows, 1184), torch.arange(rows).repeat(2)
    chosen = torch.tensor([1, 4]).repeat_interleave(rows)
    wanted = expert_rows(x.double(), tokens, chosen, widened(here, torch.float32))
    got = native_experts.expert_rows(x, tokens, chosen, native_experts.ExpertTable.of(here, COUNT))
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("scale", [0, 1, 2, 3, 100, 127, 250, 251, 252])
def test_every_scale_of_mxfp4_in_bfloat16(scale: int) -> None:
    """Bit for bit, but that the smallest numbers may count as zeros."""
    codes, scales = {0: torch.arange(512).byte().view(32, 16)}, {0: torch.full((32, 1), scale).byte()}
    one = torch.eye(32, dtype=torch.bfloat16)
    down = StoredMatrices(codes, scales, 4, 32, floats=True)
    here = StoredExperts(StoredMatrices({0: torch.cat([one, one])}), down, 32, 32, "relu")
    wanted = down.dense(0, 32, torch.empty(0)).T
    table = native_experts.ExpertTable.of(here, 1)
    got = native_experts.expert_rows(one, torch.arange(32), torch.zeros(32).long(), table).float()
    seen = wanted.abs() >= 2.0**-126
    assert torch.equal(got[seen], wanted[seen]) and (got[~seen].abs() < 2.0**-126).all()


def widened(layer: StoredExperts, dtype: torch.dtype) -> StoredExperts:
    """Dense, in float64 where the layer is in float32: so that the oracle's own rounding does not count."""
    if dtype != torch.float32:
        return layer
    like = torch.empty(0, dtype=dtype)
    matrices = [
        StoredMatrices({each: stored.dense(each, inputs, like).double() for each in stored.values})
        for stored, inputs in ((layer.gate_up, layer.hidden), (layer.down, layer.width))
    ]
    biases = [None if each is None else each.double() for each in (layer.gate_up_bias, layer.down_bias)]
    return StoredExperts(
        *matrices, layer.hidden, layer.width, layer.activation, layer.gain, layer.limit, biases[0], biases[1]
    )


@pytest.mark.parametrize("form", ["dense", "4", "8", "mxfp4"])
def test_as_on_the_compute_device(form: str) -> None:
    """Sums in the order of the choices equal those of experts that were brought to the device, to 1e-5."""
    hidden, width = 96, 64
    here = layer(3, hidden, width, form, 32, torch.float32, True, list(range(COUNT)), limit=0.7, gain=1.702)
    x, random = torch.randn(40, hidden), torch.Generator().manual_seed(4)
    chosen = torch.rand(40, COUNT, generator=random).argsort(-1)[:, :3]
    shares = torch.rand(40, 3, generator=random)
    stacks = [
        stacks_of([(0, torch.stack([matrices.dense(each, inputs, x) for each in range(COUNT)]))])
        for matrices, inputs in ((here.gate_up, hidden), (here.down, width))
    ]
    activate = partial(reference.clamped_gate, gain=1.702, limit=0.7)
    wanted = experts.by_loop(x, chosen, shares, *stacks, activate, (here.gate_up_bias, here.down_bias))
    table, tokens = native_experts.ExpertTable.of(here, COUNT), torch.arange(40).repeat_interleave(3)
    rows = native_experts.expert_rows(x, tokens, chosen.flatten(), table)
    assert torch.allclose(experts.weighted(rows.view(40, 3, -1), shares), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("hidden", "width"), [(600, 48), (608, 64)], ids=["vectors", "tiles"])
@pytest.mark.parametrize("form", ["dense", "4"])
def test_a_row_does_not_depend_on_its_company(form: str, hidden: int, width: int) -> None:
    """Bit for bit, however many others its expert has, and on however many threads."""
    here = layer(5, hidden, width, form, 64, torch.bfloat16, False, [1])
    table, x = native_experts.ExpertTable.of(here, COUNT), torch.randn(200, hidden).to(torch.bfloat16)
    one = torch.ones(200, dtype=torch.long)
    together = native_experts.expert_rows(x, torch.arange(200), one, table, threads=2)
    for index in (0, 1, 63, 64, 199):
        alone = native_experts.expert_rows(x, torch.tensor([index]), one[:1], table, threads=1)
        assert torch.equal(alone[0], together[index])


def test_a_number_that_is_none_stays_one() -> None:
    for options in ACTIVATIONS:
        here = layer(6, 32, 16, "dense", 16, torch.float32, False, [0], **options)
        x = torch.randn(2, 32)
        x[1, 3] = torch.nan
        rows = native_experts.expert_rows(
            x, torch.arange(2), torch.zeros(2, dtype=torch.long), native_experts.ExpertTable.of(here, COUNT)
        )
        assert rows[0].isfinite().all() and rows[1].isnan().all(), options


def test_an_expert_that_is_elsewhere_is_refused() -> None:
    here = layer(7, 32, 16, "dense", 16, torch.float32, False, [0])
    table = native_experts.ExpertTable.of(here, COUNT)
    with pytest.raises(AssertionError, match="not in host memory"):
        native_experts.expert_rows(torch.randn(1, 32), torch.zeros(1).long(), torch.ones(1).long(), table)
