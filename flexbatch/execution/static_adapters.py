"""Adapters of the tokens of CUDA graphs: tensors that stay where they are, and what a pass puts into them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from flexbatch.execution.adapter_groups import most_tiles
from flexbatch.models.lora.applied import PassAdapters

GroupAdapters = Callable[[np.ndarray], PassAdapters | None]
"""Tokens with these adapters, grouped; None where none has one."""


def static_adapters(tokens: int, adapters: PassAdapters | None, device: torch.device) -> PassAdapters | None:
    """For any adapters that so many tokens may have; None where these have none."""
    if adapters is None:
        return None
    tiles = most_tiles(tokens, adapters.tables.num_adapters)
    return PassAdapters(
        adapters.tables,
        torch.zeros(tokens, dtype=torch.int64, device=device),
        torch.zeros(tiles, 3, dtype=torch.int32, device=device),
        torch.zeros(tokens, dtype=torch.int64, device=device),
    )


def fill_adapters(static: PassAdapters | None, adapter_ids: np.ndarray, group_adapters: GroupAdapters) -> None:
    """Put the adapters of a pass's tokens into a graph's tensors. What fills the graph up has the adapter of the first
    token: in a decode graph it repeats this one, and writes the same keys and values."""
    if static is None:
        return
    filling = np.repeat(adapter_ids[:1], len(static.numbers) - len(adapter_ids))
    groups = group_adapters(np.concatenate([adapter_ids, filling]))
    static.tiles.zero_()
    static.numbers.zero_()
    if groups is not None:
        static.tiles[: len(groups.tiles)].copy_(groups.tiles)
        static.order[: len(groups.order)].copy_(groups.order)
        static.numbers.copy_(groups.numbers)
