"""The home of each layer's weights, and their way to the compute device: fetch ahead, use, release."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.memory.files import DiskFile, align, chunks
from flexbatch.memory.read_ahead import ReadAhead
from flexbatch.memory.tiers import Tiers
from flexbatch.memory.transfer import READY, Handle, TransferQueues, together
from flexbatch.memory.weight_plan import SLAB_ALIGNMENT, StoredTensor, WeightPlan, slab_alignment, stage_of


@dataclass
class SlabLease:
    """A working slab in the hands of one layer, from its first fetch to its release."""

    slab: int
    handles: list[Handle] = field(default_factory=list)
    slices_fetched: int = 0
    waits_for_disk: bool = False
    """Its part from the disk has not been sent on from staging yet."""


@dataclass
class TensorView:
    """A tensor where it can be used: dense, or codes and parameters still to be expanded."""

    stored: StoredTensor
    dense: Tensor | None = None
    codes: Tensor | None = None
    parameters: Tensor | None = None


def view_of(slab: Tensor, stored: StoredTensor, start: int, dtype: torch.dtype) -> TensorView:
    """The tensor that lies at byte ``start`` of a uint8 slab."""
    if not stored.quantized:
        return TensorView(stored, dense=slab[start : start + stored.dense_bytes].view(dtype).view(stored.spec.shape))
    codes = slab[start : start + math.prod(stored.codes_shape)].view(stored.codes_shape)
    parameters = slab[start + stored.codes_bytes : start + stored.num_bytes].view(dtype).view(stored.parameters_shape)
    return TensorView(stored, codes=codes, parameters=parameters)


def slices(num_bytes: int, index: int, count: int, alignment: int = 256) -> tuple[int, int]:
    """The ``index``-th of ``count`` contiguous byte ranges, cut at multiples of ``alignment``."""
    step = align(math.ceil(num_bytes / count), alignment)
    return min(index * step, num_bytes), min((index + 1) * step, num_bytes)


class WeightStore:
    """Weights over the tiers. One owner per working slab: a layer claims it, fetches into it, computes, and releases it
    with a handle.

    ``homes`` holds the views of gpu and cpu tensors; disk tensors are files (one per tensor, aligned, complete once
    they have their name).
    """

    def __init__(
        self, plan: WeightPlan, tiers: Tiers, queues: TransferQueues, dtype: torch.dtype, staged: bool | None = None
    ) -> None:
        """``staged``: whether disk tensors stop over in host memory, as they do on their way to a GPU (None: if
        there is one)."""
        self.plan, self.tiers, self.queues, self.dtype = plan, tiers, queues, dtype
        self.device = queues.device
        self.homes: dict[tuple[int, str], TensorView] = {}
        self.files: dict[tuple[int, str], DiskFile] = {}
        self.cpu_slabs: dict[int, Tensor] = {}
        self.allocate_homes()
        streamed = plan.slab_bytes
        self.slabs = (
            [tiers.gpu.allocate(f"weight slab {i}", streamed) for i in range(plan.num_slabs)] if streamed else []
        )
        disk_bytes = max(plan.layer_bytes(layer, "disk") for layer in range(len(plan.layers)))
        staged = bool(disk_bytes) and (self.device.type == "cuda" if staged is None else staged)
        staging = [tiers.cpu.allocate(f"disk staging {i}", disk_bytes) for i in range(plan.num_slabs)] if staged else []
        self.disk_homed = [[tensor for tensor in layer if tensor.tier == "disk"] for layer in plan.layers]
        on_disk = {layer: plan.layer_bytes(layer, "disk") for layer, tensors in enumerate(self.disk_homed) if tensors}
        self.read_ahead = ReadAhead(on_disk, staging, self.read_disk, queues) if staging else None
        """None: disk tensors are read straight into slabs."""
        self.free_after: list[Handle] = [READY] * len(self.slabs)
        self.leases: dict[int, SlabLease] = {}
        self.next_slab = 0
        self.expansion = {
            stage: tiers.gpu.allocate(f"weight expansion {stage}", plan.dequantization_bytes(stage))
            for stage in ("pre", "post")
            if plan.dequantization_bytes(stage)
        }
        self.expanded: dict[str, int] = {}
        self.ready: dict[int, dict[str, Tensor]] = {}
        self.dense_views: dict[tuple[int, int], dict[str, Tensor]] = {}
        """By layer and slab, kept because making the views of a layer takes 0.1 ms of Python."""

    @property
    def resident(self) -> bool:
        """Whether everything that a pass reads is on the compute device."""
        return not self.slabs and all(tensor.tier == "gpu" for tensor in self.plan.gathered)

    @property
    def has_free_slab(self) -> bool:
        """Whether the next layer can be fetched before another is released."""
        return len(self.leases) < len(self.slabs)

    def allocate_homes(self) -> None:
        """One allocation per tier for all resident tensors."""
        for tier, pool in (("gpu", self.tiers.gpu), ("cpu", self.tiers.cpu)):
            slab = pool.allocate("weights", self.plan.tier_bytes(tier))
            cursor = 0
            for layer, tensors in [*enumerate(self.plan.layers), (-1, (*self.plan.gathered, *self.plan.resident))]:
                start = cursor
                for stored in tensors:
                    if stored.tier == tier:
                        self.homes[stored.spec.layer, stored.spec.role] = view_of(slab, stored, cursor, self.dtype)
                        cursor += align(stored.num_bytes, slab_alignment(tier))
                if tier == "cpu" and layer >= 0:
                    self.cpu_slabs[layer] = slab[start:cursor]

    # Fetching

    def fetch(self, layer: int, index: int, count: int) -> None:
        """Put the ``index``-th of ``count`` slices of a layer's streamed weights on the link; slice 0 claims a slab
        and starts the disk read."""
        if not self.plan.streamed_bytes(layer):
            return
        lease = self.leases.get(layer)
        if lease is None:
            assert index == 0, f"layer {layer} is fetched from slice {index} on"
            lease = self.lease(layer)
        if index < lease.slices_fetched:
            return
        lease.slices_fetched = index + 1
        slab, after = self.slabs[lease.slab], self.free_after[lease.slab]
        disk_bytes = self.plan.layer_bytes(layer, "disk")
        if index == 0 and disk_bytes:
            if self.read_ahead is None:
                job = partial(self.read_disk, layer, slab[:disk_bytes])
                lease.handles.append(self.queues.disk_read.submit(job, after, f"weights {layer}", disk_bytes))
            else:
                self.read_ahead.expect(layer)
                lease.waits_for_disk = True
        if self.read_ahead is not None and lease.waits_for_disk and self.read_ahead.arrived(layer):
            self.forward(layer, lease)
        start, end = slices(self.plan.layer_bytes(layer, "cpu"), index, count)
        if end > start:
            target, source = slab[disk_bytes + start : disk_bytes + end], self.cpu_slabs[layer][start:end]
            lease.handles.append(
                self.queues.h2d.submit(
                    lambda: target.copy_(source, non_blocking=True), after, f"weights {layer}.{index}", end - start
                )
            )

    def forward(self, layer: int, lease: SlabLease) -> None:
        """Copy the part of a layer that the disk has from staging to its slab; waits for the disk."""
        assert self.read_ahead is not None
        target = self.slabs[lease.slab][: self.plan.layer_bytes(layer, "disk")]
        lease.handles.append(self.read_ahead.copy_to_device(layer, target, self.free_after[lease.slab]))
        lease.waits_for_disk = False

    def fetch_rest(self, layer: int, count: int) -> None:
        """Fetch what is not yet fetched of a layer, as ``count`` slices."""
        lease = self.leases.get(layer)
        for index in range(lease.slices_fetched if lease else 0, count):
            self.fetch(layer, index, count)

    def lease(self, layer: int) -> SlabLease:
        owners = {lease.slab: owner for owner, lease in self.leases.items()}
        assert self.next_slab not in owners, (
            f"slab {self.next_slab} is still layer {owners.get(self.next_slab)}'s, layer {layer} wants it"
        )
        lease = self.leases[layer] = SlabLease(self.next_slab)
        self.next_slab = (self.next_slab + 1) % len(self.slabs)
        return lease

    def read_disk(self, layer: int, host: Tensor) -> None:
        """Read a layer's disk tensors with several threads. host: [bytes on disk] uint8."""
        jobs = []
        for stored in self.disk_homed[layer]:
            file = self.files[stored.spec.layer, stored.spec.role]
            for start, end in chunks(align(stored.num_bytes)):
                jobs.append((file, stored.offset + start, stored.offset + end, start))

        def read(job: tuple[DiskFile, int, int, int]) -> None:
            file, begin, end, file_offset = job
            file.read(host[begin:end], file_offset)

        list(self.queues.disk_chunks.map(read, jobs))

    # Using

    def weights(self, layer: int, stage: str) -> dict[str, Tensor]:
        """Role -> tensor of a layer, ready for the compute stream; quantised tensors of ``stage`` are expanded at
        their first use in a pass."""
        ready = self.ready.get(layer)
        if ready is None:
            ready = self.ready[layer] = self.collect(layer)
        if stage in self.expansion and self.expanded.get(stage) != layer:
            # Whose they were they are not any more, should this one break off.
            self.expanded.pop(stage, None)
            self.expand(layer, stage, ready)
            self.expanded[stage] = layer
        return ready

    def collect(self, layer: int) -> dict[str, Tensor]:
        lease = self.leases.get(layer)
        if lease is not None:
            if lease.waits_for_disk:
                self.forward(layer, lease)
            together(*lease.handles).wait()
        else:
            assert not self.plan.streamed_bytes(layer), f"layer {layer} is used before it was fetched"
        key = layer, lease.slab if lease is not None else -1
        if key not in self.dense_views:
            views = ((stored, self.compute_view(stored, layer, lease).dense) for stored in self.plan.layers[layer])
            self.dense_views[key] = {self.role(stored): dense for stored, dense in views if dense is not None}
        return dict(self.dense_views[key])

    def compute_view(self, stored: StoredTensor, layer: int, lease: SlabLease | None) -> TensorView:
        if stored.tier == "gpu":
            return self.homes[stored.spec.layer, stored.spec.role]
        assert lease is not None
        start = stored.offset + (self.plan.layer_bytes(layer, "disk") if stored.tier == "cpu" else 0)
        return view_of(self.slabs[lease.slab], stored, start, self.dtype)

    def role(self, stored: StoredTensor) -> str:
        return "head.weight" if stored.spec.role == "embed.weight" else stored.spec.role

    def expand(self, layer: int, stage: str, ready: dict[str, Tensor]) -> None:
        """Dequantise into the expansion slab of the stage; it is shared by all micro-batches of the layer."""
        cursor, slab = 0, self.expansion[stage]
        for stored in self.plan.layers[layer]:
            if not stored.quantized or stage_of(stored.spec.role) != stage:
                continue
            views = self.compute_view(stored, layer, self.leases.get(layer))
            assert views.codes is not None and views.parameters is not None
            dense = slab[cursor : cursor + stored.dense_bytes].view(self.dtype).view(stored.spec.shape)
            ops.dequantize(views.codes, views.parameters, stored.spec.shape[1], stored.bits, stored.group, out=dense)
            ready[stored.spec.role] = dense
            cursor += align(stored.dense_bytes, SLAB_ALIGNMENT)

    def release(self, layer: int, done: Handle) -> None:
        """Give a layer's slab back; the next fetch into it waits for ``done``, the last compute that reads it."""
        self.ready.pop(layer, None)
        for stage, owner in list(self.expanded.items()):
            if owner == layer:
                del self.expanded[stage]
        lease = self.leases.pop(layer, None)
        if lease is not None:
            self.free_after[lease.slab] = done

    def gather_rows(self, role: str, row_ids: Tensor, host_ids: Tensor) -> Tensor:
        """Rows [n, width] of an embedding table on the compute device, gathered where the table lives. row_ids,
        host_ids: [n] int64, there and on the host."""
        home = self.homes.get((-1, role))
        if home is not None and home.dense is not None:
            table = home.dense
            row_bytes = table.shape[1] * table.element_size()
            if table.device == self.device:
                return table.index_select(0, row_ids)
            if row_bytes % 16:
                return table.index_select(0, host_ids).to(self.device)
            # The device reads the pinned rows itself: a copy of pageable rows runs at 7 GB/s, this at 50.
            rows = torch.empty(len(row_ids), table.shape[1], dtype=self.dtype, device=self.device)
            ops.gather_pages(table.view(torch.uint8), row_ids.to(torch.int32), rows.view(torch.uint8))
            return rows
        stored = next(
            tensor for tensor in self.plan.all_tensors if tensor.spec.layer == -1 and tensor.spec.role == role
        )
        file = self.files[-1, role]
        row_bytes = stored.dense_bytes // stored.spec.shape[0]
        unique, inverse = torch.unique(host_ids, return_inverse=True)
        host = torch.empty(len(unique), row_bytes, dtype=torch.uint8)
        for row, index in zip(host, unique.tolist(), strict=True):
            file.read(row, index * row_bytes)
        return host.view(self.dtype).index_select(0, inverse).to(self.device)

    @property
    def embedding_weights(self) -> dict[str, Tensor]:
        """The resident tensors of the embedding stage (norm, projection)."""
        return {
            stored.spec.role: dense
            for stored in self.plan.resident
            if (dense := self.homes[-1, stored.spec.role].dense) is not None
        }

    def check(self) -> None:
        """Invariants: no two layers own a slab; streamed weights in use have one; every tensor has exactly one home."""
        owners = [lease.slab for lease in self.leases.values()]
        assert len(owners) == len(set(owners)), self.leases
        assert all(0 <= slab < len(self.slabs) for slab in owners), (owners, len(self.slabs))
        assert all(layer in self.leases or not self.plan.streamed_bytes(layer) for layer in self.ready), (
            self.ready.keys(),
            self.leases.keys(),
        )
        if self.read_ahead is not None:
            self.read_ahead.check()
        for stored in self.plan.all_tensors:
            key = (stored.spec.layer, stored.spec.role)
            assert (key in self.homes) != (key in self.files), (key, stored.tier)

    def drain(self) -> None:
        """Wait for everything that is on its way and forget it (end of a job, or a failed pass).

        The error of a fetch is its user's: here nobody uses it any more, and whoever needs the layer later fetches
        it again.
        """
        self.queues.settle()
        if self.read_ahead is not None:
            self.read_ahead.forget_failed()
        for layer in list(self.leases):
            self.release(layer, self.queues.mark())

    def close(self) -> None:
        self.drain()
        if self.read_ahead is not None:
            self.read_ahead.close()
        for file in self.files.values():
            file.close()
        for views in (self.files, self.homes, self.cpu_slabs, self.slabs, self.expansion, self.ready, self.dense_views):
            views.clear()
