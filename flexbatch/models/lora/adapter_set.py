"""The adapters of an engine together: what they add to which matrix, and the tensors that hold them, one a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from flexbatch.models.arch import Arch
from flexbatch.models.lora.adapter import PARTS, Adapter, LowRank
from flexbatch.models.lora.replaced import ReplacedTable, replaced_tables
from flexbatch.models.specs import Piece, WeightSpec
from flexbatch.validation.errors import ConfigurationError

Key = tuple[int, str]
"""Layer and role."""


@dataclass(frozen=True)
class AdaptedMatrix:
    """One matrix with the updates of all adapters. ``updates``: by adapter and part, None where there is none.

    Its tensor is flat: the rows of all ``down`` one after another, by adapter and part, then all ``up``, transposed.
    """

    layer: int
    role: str
    inputs: int
    widths: tuple[int, ...]
    """Outputs of each part."""
    updates: tuple[tuple[LowRank | None, ...], ...]

    @property
    def tensor_role(self) -> str:
        return f"adapters.{self.role}"

    @cached_property
    def ranks(self) -> list[list[int]]:
        return [[0 if update is None else update.rank for update in parts] for parts in self.updates]

    @property
    def rows(self) -> int:
        """Of all ``down`` together."""
        return sum(map(sum, self.ranks))

    @property
    def max_rank(self) -> int:
        return max(map(sum, self.ranks))

    @property
    def elements(self) -> int:
        """Of its tensor."""
        up = sum(rank * width for ranks in self.ranks for rank, width in zip(ranks, self.widths, strict=True))
        return self.rows * self.inputs + up

    def segments(self) -> list[list[tuple[int, int, int]]]:
        """(first row of ``down``, rank, first element of ``up``) by adapter and part."""
        row = element = 0
        found: list[list[tuple[int, int, int]]] = []
        for ranks in self.ranks:
            found.append([])
            for rank, width in zip(ranks, self.widths, strict=True):
                found[-1].append((row, rank, element))
                row, element = row + rank, element + rank * width
        return found

    def scales(self) -> list[list[float]]:
        return [[0.0 if update is None else update.scale for update in parts] for parts in self.updates]

    def sections(self) -> list[tuple[int, int]]:
        """(first column, columns) of every part."""
        return [(sum(self.widths[:part]), width) for part, width in enumerate(self.widths)]

    def piece(self, arch: Arch, dtype: torch.dtype) -> Piece:
        """Its tensor, read from the adapters' files."""
        tensor = torch.empty(self.elements, dtype=dtype)
        down, up = tensor[: self.rows * self.inputs].view(self.rows, self.inputs), tensor[self.rows * self.inputs :]
        for parts, segments in zip(self.updates, self.segments(), strict=True):
            for update, (row, rank, element), width in zip(parts, segments, self.widths, strict=True):
                if update is not None:
                    first, second = update.factors(arch)
                    if dtype == torch.float16:
                        first, second = balanced(first, second)
                    down[row : row + rank].copy_(first)
                    up[element : element + rank * width].view(rank, width).copy_(second.t())
        return Piece(self.layer, self.tensor_role, None, tensor)


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors with the same product, for float16: PEFT saves them in 32 bits, and a small one beside a large one
    would lose its bits below 6e-5, or exceed 65504. A power of two is moved from one to the other, so that both are of
    one size; but ``down`` is not made larger for an ``up`` that fits, since the products between both have 16 bits.
    """
    most = float(down.abs().max()), float(up.abs().max())
    if not all(0 < value < math.inf for value in most):
        return down, up
    shift = round((math.log2(most[1]) - math.log2(most[0])) / 2)
    if shift > 0 and most[1] < 2**8:
        return down, up
    return down.float() * 2.0**shift, up.float() * 2.0**-shift


@dataclass(frozen=True)
class AdapterSet:
    """The adapters of an engine, in the order in which they came: their ids count from 1, and 0 is none.

    Adapters are added and never taken away, so that an id means the same for as long as the engine lives.
    """

    arch: Arch
    adapters: tuple[Adapter, ...] = ()
    merged: Adapter | None = None
    """The only one, added to the weights as they are loaded."""
    default: str | None = None
    """The adapter of requests that name none."""

    @property
    def names(self) -> tuple[str, ...]:
        known = (*((self.merged,) if self.merged else ()), *self.adapters)
        return tuple(adapter.name for adapter in known)

    def find(self, name: str) -> Adapter | None:
        known = (*((self.merged,) if self.merged else ()), *self.adapters)
        return next((adapter for adapter in known if adapter.name == name), None)

    def id_of(self, name: str | None) -> int:
        """Raises ConfigurationError for a name that is not known."""
        name = self.default if name is None else name
        if name is None:
            return 0
        if name in self._ids:
            return self._ids[name]
        known = f"known: {', '.join(self.names)}" if self.names else "none was given by lora=NAME=FOLDER (--lora)"
        raise ConfigurationError(f"lora_request: there is no adapter {name!r}; {known}")

    @cached_property
    def _ids(self) -> dict[str, int]:
        ids = {adapter.name: index + 1 for index, adapter in enumerate(self.adapters)}
        return ids if self.merged is None else {**ids, self.merged.name: 0}

    def adding(self, adapter: Adapter) -> AdapterSet:
        return replace(self, adapters=(*self.adapters, adapter))

    @cached_property
    def matrices(self) -> dict[Key, AdaptedMatrix]:
        """What any of the adapters adds to, in the order of a pass."""
        by_adapter = [
            {(update.layer, update.role, update.part): update for update in adapter.updates}
            for adapter in self.adapters
        ]
        keys = sorted({key for adapter in self.adapters for key in adapter.roles})
        return {key: self._matrix(key, by_adapter) for key in keys}

    def _matrix(self, key: Key, by_adapter: list[dict[tuple[int, str, str], LowRank]]) -> AdaptedMatrix:
        layer, role = key
        found = [update for updates in by_adapter for update in updates.values() if (update.layer, update.role) == key]
        whole = found[0].part not in PARTS.get(role, ())
        parts = (found[0].part,) if whole else PARTS[role]
        widths = (found[0].outputs,) if whole else self._sections(role)
        updates = tuple(tuple(updates.get((layer, role, part)) for part in parts) for updates in by_adapter)
        return AdaptedMatrix(layer, role, found[0].down.shape[1], widths, updates)

    def _sections(self, role: str) -> tuple[int, ...]:
        if role == "qkv":
            return self.arch.qkv_sections
        experts = self.arch.experts
        width = experts.shared_width if experts and role == "shared.gate_up" else self.arch.intermediate_size
        return width, width

    @cached_property
    def specs(self) -> tuple[WeightSpec, ...]:
        """The tensors that hold them."""
        updates = (WeightSpec(each.layer, each.tensor_role, (each.elements,)) for each in self.matrices.values())
        return (*updates, *(table.spec for table in self.replaced.values()))

    @cached_property
    def replaced(self) -> dict[Key, ReplacedTable]:
        """Rows of the embedding and of the head that any of the adapters has instead of the model's."""
        return replaced_tables([adapter.replaced for adapter in self.adapters])

    @property
    def max_rank(self) -> int:
        """Of the updates of one matrix together, at most: what a token needs room for."""
        return max((matrix.max_rank for matrix in self.matrices.values()), default=0)

    def workspace_bytes(self, tokens: int, element_bytes: int) -> int:
        """What a micro-batch of so many tokens needs on the compute device beside the tensors: the inner products of a
        matrix, rows of the embedding and their sum with the model's, and the tables of all."""
        numbers = sum(len(matrix.widths) * (4 * len(matrix.updates) + 2) for matrix in self.matrices.values())
        elements = self.max_rank
        for table in self.replaced.values():
            numbers += 2 * len(table.parts) + table.rows
            if table.role == "embed":
                numbers += (len(table.parts) + 1) * self.arch.vocab_size
                elements = max(elements, 2 * table.width)
        return tokens * (elements * element_bytes + 16) + 8 * numbers

    def tensor(self, key: Key, dtype: torch.dtype) -> Tensor:
        """One of the tensors of `specs`, by layer and role."""
        layer, role = key
        name = role.removeprefix("adapters.")
        if name.endswith(".rows"):
            return self.replaced[layer, name.removesuffix(".rows")].piece(dtype).tensor
        return self.matrices[layer, name].piece(self.arch, dtype).tensor

    def pieces(self, dtype: torch.dtype) -> Iterator[Piece]:
        """The tensors of `specs`, one at a time. Raises CheckpointError for a file that cannot be read."""
        for matrix in self.matrices.values():
            yield matrix.piece(self.arch, dtype)
        for table in self.replaced.values():
            yield table.piece(dtype)

    def elements_of_a_layer(self) -> tuple[int, ...]:
        """Of every adapted matrix, on average over the layers: what a plan counts."""
        totals: dict[str, int] = {}
        for matrix in self.matrices.values():
            if 0 <= matrix.layer < self.arch.num_layers:
                totals[matrix.role] = totals.get(matrix.role, 0) + matrix.elements
        return tuple(math.ceil(total / self.arch.num_layers) for total in totals.values())

    def elements_outside(self, layer: int) -> tuple[int, ...]:
        """Of every tensor of the embedding stage (-1), or of the head."""
        return tuple(spec.numel for spec in self.specs if spec.layer == layer)
