"""Products of few tokens with a matrix in codes: what is read is the codes, a quarter or half of the 16 bits that they
would be expanded to, written and read again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.kernels import coded_linear_kernels as kernels
from flexbatch.kernels.attention import multiprocessors_of
from flexbatch.kernels.code_tiles import LIFT
from flexbatch.kernels.coded_matrix import CodedMatrix
from flexbatch.kernels.whole_numbers import ceil_div

MOST_TOKENS = 16
"""For which it is faster than `coded_gemm`: the matrices of a layer of Llama-3-8B with 4 bits took an H100 234 us for
32 tokens where that took 133."""


@dataclass(frozen=True)
class CodedLaunch:
    """Rows of the matrix and tokens of a tile; groups of a step; warps and pipeline depth of a program; programs for
    each multiprocessor that splits of the columns should give."""

    rows: int = 128
    tokens: int = 8
    per_step: int = 2
    warps: int = 4
    stages: int = 3
    depth: int = 4


FEW, SOME = CodedLaunch(), CodedLaunch(64, 16, warps=2, depth=6)
"""For up to 8 tokens, and for more. Of those that were tried (`benchmark.kernel_tuning`), by the matrices of OPT-6.7B
and Llama-3-8B."""


def choose_launch(tokens: int) -> CodedLaunch:
    return FEW if tokens <= 8 else SOME


def choose_splits(
    blocks: int, steps: int, multiprocessors: int, depth: int, least_steps: int = 4, most: int = 16
) -> int:
    """Splits of the columns that give the chip ``depth`` programs a multiprocessor, each of at least so many steps; a
    power of two: a kernel is compiled for each."""
    wanted = max(1, min(depth * multiprocessors // blocks, steps // least_steps, most))
    return 1 << (wanted.bit_length() - 1)


def coded_linear(
    x: Tensor,
    matrix: CodedMatrix,
    bias: Tensor | None = None,
    launch: CodedLaunch | None = None,
    splits: int = 0,
) -> Tensor:
    """`CodedMatrix.linear` of x [tokens, columns]. ``launch``, ``splits``: by the shapes unless given."""
    (tokens, columns), (rows, groups, _) = x.shape, matrix.parameters.shape
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    assert x.stride(1) == 1 and matrix.codes.is_contiguous() and matrix.parameters.is_contiguous()
    launch = launch or choose_launch(tokens)
    blocks = ceil_div(rows, launch.rows) * ceil_div(tokens, launch.tokens)
    per_step = math.gcd(groups, launch.per_step)
    splits = splits or choose_splits(blocks, groups // per_step, multiprocessors_of(x.device), launch.depth)
    arranged = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    sums = torch.empty(groups, tokens, dtype=torch.float32, device=x.device)
    arrivals = torch.empty(blocks, dtype=torch.int32, device=x.device)
    partial = sums if splits == 1 else torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    kernels.arrange_kernel[tokens, groups](
        x, arranged, sums, arrivals, tokens, columns, x.stride(0), blocks, BITS=matrix.bits, GROUP=matrix.group,
        num_warps=1,
    )  # fmt: skip
    kernels.coded_linear_kernel[ceil_div(rows, launch.rows), splits, ceil_div(tokens, launch.tokens)](
        arranged, sums, matrix.words, matrix.parameters.view(torch.int32).view(rows, groups),
        arranged if bias is None else bias,  # not followed then
        partial, arrivals, out, tokens, rows, columns, LIFT, BIASED=bias is not None, BITS=matrix.bits,
        GROUP=matrix.group, BLOCK_R=launch.rows, BLOCK_T=launch.tokens, PER_STEP=per_step, SPLITS=splits,
        STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip
    return out
