"""One adapter for everything: added to the weights on their way to their tiers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from flexbatch.models.lora.adapter import Adapter, LowRank
from flexbatch.models.lora.adapter_set import AdapterSet
from flexbatch.models.quantized.scheme import QuantizedPiece
from flexbatch.models.specs import Piece

CHUNK_BYTES = 32 << 20
"""Of float32 rows that are added at a time."""


def merged(
    pieces: Iterable[Piece | QuantizedPiece], adapter: Adapter, dtype: torch.dtype
) -> Iterator[Piece | QuantizedPiece]:
    """The pieces of a checkpoint with an adapter added to them: summed in float32, and rounded once to ``dtype``."""
    matrices = AdapterSet(adapter.arch, (adapter,)).matrices
    for piece in with_rows(pieces, adapter, dtype):
        role = piece.role.removesuffix(".weight")
        matrix = matrices.get((piece.layer, role)) if piece.role.endswith(".weight") else None
        if matrix is None or not isinstance(piece, Piece):
            yield piece
            continue
        first = 0 if piece.rows is None else piece.rows.start
        tensor = piece.tensor.to(dtype, copy=True)
        (updates,) = matrix.updates
        for update, (start, _) in zip(updates, matrix.sections(), strict=True):
            if update is not None:
                _add(tensor, piece.tensor, update, adapter, (0 if role == "embed" else start) - first)
        yield Piece(piece.layer, piece.role, piece.rows, tensor)


def with_rows(
    pieces: Iterable[Piece | QuantizedPiece], adapter: Adapter, dtype: torch.dtype
) -> Iterator[Piece | QuantizedPiece]:
    """The pieces with the rows of embedding and head that the adapter has instead."""
    by_role = {(each.layer, f"{each.role}.{kind}"): each for each in adapter.replaced for kind in ("weight", "bias")}
    for piece in pieces:
        rows = by_role.get((piece.layer, piece.role))
        if rows is None or not isinstance(piece, Piece):
            yield piece
            continue
        weight, bias = rows.read()
        values = weight if piece.role.endswith(".weight") else bias
        if values is None:
            yield piece
            continue
        first = 0 if piece.rows is None else piece.rows.start
        tensor = piece.tensor.to(torch.promote_types(piece.tensor.dtype, values.dtype), copy=True)
        within = (rows.tokens >= first) & (rows.tokens < first + len(tensor))
        tensor[rows.tokens[within] - first] = values[within].to(tensor.dtype)
        yield replace(piece, tensor=tensor)


def _add(target: Tensor, source: Tensor, update: LowRank, adapter: Adapter, start: int) -> None:
    """Add an update to the rows of a piece from ``start`` on, as far as the piece has them. Rows of an embedding are
    its inputs."""
    down, up = (factor.float() for factor in update.factors(adapter.arch))
    left, right = (down.t(), up.t()) if update.role == "embed" else (up, down)
    begin, end = max(0, start), min(len(target), start + len(left))
    step = max(1, CHUNK_BYTES // (4 * target.shape[1]))
    for row in range(begin, end, step):
        rows = slice(row, min(row + step, end))
        part = left[rows.start - start : rows.stop - start] @ right * update.scale
        target[rows].copy_(source[rows].float() + part)
