"""Rows of the embedding, or of the head, that an adapter has instead of the model's: tables that were trained whole
(``modules_to_save`` of PEFT), and the rows of single tokens (``trainable_token_indices``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from flexbatch.models.source import StoredTensor, read_tensors
from flexbatch.models.specs import Piece, WeightSpec


@dataclass(frozen=True)
class ReplacedRows:
    """What one adapter has instead of rows of a table. weight: [n, width]; bias: [n], both as they are stored. tokens:
    int64, the rows of the table that are replaced, and picked, int64, the rows of ``weight`` that replace them."""

    layer: int
    role: str
    weight: StoredTensor
    bias: StoredTensor | None
    tokens: Tensor = field(compare=False)
    picked: Tensor = field(compare=False)

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def read(self) -> tuple[Tensor, Tensor | None]:
        """The rows [len(tokens), width], and their biases. Copies, in the dtype of the file."""
        stored = [each for each in (self.weight, self.bias) if each is not None]
        values = [value.index_select(0, self.picked) for _, value in read_tensors(stored)]
        return values[0], values[1] if self.bias is not None else None

    def without(self, own: Tensor) -> ReplacedRows:
        """Those that are not the model's own. own: bool, for each of ``tokens``."""
        return replace(self, tokens=self.tokens[~own], picked=self.picked[~own])


@dataclass(frozen=True)
class ReplacedTable:
    """One table with the rows of all adapters, None for those without any. Its tensor holds these rows one after
    another, by adapter; that of a head with biases the biases of all rows behind them."""

    layer: int
    role: str
    parts: tuple[ReplacedRows | None, ...]
    has_bias: bool = False

    @property
    def tensor_role(self) -> str:
        return f"adapters.{self.role}.rows"

    @cached_property
    def counts(self) -> list[int]:
        return [0 if part is None else len(part.tokens) for part in self.parts]

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @property
    def max_rows(self) -> int:
        return max(self.counts)

    @cached_property
    def width(self) -> int:
        return next(part.width for part in self.parts if part is not None)

    @property
    def spec(self) -> WeightSpec:
        """Rows of the embedding are gathered where they lie; the head's cross the link with it."""
        shape = (self.rows, self.width) if self.role == "embed" else (self.rows * (self.width + self.has_bias),)
        return WeightSpec(self.layer, self.tensor_role, shape)

    def segments(self) -> list[tuple[int, int]]:
        """(first row, rows) by adapter."""
        return [(sum(self.counts[:i]), count) for i, count in enumerate(self.counts)]

    def tokens(self) -> Tensor:
        """int64 [rows], the token of every row."""
        return torch.cat([part.tokens for part in self.parts if part is not None])

    def own_biases(self) -> Tensor:
        """bool [rows], whether a row has a bias of its own: the others have the model's, where it has some."""
        return torch.cat([torch.full((len(each.tokens),), each.bias is not None) for each in self.parts if each])

    def slots(self, vocabulary: int) -> Tensor:
        """int32 [adapters + 1, vocabulary]: the row that an adapter has for a token, -1 for the model's own; the first
        line is of no adapter."""
        found = torch.full((len(self.parts) + 1, vocabulary), -1, dtype=torch.int32)
        for line, part, (first, count) in zip(found[1:], self.parts, self.segments(), strict=True):
            if part is not None:
                line[part.tokens] = torch.arange(first, first + count, dtype=torch.int32)
        return found

    def piece(self, dtype: torch.dtype) -> Piece:
        """Its tensor, read from the adapters' files."""
        tensor = torch.empty(self.spec.shape, dtype=dtype)
        flat = tensor.view(-1)
        rows, biases = flat[: self.rows * self.width].view(self.rows, self.width), flat[self.rows * self.width :]
        for part, (first, count) in zip(self.parts, self.segments(), strict=True):
            if part is None:
                continue
            values, bias = part.read()
            rows[first : first + count].copy_(values)
            if self.has_bias:
                biases[first : first + count].copy_(torch.zeros(count) if bias is None else bias)
        return Piece(self.layer, self.tensor_role, None, tensor)


def replaced_tables(replaced: Sequence[Sequence[ReplacedRows]]) -> dict[tuple[int, str], ReplacedTable]:
    """By layer and role, of the rows of every adapter; nothing where no row is another one than the model's."""
    found: dict[tuple[int, str], ReplacedTable] = {}
    for key in sorted({(each.layer, each.role) for rows in replaced for each in rows if len(each.tokens)}):
        parts = tuple(
            next((each for each in rows if (each.layer, each.role) == key and len(each.tokens)), None)
            for rows in replaced
        )
        has_bias = any(part is not None and part.bias is not None for part in parts)
        found[key] = ReplacedTable(*key, parts, has_bias)
    return found
