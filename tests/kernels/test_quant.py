"""Quantization in Triton against the oracle: bit for bit."""

import pytest
import torch

from flexbatch.kernels import reference
from tests.kernels.cases import assert_same_rows, awkward

# The interpreter truncates to bfloat16 where the GPU rounds: that dtype is for the GPU only.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = [((7, 96), 32), ((3, 5, 33), 16), ((2, 130), 64), ((70, 64), 64), ((3, 50), 10)]


@pytest.fixture
def quant(device):
    from flexbatch.kernels import quant

    return quant


def skip_interpreted(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter truncates to bfloat16")


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1
    x[0] = 1.3  # constant groups
    return x.to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "group"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(dtype, shape, group, bits, quant, device):
    skip_interpreted(dtype, device)
    x = values(shape, dtype)
    wanted = reference.quantize(x, bits, group)
    got = quant.quantize(x.to(device), bits, group)
    assert torch.equal(got[0].cpu(), wanted[0])
    assert torch.equal(got[1].cpu(), wanted[1])
    assert torch.equal(
        quant.dequantize(*got, shape[-1], bits, group).cpu(),
        reference.dequantize(*wanted, shape[-1], bits, group),
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "group"), SHAPES)
def test_error_is_half_a_step(shape, group, bits):
    """Of the oracle itself: an element comes back within half a step of its group, the rounding of scale and minimum
    apart."""
    x = values((shape[0] * 9, shape[-1]), torch.float32)
    back = reference.dequantize(*reference.quantize(x, bits, group), x.shape[-1], bits, group)
    extent = torch.stack(
        [
            part.amax(-1, keepdim=True) - part.amin(-1, keepdim=True)
            for part in x.split(group, -1)
            if part.shape[-1] == group
        ]
        or [x.max() - x.min()]
    ).max()
    assert (back - x).abs().max() <= extent / ((1 << bits) - 1) / 2 * 1.001


def squared_error(x, quantized, bits, group):
    return (reference.dequantize(*quantized, x.shape[1], bits, group) - x).square()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "group"), [shape for shape in SHAPES if len(shape[0]) == 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fit_is_never_worse_than_the_range(dtype, shape, group, bits):
    x = values((9 * shape[0], shape[1]), dtype)
    fitted, plain = reference.fit(x, bits, group), reference.quantize(x, bits, group)
    assert [part.shape for part in fitted] == [part.shape for part in plain] and fitted[1].dtype == dtype
    whole = x.shape[1] // group * group  # a short last group counts its padding
    errors = [
        squared_error(x.float(), (codes, parameters.float()), bits, group)[:, :whole].unflatten(1, (-1, group)).sum(-1)
        for codes, parameters in (fitted, plain)
    ]
    assert (errors[0] <= errors[1] * 1.0001 + 1e-9).all()
    assert torch.equal(reference.dequantize(*fitted, shape[1], bits, group)[0], x[0]), (
        "constant groups come back exactly"
    )
    alone = reference.fit(x[5:7], bits, group)
    assert all(torch.equal(one, all_rows[5:7]) for one, all_rows in zip(alone, fitted, strict=True)), (
        "rows do not depend on what is fitted beside them"
    )


def test_a_fit_of_normal_weights_saves_a_sixth_of_the_squared_error():
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(2))
    assert (
        squared_error(x, reference.fit(x, 4, 64), 4, 64).sum()
        < 0.84 * squared_error(x, reference.quantize(x, 4, 64), 4, 64).sum()
    )


def test_an_overflow_stays_visible_in_a_fit(triton_fit, device):
    x = torch.ones(2, 32)
    x[0, 3] = torch.inf
    for codes, parameters in (reference.fit(x, 4, 16), triton_fit(x.to(device), 4, 16)):
        back = reference.dequantize(codes.cpu(), parameters.cpu(), 32, 4, 16)
        assert not back[0, :16].isfinite().all() and torch.equal(back[1], x[1])


@pytest.fixture
def triton_fit(device):
    from flexbatch.kernels import quant_fit

    return quant_fit.fit


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "group"), [shape for shape in SHAPES if len(shape[0]) == 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fit_in_triton_is_as_good(triton_fit, device, dtype, shape, group, bits):
    skip_interpreted(dtype, device)
    x = values((5 * shape[0], shape[1]), dtype)
    wanted, found = reference.fit(x, bits, group), [part.cpu() for part in triton_fit(x.to(device), bits, group)]
    assert [(part.shape, part.dtype) for part in found] == [(part.shape, part.dtype) for part in wanted]
    errors = [
        squared_error(x.float(), (codes, parameters.float()), bits, group).sum(1)
        for codes, parameters in (found, wanted)
    ]
    # A sum that rounds otherwise may lead one group to its neighbor's minimum.
    assert torch.allclose(errors[0], errors[1], rtol=0.15, atol=1e-9)
    assert abs(errors[0].sum() / errors[1].sum() - 1) < 5e-3
    assert torch.equal(reference.dequantize(*found, shape[1], bits, group)[0], x[0]), (
        "constant groups come back exactly"
    )
    near = (
        reference.dequantize(*found, shape[1], bits, group) - reference.dequantize(*wanted, shape[1], bits, group)
    ).abs()
    assert (near > 1e-2 * x.float().std()).float().mean() < 0.02, "other codes in more than a few groups"


def test_dequantize_into_a_slab(quant, device):
    codes, parameters = reference.quantize(values((6, 64), torch.float32), 4, 32)
    slab = torch.zeros(6, 64, device=device)
    assert quant.dequantize(codes.to(device), parameters.to(device), 64, 4, 32, out=slab) is slab
    assert torch.equal(slab.cpu(), reference.dequantize(codes, parameters, 64, 4, 32))


@pytest.mark.parametrize(
    ("heads", "head_dim", "group", "bits"),
    [(3, 64, 32, 4), (2, 80, 64, 4), (1, 33, 16, 8), (2, 16, 64, 8), (2, 24, 8, 16)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_rows(dtype, heads, head_dim, group, bits, quant, device):
    skip_interpreted(dtype, device)
    key, value = values((9, heads, head_dim), dtype), values((10, heads, head_dim), dtype)[1:]
    if bits == 16:
        wanted = torch.zeros(20, 2, heads, head_dim, dtype=dtype)
    else:
        row_bytes = reference.token_bytes(heads, head_dim, bits, group, dtype.itemsize)
        wanted = torch.zeros(20, -(-row_bytes // 4) * 4, dtype=torch.uint8)[:, :row_bytes]
    got, slots = wanted.clone().to(device), torch.randperm(20)[:9]
    if row_misaligned := (
        bits != 16 and (row_bytes % dtype.itemsize or 2 * heads * reference.code_bytes(head_dim, bits) % dtype.itemsize)
    ):
        with pytest.raises(ValueError, match="misaligned"):
            quant.append_rows(got, slots.to(device), key.to(device), value.to(device), bits, group)
    else:
        reference.append_rows(wanted, slots, key, value, bits, group)
        quant.append_rows(got, slots.to(device), key.to(device), value.to(device), bits, group)
        assert torch.equal(got.cpu(), wanted)
    assert not row_misaligned or dtype == torch.float32


@pytest.mark.parametrize(("heads", "head_dim"), [(8, 128), (5, 80), (1, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_rows_takes_slices_of_a_fused_projection(dtype, heads, head_dim, quant, device):
    """Of one layer of several, to which nothing else is written."""
    pool, slots = torch.randn(3, 20, 2, heads, head_dim).to(dtype), torch.randperm(20)[:7]
    fused = torch.randn(7, 5 * heads * head_dim).to(dtype)
    width, got = heads * head_dim, pool.clone().to(device)
    for rows, given, at, append in (
        (pool[1], fused, slots, reference.append_rows),
        (got[1], fused.to(device), slots.to(device), quant.append_rows),
    ):
        key, value = (given[:, i * width : (i + 1) * width].unflatten(1, (heads, head_dim)) for i in (3, 4))
        append(rows, at, key, value)
    assert torch.equal(got.cpu(), pool)
    quant.append_rows(got[1], slots[:0].to(device), *(got[0, :0, 0],) * 2)
    assert torch.equal(got.cpu(), pool)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_rows_of_what_arithmetic_treats_apart(dtype, bits, quant, device):
    skip_interpreted(dtype, device)
    for seed, (heads, head_dim, group) in enumerate([(2, 64, 16), (3, 32, 64), (2, 48, 32)] * 2):
        key, value = (awkward(dtype, (9, heads, head_dim), group, 2 * seed + side) for side in range(2))
        row_bytes = reference.token_bytes(heads, head_dim, bits, group, dtype.itemsize)
        wanted = (
            torch.zeros((12, 2, heads, head_dim), dtype=dtype)
            if bits == 16
            else torch.zeros((12, row_bytes), dtype=torch.uint8)
        )
        got, slots = wanted.clone().to(device), torch.randperm(12)[:9]
        reference.append_rows(wanted, slots, key, value, bits, group)
        quant.append_rows(got, slots.to(device), key.to(device), value.to(device), bits, group)
        assert_same_rows(got.cpu(), wanted, heads, head_dim, bits, group, dtype)


def test_what_is_refused(quant, device):
    x = torch.zeros(17, 64, device=device)
    with pytest.raises(ValueError, match="even number of elements, got 5"):
        quant.quantize(x, 4, 5)
