"""Adapters in a pass: small tables on the compute device, and their update of one product after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.models.lora.adapter_set import AdaptedMatrix, AdapterSet, Key


@dataclass(frozen=True)
class MatrixTables:
    """What `ops.low_rank_update` needs to know of one matrix, on the compute device."""

    matrix: AdaptedMatrix
    rows: int
    max_rank: int
    segments: Tensor
    scales: Tensor
    sections: Tensor


class AdapterTables:
    """By (layer, role); the tensors of the adapters themselves come with the layer's weights."""

    def __init__(self, adapters: AdapterSet, device: torch.device) -> None:
        self.num_adapters, self.num_layers = len(adapters.adapters), adapters.arch.num_layers
        self.tables: dict[Key, MatrixTables] = {
            key: MatrixTables(
                matrix,
                matrix.rows,
                matrix.max_rank,
                torch.tensor(matrix.segments(), dtype=torch.int64, device=device),
                torch.tensor(matrix.scales(), dtype=torch.float32, device=device),
                torch.tensor(matrix.sections(), dtype=torch.int64, device=device),
            )
            for key, matrix in adapters.matrices.items()
        }
        self.in_head = any(layer == self.num_layers for layer, _ in self.tables)
        """Whether any adapts what comes after the last layer."""


@dataclass(frozen=True)
class PassAdapters:
    """The tokens of one micro-batch by their adapters. order, tiles: see `ops.low_rank_update`."""

    tables: AdapterTables
    order: Tensor
    tiles: Tensor

    def add(self, layer: int, role: str, weights: Mapping[str, Tensor], x: Tensor, out: Tensor) -> None:
        """Add every token's update of a matrix to ``out`` [T, N], the product of ``x`` [T, K] with it; of the
        embedding, x is the token ids [T]."""
        found = self.tables.tables.get((layer, role))
        if found is None:
            return
        flat = weights[found.matrix.tensor_role]
        cut = found.rows * found.matrix.inputs
        down, up = flat[:cut].view(found.rows, found.matrix.inputs), flat[cut:]
        tables = found.segments, found.scales, found.sections
        ops.low_rank_update(out, x, down, up, *tables, self.order, self.tiles, found.max_rank)
