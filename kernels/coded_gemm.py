"""Products of many tokens with a matrix in codes: what is expanded of it stays in registers, where `quant.dequantize`
and a product would write 16 bits an element and read them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.kernels import coded_gemm_kernels as kernels
from flexbatch.kernels.attention import multiprocessors_of
from flexbatch.kernels.code_tiles import LIFT
from flexbatch.kernels.coded_linear import choose_splits
from flexbatch.kernels.coded_matrix import CodedMatrix
from flexbatch.kernels.whole_numbers import ceil_div

CHUNK = 64
"""Columns that are multiplied in one step, at most: with more, tiles and those on their way exceed shared memory."""
LEAST_STEPS, MOST_SPLITS = 8, 8
"""Of a split of the columns, and of a product."""
ARRANGED, ADDED = 1024, 1024
"""Elements of a program of the kernels before and after."""


@dataclass(frozen=True)
class GemmLaunch:
    """Rows of the matrix and tokens of a tile; warps and pipeline depth of a program; programs of a multiprocessor that
    splits of the columns should give together (0: never split)."""

    rows: int = 128
    tokens: int = 128
    warps: int = 8
    stages: int = 3
    depth: int = 1


FEW = GemmLaunch(128, 32, warps=4, stages=4, depth=3)
SOME, MORE = GemmLaunch(128, 64, depth=2), GemmLaunch(128, 128, depth=2)
MANY = GemmLaunch(64, 256, warps=4, depth=2)
"""For up to 32 tokens, 64 and 128, and for more. Of those that were tried (`benchmark.gemm_trials`), by the sum over
the matrices of Llama-3-8B."""


def choose_launch(tokens: int) -> GemmLaunch:
    if tokens > 128:
        return MANY
    if tokens > 64:
        return MORE
    return SOME if tokens > 32 else FEW


def coded_gemm(
    x: Tensor, matrix: CodedMatrix, bias: Tensor | None = None, launch: GemmLaunch | None = None, splits: int = 0
) -> Tensor:
    """`CodedMatrix.linear` of x [tokens, columns]. ``launch``, ``splits``: by the shapes unless given."""
    (tokens, columns), rows, chunk = x.shape, matrix.codes.shape[0], min(CHUNK, matrix.group)
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    assert x.stride(1) == 1 and matrix.codes.is_contiguous() and matrix.parameters.is_contiguous()
    launch = launch or choose_launch(tokens)
    blocks = ceil_div(tokens, launch.tokens), ceil_div(rows, launch.rows)
    splits = splits or choose_splits(
        blocks[0] * blocks[1], columns // chunk, multiprocessors_of(x.device), launch.depth, LEAST_STEPS, MOST_SPLITS
    )
    arranged = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    kernels.arrange_chunks_kernel[tokens, ceil_div(columns, ARRANGED)](
        x, arranged, columns, x.stride(0), BITS=matrix.bits, CHUNK=chunk, CHUNKS=ARRANGED // chunk, num_warps=4
    )
    target = out if splits == 1 else torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    given, biased = x if bias is None else bias, bias is not None  # x is not followed then
    kernels.coded_gemm_kernel[blocks[0], blocks[1], splits](
        arranged, matrix.words, matrix.parameters, given, target, tokens, rows, columns, LIFT,
        BIASED=biased and splits == 1, BITS=matrix.bits, GROUP=matrix.group, CHUNK=chunk,
        BLOCK_R=launch.rows, BLOCK_T=launch.tokens, SPLITS=splits, STAGES=launch.stages, COMPILED=x.is_cuda,
        num_warps=launch.warps,
    )  # fmt: skip
    if splits > 1:
        kernels.add_splits_kernel[(ceil_div(tokens * rows, ADDED),)](
            target, given, out, tokens * rows, rows, BIASED=biased, SPLITS=splits, BLOCK=ADDED, num_warps=4
        )
    return out
