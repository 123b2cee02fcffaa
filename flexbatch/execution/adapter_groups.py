"""Which tokens of a micro-batch have which adapter, grouped for `ops.low_rank_update`."""

from __future__ import annotations

import numpy as np

from flexbatch.kernels.low_rank_reference import TILE_TOKENS


def group_tokens(adapters: np.ndarray, extra_tiles: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(order, tiles) of tokens with these adapters, 0 for none, which count from 1 here and from 0 in the tiles.
    extra_tiles: empty ones behind the others."""
    order = np.argsort(adapters, kind="stable")
    order = order[np.searchsorted(adapters[order], 1) :].astype(np.int64)
    found, starts, counts = np.unique(adapters[order], return_index=True, return_counts=True)
    per_adapter = -(-counts // TILE_TOKENS)
    owner = np.repeat(np.arange(len(found)), per_adapter)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(per_adapter) - per_adapter, per_adapter)
    first = starts[owner] + within * TILE_TOKENS
    tiles = np.zeros((len(owner) + extra_tiles, 3), dtype=np.int32)
    tiles[: len(owner), 0] = found[owner] - 1
    tiles[: len(owner), 1] = first
    tiles[: len(owner), 2] = np.minimum(first + TILE_TOKENS, (starts + counts)[owner])
    return order, tiles


def most_tiles(tokens: int, adapters: int) -> int:
    """Tiles that so many tokens of so many adapters have, at most."""
    return min(tokens, tokens // TILE_TOKENS + adapters)
