"""MXFP4 as gpt-oss is published: blocks of codes and their scales, of all experts in one tensor each.

`kernels.mxfp4_reference` says what they mean. A store keeps them bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexbatch.kernels import mxfp4_reference
from flexbatch.kernels.mxfp4_reference import BLOCK, NO_SCALE
from flexbatch.models.quantized.scheme import Form, Parts, Rows, Scheme, StoredPart

MXFP4 = Form(4, BLOCK, floats=True)


@dataclass(frozen=True)
class BlockFloats(Scheme):
    """Rows of blocks of 16 bytes, with one scale each."""

    suffixes: ClassVar[tuple[str, ...]] = ("_blocks", "_scales")

    def __str__(self) -> str:
        return "mxfp4"

    @property
    def marks(self) -> tuple[str, ...]:
        return self.suffixes

    def parts(self, rows: int, columns: int) -> dict[str, StoredPart]:
        if columns % BLOCK:
            raise ValueError(f"a matrix [{rows}, {columns}] does not divide into blocks of {BLOCK} inputs")
        return {
            "_blocks": StoredPart(((rows, columns // BLOCK, BLOCK // 2),), ("U8",)),
            "_scales": StoredPart(((rows, columns // BLOCK),), ("U8", "F8_E8M0")),
        }

    def form(self, rows: int, columns: int) -> Form | None:
        return MXFP4

    def codes(self, parts: Parts, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        scales = parts["_scales"].view(torch.uint8)
        if (scales == NO_SCALE).any():
            raise ValueError(f"its scales hold {NO_SCALE}, which makes every weight of the block NaN")
        return parts["_blocks"].flatten(1), scales

    def numbers(self, parts: Parts, rows: int, columns: int) -> Rows:
        codes, scales = self.codes(parts, rows, columns)
        return lambda index: mxfp4_reference.expand(codes[index], scales[index], torch.float32)
