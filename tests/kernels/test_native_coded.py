"""Products with a matrix in codes in C against those with the expanded matrix, on every kind of processor that this
machine can stand for."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from flexbatch.kernels import native, native_coded, ops, reference
from flexbatch.kernels.coded_matrix import CodedMatrix, multiplied

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
KINDS = {
    "this machine": ("-march=native",),
    "without tiles": ("-march=native", "-mno-amx-bf16"),
    "AVX2": ("-march=x86-64-v3",),
    "any": ("-march=x86-64",),
}
SIZES = ((1, 17, 256, 64), (2, 3, 128, 32), (3, 8, 384, 64), (4, 5, 1152, 96), (5, 70, 640, 64), (17, 130, 192, 64),
         (19, 1, 1024, 128), (35, 66, 96, 32), (150, 33, 512, 256), (6, 64, 2304, 768))  # fmt: skip
"""Tokens, rows, columns, group: rows and tokens that fill no panel or tile, columns that fill no piece or unit."""

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@pytest.fixture(scope="module", params=[*list(KINDS)[:-1], pytest.param("any", marks=pytest.mark.slow)])
def loaded(request, tmp_path_factory) -> ctypes.CDLL:
    if request.param == "this machine":
        return native.library()
    folder, here = tmp_path_factory.mktemp("coded"), Path(native.__file__).parent
    flags = [*(flag for flag in native.FLAGS if flag != "-march=native"), *KINDS[request.param]]
    sources = [str(here / f"{name}.c") for name in ("native_coded", "native_coded_tiles")]
    command = [native._compiler(), *flags, "-fopenmp", "-shared", *sources, "-o", str(folder / "coded.so")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"the compiler does not know {request.param}")
    return native.declared(ctypes.CDLL(str(folder / "coded.so")), native.CODED)


def case(tokens: int, rows: int, columns: int, group: int, bits: int, dtype: torch.dtype):
    random = torch.Generator().manual_seed(tokens + columns)
    x = torch.randn(tokens, columns + 5, generator=random).to(dtype)[:, :columns]  # a part of wider rows
    weight, bias = (torch.randn(*shape, generator=random).to(dtype) for shape in ((rows, columns), (rows,)))
    return x, CodedMatrix(*reference.quantize(weight, bits, group), bits, group), bias


def wanted(x: torch.Tensor, matrix: CodedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Of the oracle, in float64."""
    wide = CodedMatrix(matrix.codes, matrix.parameters.double(), matrix.bits, matrix.group)
    return wide.linear(x.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_any_size(loaded, bits, dtype):
    for tokens, rows, columns, group in SIZES:
        x, matrix, bias = case(tokens, rows, columns, group, bits, dtype)
        for threads, given in ((1, bias), (3, None)):
            found, right = native_coded.linear(x, matrix, given, threads, loaded), wanted(x, matrix, given)
            assert found.dtype == dtype and found.shape == (tokens, rows)
            error = (found.double() - right).abs().max() / right.abs().max()
            assert error < TOLERANCES[dtype], (tokens, rows, columns, group, error)


@pytest.mark.parametrize("bits", [4, 8])
def test_as_exact_as_the_library_in_float32(loaded, bits):
    """Against float64 the error is no larger than three times that of the expanded matrix and the library's product."""
    for tokens in (1, 4, 40):
        x, matrix, _ = case(tokens, 128, 2048, 64, bits, torch.float32)
        right = wanted(x, matrix)
        mine, others = (
            (found.double() - right).square().mean().sqrt()
            for found in (native_coded.linear(x, matrix, loaded=loaded), matrix.linear(x))
        )
        assert mine < 3 * others, (tokens, mine, others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_finite_stays_visible(loaded, bits, dtype):
    """In a scale or a minimum it reaches the outputs of its row, in an input those of its token, and no others."""
    for tokens in (1, 3, 20):
        for broken in (float("nan"), float("inf"), -float("inf")):
            x, matrix, bias = case(tokens, 21, 256, 64, bits, dtype)
            matrix.parameters[3, 1, 0] = broken
            matrix.parameters[20, 3, 1] = broken
            found = native_coded.linear(x, matrix, bias, loaded=loaded)
            assert [row for row in range(21) if not found[:, row].isfinite().any()] == [3, 20], (tokens, broken)
            assert found.isfinite().sum() == tokens * 19
            x, matrix, bias = case(tokens, 21, 256, 64, bits, dtype)
            x[tokens - 1, 77] = broken
            found = native_coded.linear(x, matrix, bias, loaded=loaded)
            assert not found[-1].isfinite().any() and found[:-1].isfinite().all(), (tokens, broken)


def test_large_and_small_inputs(loaded):
    """Cut into parts, a number near the largest has finite parts, and one near the smallest is no noise."""
    for tokens in (1, 20):
        x, matrix, _ = case(tokens, 8, 128, 64, 4, torch.float32)
        for size in (1e36, 1e-30):
            found, right = native_coded.linear(x * size, matrix, loaded=loaded), wanted(x * size, matrix)
            torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=float(right.abs().max()) * 1e-5)


def test_a_token_does_not_depend_on_the_others(loaded):
    """Of as many tokens: the same numbers to the last bit, wherever it stands and whatever the others are."""
    x, matrix, bias = case(40, 70, 512, 64, 4, torch.float32)
    found = native_coded.linear(x, matrix, bias, 1, loaded)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(native_coded.linear(x[order].contiguous(), matrix, bias, 2, loaded), found[order])


def test_what_is_called(monkeypatch):
    """`ops.linear` takes C where it reads the form, and the oracle elsewhere; none are multiplied so without C."""
    for group in (64, 16):
        x, matrix, bias = case(3, 40, 256, group, 4, torch.float32)
        assert multiplied(4, group, 256, 4, "cpu") == (group == 64)
        torch.testing.assert_close(ops.linear(x, matrix, bias), matrix.linear(x, bias), rtol=1e-4, atol=1e-4)
    assert multiplied(8, 96, 192, 2, "cpu") and not multiplied(16, 64, 256, 4, "cpu")
    assert not multiplied(8, 64, 96, 4, "cpu")
    assert native_coded.linear(x[:0], case(1, 40, 256, 64, 8, torch.float32)[1]).shape == (0, 40)
    assert native_coded.most_tokens(torch.float32) >= native_coded.most_tokens(torch.bfloat16) > 0
    assert native_coded.most_tokens(torch.float64) == 0
    monkeypatch.setattr(native, "library", lambda: None)
    assert native_coded.most_tokens(torch.float32) == 0
    torch.testing.assert_close(ops.linear(x, matrix, bias), matrix.linear(x, bias))
