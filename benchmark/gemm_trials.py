"""The trials of products of many tokens with a matrix in codes, for `kernel_tuning`: expanded first, and expanded in
registers (`coded_gemm`). Parts of 12 and 24 MiB that were expanded into the chip's cache and multiplied there one after
another took an H100 longer than expanding whole matrices, at any number of tokens but 64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmark.kernel_cases import Row
from benchmark.kernel_trials import BEYOND_CACHE_BYTES, Recorded, Trial, difference, expanded
from flexbatch.kernels import quant
from flexbatch.kernels.coded_gemm import GemmLaunch, coded_gemm
from flexbatch.kernels.coded_linear import coded_linear
from flexbatch.kernels.coded_matrix import CodedMatrix

GEMM_SHAPES = {"gate and up": (28672, 4096), "down": (4096, 14336), "qkv": (6144, 4096), "out": (4096, 4096)}
"""Llama-3-8B's."""
GEMM_LAUNCHES = {  # by tokens: rows, tokens, warps, stages, programs of a multiprocessor
    16: [(128, 16, 4, 4, 3), (64, 16, 4, 4, 4)],
    32: [(128, 32, 4, 4, 3), (64, 32, 4, 4, 4), (128, 32, 8, 4, 2)],
    64: [(128, 64, 8, 3, 2), (128, 64, 4, 3, 3), (64, 64, 4, 3, 2), (64, 64, 4, 4, 4)],
    128: [(128, 128, 8, 3, 2), (128, 128, 8, 3, 1), (128, 128, 4, 3, 2), (64, 128, 4, 3, 3), (64, 128, 4, 3, 2)],
    256: [
        *((128, 256, 8, stages, 1) for stages in (3, 4)),
        *((64, 256, 4, 3, depth) for depth in (1, 2)),
        *((128, 128, 8, 3, depth) for depth in (1, 2)),
        (128, 128, 4, 3, 2),
        (256, 128, 8, 3, 1),
    ],
    512: [
        *((128, 256, 8, stages, 1) for stages in (3, 4)),
        *((64, 256, 4, 3, depth) for depth in (1, 2)),
        (128, 128, 8, 3, 2),
        (256, 128, 8, 3, 1),
    ],
    1024: [(128, 256, 8, 3, 1), (128, 256, 8, 4, 1), (64, 256, 4, 3, 2), (256, 128, 8, 3, 1)],
}
EIGHT_BITS = (256, 64, 512)


def gemm_trials() -> Iterator[Trial]:
    """The tokens of a block first, then others, then 8 bits."""
    for tokens in (256, 512, 128, 64, 1024, 32, 16):
        for name in GEMM_SHAPES:
            yield from trials_of(name, tokens, 4)
    for tokens in EIGHT_BITS:
        for name in GEMM_SHAPES:
            yield from trials_of(name, tokens, 8)


def trials_of(name: str, tokens: int, bits: int) -> Iterator[Trial]:
    rows, columns = GEMM_SHAPES[name]
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    codes, parameters = quant.quantize(weight, bits, 64)
    copies = -(-BEYOND_CACHE_BYTES // (codes.nbytes + parameters.nbytes))
    matrices = [CodedMatrix(codes.clone(), parameters.clone(), bits, 64) for _ in range(copies)]
    dense = quant.dequantize(codes, parameters, columns, bits, 64)
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    wanted = x.float() @ dense.float().t()

    def trial(launch: object, work: Callable[[Tensor, CodedMatrix], Tensor]) -> Trial:
        row: Row = {"kernel": "gemm", "case": name, "bits": bits, "tokens": tokens, "launch": launch}
        works: list[Callable[[], Tensor]] = [partial(work, x, matrix) for matrix in matrices]

        def rate(took: float) -> Row:
            return {"us_each": took / copies * 1e6, "tflops": 2 * tokens * rows * columns * copies / took / 1e12}

        return Trial(row, Recorded(works), difference(wanted), rate)

    yield trial("expanded", partial(expanded, dense=dense))
    for launch in GEMM_LAUNCHES[tokens]:
        yield trial(launch, partial(coded_gemm, launch=GemmLaunch(*launch)))
    if tokens <= 128:
        yield trial("few", coded_linear)
