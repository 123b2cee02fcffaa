"""What `kernel_tuning` tries, and the trials of products of few tokens with a matrix in codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmark.kernel_cases import MIB, Row
from flexbatch.kernels import quant
from flexbatch.kernels.coded_linear import CodedLaunch, choose_launch, coded_linear
from flexbatch.kernels.coded_matrix import CodedMatrix

CODED_LAUNCHES = [  # rows, groups of a step, warps, stages, programs for each multiprocessor
    *((128, 2, 4, stages, depth) for stages, depth in ((3, 4), (2, 6), (3, 2))),
    *((128, 4, 4, stages, depth) for stages, depth in ((2, 4), (3, 4), (2, 2))),
    *((64, 4, 2, stages, depth) for stages, depth in ((2, 8), (3, 6), (2, 4))),
    *((64, 2, 2, stages, depth) for stages, depth in ((3, 6), (2, 10))),
    *((64, per_step, 1, stages, 12) for per_step, stages in ((2, 3), (4, 2))),
    *((32, per_step, 1, stages, 16) for per_step, stages in ((2, 3), (4, 2), (4, 3))),
]
FEW_LAUNCHES = [CODED_LAUNCHES[i] for i in (0, 3, 6, 9)]
CODED_SHAPES = {
    "OPT-6.7B, qkv": (12288, 4096, torch.float16),
    "OPT-6.7B, out": (4096, 4096, torch.float16),
    "OPT-6.7B, up": (16384, 4096, torch.float16),
    "OPT-6.7B, down": (4096, 16384, torch.float16),
    "Llama-3-8B, gate and up": (28672, 4096, torch.bfloat16),
}
BEYOND_CACHE_BYTES = 256 * MIB
"""Of all matrices that a timing goes round: what the caches hold of one is gone when it comes again."""


@dataclass(frozen=True)
class Trial:
    """One configuration: ``work`` is timed, ``error`` compares its result with a reference, ``rate`` turns seconds
    into the fields of a row."""

    row: Row
    work: Callable[[], Any]
    error: Callable[[Any], float]
    rate: Callable[[float], Row]


def difference(wanted: Tensor) -> Callable[[Tensor], float]:
    return lambda got: (got.float() - wanted.float()).abs().max().item()


class Recorded:
    """Works as one CUDA graph, recorded at the first call; a call returns what the first work gave."""

    def __init__(self, works: list[Callable[[], Tensor]]) -> None:
        self.works = works
        self.graph: torch.cuda.CUDAGraph | None = None
        self.results: list[Tensor] = []

    def __call__(self) -> Tensor:
        if self.graph is None:
            for work in self.works[:2]:
                work()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.results = [work() for work in self.works]
        self.graph.replay()
        return self.results[0]


def products(row: Row, wanted: Tensor, num_bytes: int, works: list[Callable[[], Tensor]], count: int) -> Trial:
    """``count`` products of so many bytes each; time and rate are those of one."""

    def rate(took: float) -> Row:
        return {"us_each": took / count * 1e6, "gbps": num_bytes * count / took / 1e9}

    return Trial(row, Recorded(works), difference(wanted), rate)


def coded_trials() -> Iterator[Trial]:
    """Few tokens times a matrix: in 16 bits, in codes as they are stored, and expanded first. Rates count the bytes of
    the matrix as it is stored."""
    for bits in (4, 8):
        for name, (rows, columns, dtype) in CODED_SHAPES.items():
            weight = torch.randn(rows, columns, device="cuda", dtype=dtype)
            codes, parameters = quant.quantize(weight, bits, 64)
            del weight
            stored = codes.nbytes + parameters.nbytes
            copies = -(-BEYOND_CACHE_BYTES // stored)
            matrices = [CodedMatrix(codes.clone(), parameters.clone(), bits, 64) for _ in range(copies)]
            dense = quant.dequantize(codes, parameters, columns, bits, 64)
            whole = [dense.clone() for _ in range(-(-BEYOND_CACHE_BYTES // dense.nbytes))]
            for tokens in (4, 1, 8, 16):
                x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
                wanted = x.float() @ dense.float().t()
                row = {"kernel": "coded", "case": name, "bits": bits, "tokens": tokens}
                if bits == 4:
                    plain: list[Callable[[], Tensor]] = [partial(linear, x, each) for each in whole]
                    yield products(row | {"launch": "16 bits"}, wanted, dense.nbytes, plain, len(plain))
                expand = [partial(expanded, x, each, dense) for each in matrices]
                yield products(row | {"launch": "expanded"}, wanted, stored, [*expand], len(expand))
                for launch in CODED_LAUNCHES if (bits, tokens) == (4, 4) else FEW_LAUNCHES:
                    shape = CodedLaunch(launch[0], choose_launch(tokens).tokens, *launch[1:])
                    direct = [partial(coded_linear, x, each, None, shape) for each in matrices]
                    yield products(row | {"launch": launch}, wanted, stored, [*direct], len(direct))


def expanded(x: Tensor, matrix: CodedMatrix, dense: Tensor) -> Tensor:
    quant.dequantize(matrix.codes, matrix.parameters, dense.shape[1], matrix.bits, matrix.group, out=dense)
    return linear(x, dense)
