"""Products of many tokens with a matrix in codes against the same with the expanded matrix."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_coded_linear import assert_close, case


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    ("bits", "tokens", "rows", "columns", "group"),
    [(4, 70, 200, 256, 64), (8, 33, 130, 96, 32), (4, 9, 20, 128, 16), (8, 65, 64, 192, 64), (4, 20, 40, 256, 128)],
)
def test_blocks_that_are_not_full(bits, tokens, rows, columns, group, splits, device):
    from flexbatch.kernels import coded_gemm

    launch = coded_gemm.GemmLaunch(64, 64, warps=4)
    x, matrix, bias, wanted = case(tokens, rows, columns, bits, group, torch.float16, device)
    assert_close(coded_gemm.coded_gemm(x, matrix, bias, launch, splits), wanted)
    assert_close(coded_gemm.coded_gemm(x, matrix, None, launch, splits), wanted - bias.float().cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_number_of_tokens(bits, group, dtype):
    from flexbatch.kernels import coded_gemm

    for tokens in (1, 64, 65, 128, 200, 513):
        for rows, columns in ((128, 1024), (4096, 4096), (200, 128 * 37)):
            x, matrix, bias, wanted = case(tokens, rows, columns, bits, group, dtype, "cuda")
            assert_close(coded_gemm.coded_gemm(x, matrix, bias), wanted)


def test_splits_fill_the_chip_and_are_not_short():
    from flexbatch.kernels.coded_gemm import LEAST_STEPS, MOST_SPLITS
    from flexbatch.kernels.coded_linear import choose_splits

    most = LEAST_STEPS, MOST_SPLITS

    assert choose_splits(32, 64, 132, 1, *most) == 4 and choose_splits(224, 64, 132, 1, *most) == 1
    assert choose_splits(1, 32, 132, 1, *most) == 4 and choose_splits(1, 4, 132, 1, *most) == 1
