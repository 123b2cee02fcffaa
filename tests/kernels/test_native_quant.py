"""Weights in codes, in C: expanded to the last bit as by the oracle, fitted as well as by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels import native, native_quant, ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@settings(deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from((4, 8)),
    group=st.sampled_from((2, 8, 16, 24, 32, 64, 128, 4096)),
    rows=st.integers(1, 19),
    size=st.integers(1, 300),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_expanded_to_the_last_bit(
    dtype: torch.dtype, bits: int, group: int, rows: int, size: int, threads: int, seed: int
) -> None:
    """Products are rounded before they are added, and results once more; codes of all kinds, zero and huge scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (rows, reference.code_bytes(size, bits)), generator=generator, dtype=torch.uint8)
    powers = 10.0 ** torch.randint(-6, 4, (rows, reference.num_groups(size, group), 2), generator=generator)
    parameters = (torch.randn(powers.shape, generator=generator) * powers).to(dtype)
    wanted = reference.dequantize(codes, parameters, size, bits, group)
    slab = torch.full((rows + 2, size), 7.0, dtype=dtype)
    found = native_quant.dequantize(codes, parameters, size, bits, group, slab[1:-1], threads)
    assert torch.equal(found, wanted) and found.data_ptr() == slab[1:].data_ptr()
    assert (slab[0] == 7).all() and (slab[-1] == 7).all(), "nothing is written beside it"
    assert torch.equal(ops.dequantize(codes, parameters, size, bits, group), wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "size", "group"), [(40, 64, 16), (40, 100, 32), (24, 577, 64), (9, 31, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fitted_as_well(dtype: torch.dtype, rows: int, size: int, group: int, bits: int) -> None:
    x = (torch.randn(rows, size, generator=torch.Generator().manual_seed(size)) * 0.02).to(dtype)
    x[0] = 0.5
    wanted, found = reference.fit(x, bits, group), native_quant.fit(x, bits, group, threads=2)
    assert [(part.shape, part.dtype) for part in found] == [(part.shape, part.dtype) for part in wanted]

    def errors(codes: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        back = reference.dequantize(codes, parameters.float(), size, bits, group)
        return (back - x.float()).square().sum(1)

    assert torch.allclose(errors(*found), errors(*wanted), rtol=0.15, atol=1e-9)
    assert abs(errors(*found).sum() / errors(*wanted).sum() - 1) < 5e-3
    assert torch.equal(reference.dequantize(*found, size, bits, group)[0], x[0]), "a constant row comes back exactly"
    assert torch.equal(native_quant.fit(x[5:7], bits, group)[0], found[0][5:7]), "rows do not depend on others"


def test_an_overflow_stays_visible() -> None:
    x = torch.ones(3, 32)
    x[0, 3], x[1, 20] = torch.inf, torch.nan
    back = reference.dequantize(*native_quant.fit(x, 4, 16), 32, 4, 16)
    assert not back[0, :16].isfinite().all() and not back[1, 16:].isfinite().all()
    assert torch.equal(back[2], x[2]) and torch.equal(back[0, 16:], x[0, 16:])
