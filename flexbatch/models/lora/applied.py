"""Adapters in a pass: small tables on the compute device, and their update of one product after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.models.lora.adapter_set import AdaptedMatrix, AdapterSet, Key
from flexbatch.models.lora.replaced import ReplacedTable


@dataclass(frozen=True)
class MatrixTables:
    """What `ops.low_rank_update` needs to know of one matrix, on the compute device."""

    matrix: AdaptedMatrix
    rows: int
    max_rank: int
    segments: Tensor
    scales: Tensor
    sections: Tensor


class HeadRows:
    """What `ops.replace_columns` needs to know of the rows of the head that adapters replace."""

    def __init__(self, table: ReplacedTable, device: torch.device) -> None:
        self.table, self.max_rows = table, table.max_rows
        self.segments = torch.tensor(table.segments(), dtype=torch.int64, device=device)
        self.columns, self.own_biases = table.tokens().to(device), table.own_biases().to(device)

    def replace(self, weights: Mapping[str, Tensor], x: Tensor, out: Tensor, order: Tensor, tiles: Tensor) -> None:
        flat, cut = weights[self.table.tensor_role], self.table.rows * self.table.width
        rows, bias = flat[:cut].view(self.table.rows, self.table.width), None
        if (models := weights.get("head.bias")) is not None:
            bias = models.index_select(0, self.columns)
            bias = torch.where(self.own_biases, flat[cut:], bias) if self.table.has_bias else bias
        ops.replace_columns(out, x, rows, bias, self.segments, self.columns, order, tiles, self.max_rows)


class EmbeddingRows:
    """Which row of their tensor the adapters have for a token, on the host and on the compute device: it is gathered
    where it lies, as the model's own table is."""

    def __init__(self, table: ReplacedTable, vocabulary: int, device: torch.device) -> None:
        self.role, self.host_slots = table.tensor_role, table.slots(vocabulary)
        self.slots = self.host_slots.to(device)


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
        head, embedding = adapters.replaced.get((self.num_layers, "head")), adapters.replaced.get((-1, "embed"))
        self.head_rows = None if head is None else HeadRows(head, device)
        self.embedding_rows = None if embedding is None else EmbeddingRows(embedding, adapters.arch.vocab_size, device)
        self.in_head = head is not None or any(layer == self.num_layers for layer, _ in self.tables)
        """Whether any adapts what comes after the last layer."""


@dataclass(frozen=True)
class PassAdapters:
    """The tokens of one micro-batch by their adapters. order, tiles: see `ops.low_rank_update`. numbers: [T] int64, of
    the tokens' adapters, 0 for none."""

    tables: AdapterTables
    order: Tensor
    tiles: Tensor
    numbers: Tensor

    def add(self, layer: int, role: str, weights: Mapping[str, Tensor], x: Tensor, out: Tensor) -> None:
        """Add every token's update of a matrix to ``out`` [T, N], the product of ``x`` [T, K] with it; of the
        embedding, x is the token ids [T]. Columns of the head that an adapter replaces are computed anew before."""
        if role == "head" and self.tables.head_rows is not None:
            self.tables.head_rows.replace(weights, x, out, self.order, self.tiles)
        found = self.tables.tables.get((layer, role))
        if found is None:
            return
        flat = weights[found.matrix.tensor_role]
        cut = found.rows * found.matrix.inputs
        down, up = flat[:cut].view(found.rows, found.matrix.inputs), flat[cut:]
        tables = found.segments, found.scales, found.sections
        ops.low_rank_update(out, x, down, up, *tables, self.order, self.tiles, found.max_rank)
