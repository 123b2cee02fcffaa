"""A matrix in codes that tokens are multiplied with as it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbatch.kernels import reference

BLOCK = 32
"""Codes that processors unpack together."""


@dataclass(frozen=True)
class CodedMatrix:
    """[rows, columns] as codes [rows, bytes] and parameters [rows, groups, 2]: scale and minimum."""

    codes: Tensor
    parameters: Tensor
    bits: int
    group: int

    @cached_property
    def words(self) -> Tensor:
        """The codes as 32-bit words, which kernels on a GPU read."""
        return self.codes.view(torch.int32)

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * 8 // self.bits

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The oracle: x [tokens, columns] times the expanded matrix."""
        dense = reference.dequantize(self.codes, self.parameters, self.columns, self.bits, self.group)
        return F.linear(x, dense, bias)


def multiplied(bits: int, group: int, columns: int, element_bytes: int, device: str = "cuda") -> bool:
    """Whether `coded_linear` reads such a matrix: rows of whole groups, these of a power of two, with parameters of 16
    bits; or `native_coded`, on the "cpu": rows of whole groups, these of whole blocks."""
    if bits not in (4, 8) or columns % group:
        return False
    if device == "cpu":
        return group % BLOCK == 0
    return group & (group - 1) == 0 and 16 <= group <= 256 and element_bytes == 2
