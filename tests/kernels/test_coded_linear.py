"""Products with a matrix in codes against the same with the expanded matrix."""

from __future__ import annotations

import pytest
import torch

from flexbatch.kernels import ops, reference
from flexbatch.kernels.coded_matrix import CodedMatrix, multiplied


def case(tokens, rows, columns, bits, group, dtype, device):
    random = torch.Generator().manual_seed(tokens + columns)
    x = torch.randn(tokens, columns + 32, generator=random).to(dtype)[:, :columns]  # a part of wider rows
    weight, bias = (torch.randn(*shape, generator=random).to(dtype) for shape in ((rows, columns), (rows,)))
    codes, parameters = reference.quantize(weight, bits, group)
    wanted = CodedMatrix(codes, parameters.float(), bits, group).linear(x.float(), bias.float())
    return x.to(device), CodedMatrix(codes.to(device), parameters.to(device), bits, group), bias.to(device), wanted


def assert_close(got, wanted):
    """Within the rounding of the result and of the parameters' products."""
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[got.dtype]
    torch.testing.assert_close(got.float().cpu(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("per_step", [1, 2, 4])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    ("bits", "tokens", "rows", "columns", "group"), [(4, 5, 40, 256, 64), (8, 3, 130, 96, 32), (4, 9, 20, 128, 16)]
)
def test_a_few_tokens(bits, tokens, rows, columns, group, splits, per_step, device):
    from flexbatch.kernels import coded_linear

    launch = coded_linear.CodedLaunch(tokens=16, per_step=per_step)
    x, matrix, bias, wanted = case(tokens, rows, columns, bits, group, torch.float16, device)
    got = coded_linear.coded_linear(x, matrix, bias, launch, splits)
    assert_close(got, wanted)
    assert_close(coded_linear.coded_linear(x, matrix, None, launch, splits), wanted - bias.float().cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_number_of_tokens(bits, group, dtype):
    for tokens in (1, 2, 4, 7, 8, 9, 16, 17, 33, 64):
        for rows, columns in ((128, 1024), (4096, 4096), (200, 64 * 37)):
            x, matrix, bias, wanted = case(tokens, rows, columns, bits, group, dtype, "cuda")
            assert_close(ops.linear(x, matrix, bias), wanted)


def test_which_matrices_are_multiplied():
    assert multiplied(4, 64, 4096, 2) and multiplied(8, 16, 48, 2)
    for refused in ((16, 64, 4096, 2), (4, 48, 4800, 2), (4, 64, 4100, 2), (4, 64, 4096, 4), (4, 8, 4096, 2)):
        assert not multiplied(*refused), refused
