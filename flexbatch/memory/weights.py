"""Where each layer's weights are, and their way to the compute device: fetch ahead, use, release."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexbatch.kernels import native_coded
from flexbatch.kernels.coded_matrix import CodedMatrix
from flexbatch.kernels.expert_codes import ExpertStacks
from flexbatch.memory.cpu_experts import CpuExperts, LeftOut, Ranges, cut
from flexbatch.memory.expert_stacks import layer_stacks
from flexbatch.memory.handles import READY, Handle, together
from flexbatch.memory.hit_experts import HitExperts, leased
from flexbatch.memory.read_ahead import ReadAhead, read_tensors
from flexbatch.memory.slab_lease import KeptViews, SlabLease, gaps, place_of, slices
from flexbatch.memory.tensor_views import DequantizationBuffers, TensorView, view_of
from flexbatch.memory.tiers import Tiers
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weight_plan import PlacedTensor, WeightPlan
from flexbatch.memory.weight_tensors import WeightTensors
from flexbatch.policy.limits import CODED_PASS_TOKENS, CODED_TOKENS

BUFFERS = ("weight slab ", "disk staging ", "dequantization ")


class WeightStore:
    """Weights over the tiers, the `tensors`, and their way to the compute device. One owner per working slab: a layer
    leases it, fetches into it, computes, and releases it with a handle."""

    def __init__(
        self, plan: WeightPlan, tiers: Tiers, queues: TransferQueues, dtype: torch.dtype, staged: bool | None = None
    ) -> None:
        """``staged``: whether disk tensors pass through host memory, as they do on their way to a GPU (None: if
        there is one). Raises DoesNotFitError."""
        self.plan, self.tiers, self.queues, self.dtype = plan, tiers, queues, dtype
        self.device = queues.device
        self.staged = self.device.type == "cuda" if staged is None else staged
        most = (CODED_TOKENS, CODED_PASS_TOKENS) if self.device.type == "cuda" else (native_coded.most_tokens(dtype), 0)
        self.coded_tokens, self.coded_pass_tokens, self.pass_tokens = *most, 0
        """Tokens that are multiplied with quantized matrices as they are stored, at most; of a pass; this pass's."""
        self.few_in_codes = True  # see `Policy.few_in_codes`
        self.tensors = WeightTensors(plan, tiers, self.device, dtype)
        self.views, self.files, self.cpu_slabs = self.tensors.views, self.tensors.files, self.tensors.cpu_slabs
        self.open_buffers()

    def open_buffers(self) -> None:
        """What passes need besides the tensors: working slabs, staging, dequantization."""
        plan, tiers, streamed = self.plan, self.tiers, self.plan.slab_bytes
        slabs = range(plan.num_slabs if streamed else 0)
        self.slabs = [tiers.gpu.allocate(f"weight slab {i}", streamed) for i in slabs]
        disk_bytes = max(plan.layer_bytes(layer, "disk") for layer in range(len(plan.layers)))
        buffers = range(plan.num_slabs if disk_bytes and self.staged else 0)
        staging = [tiers.cpu.allocate(f"disk staging {i}", disk_bytes) for i in buffers]
        self.disk_tensors = [[tensor for tensor in layer if tensor.tier == "disk"] for layer in plan.layers]
        on_disk = {layer: plan.layer_bytes(layer, "disk") for layer, tensors in enumerate(self.disk_tensors) if tensors}
        self.read_ahead = ReadAhead(on_disk, staging, self.read_disk, self.queues) if staging else None
        """None: disk tensors are read straight into slabs."""
        self.free_after: list[Handle] = [READY] * len(self.slabs)
        self.leases: dict[int, SlabLease] = {}
        self.next_slab = 0
        self.dequantization = DequantizationBuffers(plan, tiers.gpu, self.dtype)
        self.ready: dict[int, dict[str, Tensor]] = {}
        self.cpu_experts: CpuExperts | None = None
        self.leaves_experts = False
        """Whether layers are fetched without the experts that the CPU computes."""
        self.hit_experts = HitExperts(plan, self.device) if plan.arch.experts and streamed else None
        self.fetches_hits = False
        """Whether layers are fetched without any experts, and these are brought as they are hit."""
        self.kept = KeptViews()

    @property
    def resident(self) -> bool:
        """Whether everything that a pass reads is on the compute device."""
        return not self.slabs and all(tensor.tier == "gpu" for tensor in self.plan.gathered)

    def can_fetch(self, layer: int) -> bool:
        """Whether the layer can be fetched before another one is released."""
        has_place = layer in self.leases or not self.plan.streamed_bytes(layer)
        return has_place or len(self.leases) < len(self.slabs)

    def leave_to_cpu(self, share: float) -> None:
        """From the next fetch on: the CPU computes this share of the experts in host memory."""
        some = share and self.plan.arch.experts
        self.cpu_experts = CpuExperts(self.plan, self.tensors, share, self.device) if some else None

    def left_out(self, layer: int) -> LeftOut | None:
        """Experts of a layer that is leased which are not in its slab; None where all are."""
        return self.leases[layer].left_out if layer in self.leases else None

    # Fetching

    def fetch(self, layer: int, index: int, count: int, after: Handle = READY) -> None:
        """Put the ``index``-th of ``count`` slices of a layer's streamed weights on the link, once ``after`` is done;
        slice 0 leases a slab and starts the disk read."""
        lease = self.leases.get(layer)
        if lease is None:
            if not self.plan.streamed_bytes(layer):
                return
            assert index == 0, f"layer {layer} is fetched from slice {index} on"
            lease = self.lease(layer)
        if index < lease.slices_fetched:
            return
        lease.slices_fetched = index + 1
        disk_bytes = self.plan.layer_bytes(layer, "disk")
        if index == 0 and disk_bytes:
            if self.read_ahead is None:
                job = partial(self.read_disk, layer, self.slabs[lease.slab][:disk_bytes])
                free = self.free_after[lease.slab]
                lease.handles.append(self.queues.disk_read.submit(job, free, f"weights {layer}", disk_bytes))
            else:
                self.read_ahead.expect(layer)
                lease.waits_for_disk = True
        if self.read_ahead is not None and lease.waits_for_disk and self.read_ahead.arrived(layer):
            self.forward(layer, lease)
        start, end = slices(lease.num_bytes, index, count)
        if end > start:
            self.send(layer, lease, cut(lease.ranges, start, end), f"weights {layer}.{index}", after)

    def send(self, layer: int, lease: SlabLease, ranges: Ranges, name: str, after: Handle = READY) -> None:
        """Put stretches of what a layer has in host memory on the link, once ``after`` is done."""
        slab, source = self.slabs[lease.slab], self.cpu_slabs[layer]
        disk_bytes = self.plan.layer_bytes(layer, "disk")

        def copy() -> None:
            for start, end in ranges:
                slab[disk_bytes + start : disk_bytes + end].copy_(source[start:end], non_blocking=True)

        num_bytes = sum(end - start for start, end in ranges)
        after = together(self.free_after[lease.slab], after)
        lease.handles.append(self.queues.h2d.submit(copy, after, name, num_bytes))

    def fetch_experts(self) -> None:
        """Fetch also the experts that were left out of the layers on their way."""
        assert not self.ready, f"layers {list(self.ready)} are in use"
        for layer, lease in self.leases.items():
            if lease.left_out or lease.by_hit:
                missing = gaps(lease.ranges, self.plan.layer_bytes(layer, "cpu"))
                self.send(layer, lease, missing, f"experts {layer}")
                lease.left_out, lease.by_hit = None, False

    def fetch_hit(self, layer: int, chosen: Tensor) -> None:
        """Experts of a layer that was fetched without them, and whose router has given its tokens these [T, K]."""
        lease = self.leases.get(layer)
        if lease is not None and lease.by_hit and self.hit_experts is not None:
            target = self.slabs[lease.slab][self.plan.layer_bytes(layer, "disk") :]
            self.hit_experts.fetch(lease, layer, self.cpu_slabs[layer], target, chosen)

    def forward(self, layer: int, lease: SlabLease) -> None:
        """Copy the part of a layer that the disk has from staging to its slab; waits for the disk."""
        assert self.read_ahead is not None
        target = self.slabs[lease.slab][: self.plan.layer_bytes(layer, "disk")]
        lease.handles.append(self.read_ahead.copy_to_device(layer, target, self.free_after[lease.slab]))
        lease.waits_for_disk = False

    def fetch_rest(self, layer: int, count: int) -> None:
        """Fetch what is not yet fetched of a layer, as ``count`` slices."""
        begun = self.leases[layer].slices_fetched if layer in self.leases else 0
        for index in range(begun, count):
            self.fetch(layer, index, count)

    def lease(self, layer: int) -> SlabLease:
        """Lease the next free slab to ``layer``; slabs go round, but for those of layers that were fetched early."""
        owners, count = {lease.slab: owner for owner, lease in self.leases.items()}, len(self.slabs)
        free = [slab for i in range(count) if (slab := (self.next_slab + i) % count) not in owners]
        assert free, f"slab {self.next_slab} is still layer {owners.get(self.next_slab)}'s, layer {layer} wants it"
        elsewhere = self.cpu_experts if self.leaves_experts else None
        hits = self.hit_experts if self.fetches_hits else None
        lease = leased(free[0], layer, self.plan.layer_bytes(layer, "cpu"), elsewhere, hits)
        self.leases[layer] = lease
        self.next_slab = (free[0] + 1) % count
        return lease

    def read_disk(self, layer: int, host: Tensor) -> None:
        """Read a layer's disk tensors with several threads. host: [bytes on disk] uint8."""
        on_disk = ((self.files[each.spec.layer, each.spec.role], each) for each in self.disk_tensors[layer])
        read_tensors(on_disk, host, self.queues.disk_chunks)

    # Using

    def weights(self, layer: int, stage: str, tokens: int) -> dict[str, Any]:
        """Role -> tensor of a layer, ready for the compute stream; quantized ones of ``stage`` ("pre" or "post": up to
        attention or after it) as they are for few enough ``tokens`` where that is planned, else dequantized, once in a
        pass."""
        ready = self.arrived(layer)
        if self.dequantization.lacks(layer, stage):
            few = tokens <= self.coded_tokens or max(tokens, self.pass_tokens) <= self.coded_pass_tokens
            if self.few_in_codes and few and (coded := self.coded(layer, stage)):
                return ready | coded
            lease = self.leases.get(layer)
            views = [self.compute_view(tensor, layer, lease) for tensor in self.plan.expanded(layer, stage)]
            ready.update(self.dequantization.fill(layer, stage, views))
        return ready

    def coded(self, layer: int, stage: str) -> dict[str, CodedMatrix]:
        """The quantized matrices of a stage of a layer as they are stored; none unless all can be multiplied so."""
        key = place_of(layer, self.leases), stage
        if (found := self.kept.coded.get(key)) is None:
            placed, lease = self.plan.expanded(layer, stage), self.leases.get(layer)
            fits = all(each.multiplied(self.device.type) for each in placed)
            found = {each.spec.role: self.compute_view(each, layer, lease).coded for each in placed if fits}
            self.kept.coded[key] = found
        return found

    def experts(self, layer: int) -> tuple[ExpertStacks, ExpertStacks] | None:
        """Gate and up, and down of all experts of a layer whose `weights` were taken, in codes where they are stored in
        codes that the kernels read; None where it has no experts."""
        arch, lease = self.plan.arch, self.leases.get(layer)
        experts = arch.experts_of(layer) if layer < arch.num_layers else None
        if experts is None:
            return None
        if (key := place_of(layer, self.leases)) not in self.kept.stacks:
            placed = {each.spec.role: each for each in self.plan.layers[layer]}
            views = {role: self.compute_view(each, layer, lease) for role, each in placed.items()}
            self.kept.stacks[key] = layer_stacks(experts, views, self.ready[layer], self.plan.in_codes)
        return self.kept.stacks[key]

    def arrived(self, layer: int) -> dict[str, Any]:
        """Role -> dense tensor of a layer, ordered after its fetches; quantized ones once `weights` expanded them."""
        if (ready := self.ready.get(layer)) is not None:
            return ready
        lease = self.leases.get(layer)
        if lease is not None:
            if lease.waits_for_disk:
                self.forward(layer, lease)
            together(*lease.handles).wait()
        else:
            assert not self.plan.streamed_bytes(layer), f"layer {layer} is used before it was fetched"
        if (key := place_of(layer, self.leases)) not in self.kept.dense:
            views = ((placed, self.compute_view(placed, layer, lease).dense) for placed in self.plan.layers[layer])
            roles = {"embed.weight": "head.weight"}
            named = ((roles.get(role := placed.spec.role, role), dense) for placed, dense in views)
            self.kept.dense[key] = {role: dense for role, dense in named if dense is not None}
        return self.ready.setdefault(layer, dict(self.kept.dense[key]))

    def compute_view(self, placed: PlacedTensor, layer: int, lease: SlabLease | None) -> TensorView:
        """The tensor on the compute device: resident there, or in the leased slab."""
        if placed.tier == "gpu":
            return self.views[placed.spec.layer, placed.spec.role]
        assert lease is not None
        start = placed.offset + (self.plan.layer_bytes(layer, "disk") if placed.tier == "cpu" else 0)
        return view_of(self.slabs[lease.slab], placed, start, self.dtype)

    def release(self, layer: int, done: Handle) -> None:
        """End a layer's lease; the next fetch into its slab waits for ``done``, the last compute that reads it."""
        self.ready.pop(layer, None)
        self.dequantization.release(layer)
        lease = self.leases.pop(layer, None)
        if lease is not None:
            self.free_after[lease.slab] = done

    def check(self) -> None:
        """Invariants: no two layers own a slab; streamed weights in use have one; every tensor has exactly one
        placement."""
        owners = [lease.slab for lease in self.leases.values()]
        assert len(owners) == len(set(owners)), self.leases
        assert all(0 <= slab < len(self.slabs) for slab in owners), (owners, len(self.slabs))
        lacking = [layer for layer in self.ready if layer not in self.leases and self.plan.streamed_bytes(layer)]
        assert not lacking, (lacking, self.leases.keys())
        for part in (self.read_ahead, self.cpu_experts, self.hit_experts, self.tensors):
            if part is not None:
                part.check()

    def synchronize(self) -> None:
        """Wait until all that the leased slabs wait for has arrived. Re-raises the error of a fetch."""
        for lease in self.leases.values():
            together(*lease.handles).synchronize()

    @torch.inference_mode()
    def drain(self) -> None:
        """Wait for everything that is on its way and release all layers, those without a lease, too (end of a job, or
        a failed pass), whatever the caller's inference mode. The error of a fetch is raised to who waits for its
        handle: here nobody does any more, and whoever needs the layer later fetches it again."""
        self.queues.synchronize()
        if self.hit_experts is not None:
            self.queues.h2d.num_bytes += self.hit_experts.take_bytes()
        if self.read_ahead is not None:
            self.read_ahead.forget_failed()
        for layer in {*self.leases, *self.ready}:
            self.release(layer, self.queues.mark())

    def close_buffers(self) -> None:
        """Give back what `open_buffers` took."""
        self.drain()
        if self.read_ahead is not None:
            self.read_ahead.close()
        self.kept.clear()
        for held in (self.slabs, self.dequantization.buffers, self.ready):
            held.clear()
        for pool in (self.tiers.gpu, self.tiers.cpu):
            for what in [what for what in pool.used_bytes if what.startswith(BUFFERS)]:
                pool.free(what)

    def close(self) -> None:
        """Give back everything."""
        self.close_buffers()
        self.tensors.close()
