"""AWQ and GPTQ: int32 words of codes, scales and integer zero points per group of inputs.

weight[n, k] = scale[g, n] * (code[k, n] - zero[g, n]), with g = k // group, or g_idx[k] where GPTQ has taken the inputs
by the size of their activations (``desc_act`` without static groups). GPTQ packs neighboring inputs into words (3 bits
across them), and stores zero points less one, in as many bits: the largest stands for 0; "gptq_v2" stores them as they
are. AWQ's "gemm" packs eight neighboring outputs into a word, interleaved; its "gemv" packs inputs, output by output,
with zero points and scales padded to whole words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexbatch.models.quantized.scheme import (
    SCALE_TYPES,
    Form,
    Parts,
    Rows,
    Scheme,
    StoredPart,
    affine,
    finite,
    row_group,
    unpacked,
)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of the eight outputs of a word its n-th four bits hold (AutoAWQ, "gemm")."""


@dataclass(frozen=True)
class Words(Scheme):
    """group: inputs that share a scale, 0: all of a row."""

    bits: int
    group: int
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    short_last_group: ClassVar[bool] = False
    """Whether the last group of a row may have fewer inputs than the others."""

    @property
    def marks(self) -> tuple[str, ...]:
        return self.suffixes

    def groups(self, columns: int) -> int:
        return -(-columns // (self.group or columns))

    def form(self, rows: int, columns: int) -> Form | None:
        return Form(4 if self.bits <= 4 else 8, self.group or row_group(columns))

    def whole_words(self, rows: int, columns: int) -> None:
        """Raises ValueError."""
        group = self.group or columns
        fields = 32 // self.bits if self.bits != 3 else 32
        if columns % fields or rows % fields or (columns % group and not self.short_last_group):
            raise ValueError(
                f"a matrix [{rows}, {columns}] does not divide into words of {fields} codes and groups of {group} "
                "inputs"
            )

    def unpacked(self, parts: Parts, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [rows, columns] uint8, scales and zero points [rows, groups] float32."""
        raise NotImplementedError

    def codes(self, parts: Parts, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        codes, scale, zero = self.unpacked(parts, rows, columns)
        stored, parameters = affine(codes, scale, zero, 4 if self.bits <= 4 else 8)
        if not self.group:
            parameters = parameters.expand(-1, columns // row_group(columns), -1)
        return stored, parameters

    def numbers(self, parts: Parts, rows: int, columns: int) -> Rows:
        codes, scale, zero = self.unpacked(parts, rows, columns)
        group = group_index(parts, "g_idx", columns, self.group or columns, scale.shape[1])
        return lambda index: (codes[index].float() - zero[index][:, group]) * scale[index][:, group]


@dataclass(frozen=True)
class GPTQ(Words):
    """zero_offset: what is added to a stored zero point. symmetric: they may be missing, and are all one half then.
    reorders: groups take inputs out of their order, which files have to tell."""

    short_last_group: ClassVar[bool] = True
    zero_offset: int = 1
    symmetric: bool = False
    reorders: bool = False

    def __str__(self) -> str:
        return f"gptq in {self.bits} bits and groups of {self.group or 'whole rows'}"

    def parts(self, rows: int, columns: int) -> dict[str, StoredPart]:
        self.whole_words(rows, columns)
        groups = self.groups(columns)
        return {
            "qweight": StoredPart(((columns * self.bits // 32, rows),), ("I32",)),
            "qzeros": StoredPart(((groups, rows * self.bits // 32),), ("I32",), self.symmetric),
            "scales": StoredPart(((groups, rows),), SCALE_TYPES),
            "g_idx": StoredPart(((columns,),), ("I32", "I64"), not self.reorders),
        }

    def unpacked(self, parts: Parts, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = finite(parts["scales"], "scales").t()
        codes = unpacked(parts["qweight"].t(), self.bits)
        if "qzeros" in parts:
            zero = (unpacked(parts["qzeros"], self.bits) + self.zero_offset).bitwise_and_((1 << self.bits) - 1).t()
        else:
            zero = torch.full_like(scale, 1 << (self.bits - 1))
        return codes, scale.contiguous(), zero.float().contiguous()


@dataclass(frozen=True)
class AWQ(Words):
    """By outputs in words ("gemm")."""

    def __str__(self) -> str:
        return f"awq in {self.bits} bits and groups of {self.group or 'whole rows'}"

    def parts(self, rows: int, columns: int) -> dict[str, StoredPart]:
        self.whole_words(rows, columns)
        groups = self.groups(columns)
        return {
            "qweight": StoredPart(((columns, rows // 8),), ("I32",)),
            "qzeros": StoredPart(((groups, rows // 8),), ("I32",)),
            "scales": StoredPart(((groups, rows),), SCALE_TYPES),
        }

    def unpacked(self, parts: Parts, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        position = torch.tensor([AWQ_ORDER.index(output) for output in range(8)])

        def outputs(words: Tensor) -> Tensor:
            return unpacked(words, 4).unflatten(-1, (-1, 8))[..., position].flatten(-2).t().contiguous()

        scale = finite(parts["scales"], "scales").t().contiguous()
        return outputs(parts["qweight"]), scale, outputs(parts["qzeros"]).float()


@dataclass(frozen=True)
class AWQByInputs(Words):
    """AWQ's "gemv": rows of words of eight neighboring inputs."""

    def __str__(self) -> str:
        return f"awq (gemv) in {self.bits} bits and groups of {self.group or 'whole rows'}"

    def words_of_zeros(self, columns: int) -> int:
        """Of a row: enough for its groups, in steps that depend on their size (AutoAWQ, calculate_zeros_width)."""
        group = self.group or columns
        step = 1 if group >= 128 else 2 if group == 64 else 4
        return math.ceil(columns // group / 8 / step) * step

    def parts(self, rows: int, columns: int) -> dict[str, StoredPart]:
        self.whole_words(rows, columns)
        words = self.words_of_zeros(columns)
        return {
            "qweight": StoredPart(((rows, columns // 8),), ("I32",)),
            "qzeros": StoredPart(((rows, words),), ("I32",)),
            "scales": StoredPart(((rows, 8 * words),), SCALE_TYPES),
        }

    def unpacked(self, parts: Parts, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        groups = self.groups(columns)
        scale = finite(parts["scales"][:, :groups], "scales")
        return unpacked(parts["qweight"], 4), scale, unpacked(parts["qzeros"], 4)[:, :groups].float().contiguous()


def group_index(parts: Parts, name: str, columns: int, group: int, groups: int) -> Tensor:
    """The group of every input. Raises ValueError for one that does not exist."""
    if name not in parts:
        return torch.arange(columns) // group
    index = parts[name].long()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise ValueError(f"{name} names groups {int(index.min())} to {int(index.max())}; there are {groups}, from 0 on")
    return index


def in_order(index: Tensor, group: int) -> bool:
    """Whether groups are neighboring inputs."""
    return torch.equal(index.long(), torch.arange(index.numel()) // group)
