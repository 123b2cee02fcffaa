"""The tensors of a model on their tiers: views of memory, a layer at a time, and files."""

from __future__ import annotations

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.memory.files import DiskFile, align
from flexbatch.memory.tensor_views import TensorView, view_of
from flexbatch.memory.tiers import Tiers
from flexbatch.memory.weight_plan import WeightPlan, slab_alignment

Key = tuple[int, str]
"""Layer and role."""


class WeightTensors:
    """``views`` holds the tensors of the gpu and cpu tiers, ``raw`` the bytes behind them; disk tensors are ``files``
    (one per tensor, aligned, complete once they have their name)."""

    def __init__(self, plan: WeightPlan, tiers: Tiers, device: torch.device, dtype: torch.dtype) -> None:
        """Raises DoesNotFitError."""
        self.plan, self.tiers, self.device, self.dtype = plan, tiers, device, dtype
        self.views: dict[Key, TensorView] = {}
        self.raw: dict[Key, Tensor] = {}
        self.files: dict[Key, DiskFile] = {}
        self.cpu_slabs: dict[int, Tensor] = {}
        for layer in plan.groups:
            self.allocate_layer(layer, plan)

    def allocate_layer(self, layer: int, plan: WeightPlan) -> None:
        """One allocation per tier for the resident tensors of a layer (-1: those outside of any), so that a layer can
        move while the others stay."""
        for tier, pool in (("gpu", self.tiers.gpu), ("cpu", self.tiers.cpu)):
            tensors = [placed for placed in plan.groups[layer] if placed.tier == tier]
            if not tensors:
                continue
            slab = pool.allocate(f"weights {layer}", plan.group_bytes(layer, tier))
            cursor = 0
            for placed in tensors:
                key = placed.spec.layer, placed.spec.role
                self.views[key] = view_of(slab, placed, cursor, self.dtype)
                self.raw[key] = slab[cursor : cursor + placed.num_bytes]
                cursor += align(placed.num_bytes, slab_alignment(tier))
            if tier == "cpu" and layer >= 0:
                self.cpu_slabs[layer] = slab

    def free_layer(self, layer: int, plan: WeightPlan) -> None:
        """Give back what `allocate_layer` took."""
        for placed in plan.groups[layer]:
            for held in (self.views, self.raw):
                held.pop((placed.spec.layer, placed.spec.role), None)
        self.cpu_slabs.pop(layer, None)
        for pool in (self.tiers.gpu, self.tiers.cpu):
            pool.free(f"weights {layer}")

    def gather_rows(self, role: str, row_ids: Tensor, host_ids: Tensor) -> Tensor:
        """Rows [n, width] of an embedding table on the compute device, gathered where the table lies. row_ids,
        host_ids: [n] int64, there and on the host."""
        view = self.views.get((-1, role))
        if view is not None and view.dense is not None:
            table = view.dense
            row_bytes = table.shape[1] * table.element_size()
            if table.device == self.device:
                return table.index_select(0, row_ids)
            if row_bytes % 16:
                return table.index_select(0, host_ids).to(self.device)
            # The device reads the pinned rows itself: a copy of pageable rows runs at 7 GB/s, this at 50.
            rows = torch.empty(len(row_ids), table.shape[1], dtype=self.dtype, device=self.device)
            ops.gather_pages(table.view(torch.uint8), row_ids.to(torch.int32), rows.view(torch.uint8))
            return rows
        placed = next(
            tensor for tensor in self.plan.all_tensors if tensor.spec.layer == -1 and tensor.spec.role == role
        )
        file = self.files[-1, role]
        row_bytes = placed.dense_bytes // placed.spec.shape[0]
        unique, inverse = torch.unique(host_ids, return_inverse=True)
        host = torch.empty(len(unique), row_bytes, dtype=torch.uint8)
        for row, index in zip(host, unique.tolist(), strict=True):
            file.read(row, index * row_bytes)
        return host.view(self.dtype).index_select(0, inverse).to(self.device)

    def gathers_on_device(self, role: str) -> bool:
        """Whether `gather_rows` of an embedding table needs no ids on the host."""
        view = self.views.get((-1, role))
        if view is None or (table := view.dense) is None:
            return False
        return table.device == self.device or table.shape[1] * table.element_size() % 16 == 0

    @property
    def embedding_weights(self) -> dict[str, Tensor]:
        """The resident tensors of the embedding stage (norm, projection)."""
        return {
            placed.spec.role: dense
            for placed in self.plan.resident
            if (dense := self.views[-1, placed.spec.role].dense) is not None
        }

    def check(self) -> None:
        """Invariant: every tensor is in one place."""
        for placed in self.plan.all_tensors:
            key = (placed.spec.layer, placed.spec.role)
            assert (key in self.views) != (key in self.files), (key, placed.tier)
            assert (key in self.raw) == (key in self.views), key

    def make_file(self, key: Key, num_bytes: int) -> DiskFile:
        """A file without a name for a tensor that comes to the disk tier: nothing of it is left afterward."""
        self.files[key] = self.tiers.disk.open_file(scratch_name(key), self.tiers.offload_dir, num_bytes)
        return self.files[key]

    def drop_file(self, key: Key) -> None:
        """Close a tensor's file, where it has one."""
        file = self.files.pop(key, None)
        if file is not None:
            file.close()
            self.tiers.disk.free(scratch_name(key))

    def close(self) -> None:
        for key in list(self.files):
            self.drop_file(key)
        for layer in self.plan.groups:
            self.free_layer(layer, self.plan)
        self.views.clear()
        self.raw.clear()


def scratch_name(key: Key) -> str:
    return f"weights {key[0]} {key[1]}"
