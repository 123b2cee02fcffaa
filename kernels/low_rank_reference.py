"""Low-rank updates of many adapters in one call, in plain torch: the oracle of `low_rank`, and what runs on a CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

TILE_TOKENS = 16
"""Rows of one tile, at most: what a tensor core takes at least."""


def low_rank_update(
    out: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    segments: Tensor,
    scales: Tensor,
    sections: Tensor,
    order: Tensor,
    tiles: Tensor,
    max_rank: int,
) -> None:
    """Add ``scale * up @ (down @ x)`` of every token's own adapter to its row of ``out``, in place.

    out: [T, N]. x: [T, K], or int64 [T], which stands for the one-hot rows of an embedding. down: [R, K], the rows of
    all adapters one after another. up: [U], the transposed second factors [rank, columns], flat. segments: int64
    [adapters, parts, 3], (first row of ``down``, rank, first element of ``up``) of the parts of a fused projection; the
    parts of an adapter follow each other in ``down``, and one that it lacks has rank 0. scales: float32 [adapters,
    parts]. sections: int64 [parts, 2], (first column, columns) of every part in ``out``. order: int64 [n], the tokens
    that have an adapter, by adapter. tiles: int32 [m, 3], (adapter, first, end) of at most TILE_TOKENS places of
    ``order``; those without any are skipped. max_rank: of the parts of an adapter together, at most.

    A token's result depends on nothing but the token and its adapter, to the last bits of a matrix product.
    """
    columns = sections.tolist()
    for adapter, first, end in _whole_groups(tiles):
        tokens, parts = order[first:end], segments[adapter].tolist()
        start, stop = parts[0][0], parts[-1][0] + parts[-1][1]
        rows = down[start:stop]
        inner = F.linear(x[tokens], rows) if x.is_floating_point() else rows[:, x[tokens]].t()
        for part, (row, rank, element) in enumerate(parts):
            column, width = columns[part]
            if rank:
                factor = up[element : element + rank * width].view(rank, width).float()
                update = inner[:, row - start : row - start + rank].float() @ factor * scales[adapter, part]
                target = out[:, column : column + width]
                target[tokens] = (target[tokens].float() + update).to(out.dtype)


def replace_columns(
    out: Tensor,
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    segments: Tensor,
    columns: Tensor,
    order: Tensor,
    tiles: Tensor,
    max_rows: int,
) -> None:
    """Compute columns of a product anew, in place, from the rows that a token's own adapter has instead of those of
    the matrix.

    out: [T, N]. x: [T, K]. rows: [R, K], of all adapters one after another, with a bias [R] or none. segments: int64
    [adapters, 2], (first row, rows). columns: int64 [R], that each row computes; those of an adapter differ. order,
    tiles: as `low_rank_update` takes them. max_rows: of an adapter, at most.
    """
    for adapter, first, end in _whole_groups(tiles):
        start, count = segments[adapter].tolist()
        if count:
            tokens, span = order[first:end], slice(start, start + count)
            found = F.linear(x[tokens], rows[span], None if bias is None else bias[span])
            out[tokens[:, None], columns[span]] = found.to(out.dtype)


def _whole_groups(tiles: Tensor) -> list[list[int]]:
    """Tiles of one adapter that follow each other as one: a CPU has no use for tiles of 16 rows."""
    groups: list[list[int]] = []
    for adapter, first, end in tiles.tolist():
        if first == end:
            continue
        if groups and groups[-1][0] == adapter and groups[-1][2] == first:
            groups[-1][2] = end
        else:
            groups.append([adapter, first, end])
    return groups
