"""Rotary tables for the positions of a block's sequences, on the gpu tier."""

from __future__ import annotations

import torch

from flexbatch.memory.tiers import Pool
from flexbatch.models.arch import Arch
from flexbatch.models.rope import RopeTables, fill_tables, num_tables

POSITION_STEP = 256
"""Tables hold a multiple of this many positions, so that requests of a stream do not make them grow one by one."""


def table_positions(longest: int, max_positions: int) -> int:
    """Positions of the tables for sequences of ``longest`` tokens, of a model's ``max_positions``."""
    return min(-(-longest // POSITION_STEP) * POSITION_STEP, max_positions)


def table_bytes(arch: Arch, longest: int, dtype: torch.dtype) -> int:
    """Bytes of the tables for sequences of ``longest`` tokens; 0 for a model that does not rotate."""
    return num_tables(arch) * table_positions(longest, arch.max_positions) * (arch.rotary_dim // 2) * dtype.itemsize


class Rotary:
    """The tables for the longest sequence of a block. A model's context may be a thousand times as long, at 256
    bytes a position: 512 MiB for 2 million."""

    def __init__(self, arch: Arch, longest: int, dtype: torch.dtype, gpu: Pool) -> None:
        self.arch, self.dtype, self.gpu = arch, dtype, gpu
        self.num_positions = 0
        self.tables: RopeTables | None = None
        """None when the model does not rotate."""
        self.grow_to(longest)

    def grow_to(self, longest: int) -> bool:
        """Make the tables long enough for sequences of ``longest`` tokens. Returns whether they had to grow: then the
        tables before are gone. The caller has checked the budgets."""
        positions = table_positions(longest, self.arch.max_positions)
        if positions <= self.num_positions:
            return False
        self.close()
        if num_tables(self.arch):
            data = self.gpu.allocate("rotary tables", table_bytes(self.arch, positions, self.dtype)).view(self.dtype)
            self.tables = fill_tables(self.arch, data.view(num_tables(self.arch), positions, -1))
        self.num_positions = positions
        return True

    def check(self) -> None:
        """Invariant: the tables are as long as they say and are accounted for."""
        if self.tables is not None:
            assert len(self.tables.cos) == self.num_positions <= self.arch.max_positions, (
                len(self.tables.cos),
                self.num_positions,
            )
            assert self.gpu.used_bytes["rotary tables"] == table_bytes(self.arch, self.num_positions, self.dtype)

    def close(self) -> None:
        if self.tables is not None:
            self.gpu.free("rotary tables")
        self.tables, self.num_positions = None, 0
