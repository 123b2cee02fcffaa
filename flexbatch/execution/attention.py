"""Attention over the cache, wherever it lies: in its pool on the compute device, in staging, or on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexbatch.execution.inputs import AttentionGroup, MicroBatchInputs, StagedGroup
from flexbatch.kernels import ops
from flexbatch.memory.handles import READY, Handle
from flexbatch.memory.host_buffers import HostBuffers
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.transfer import TransferQueues
from flexbatch.models.arch import Arch
from flexbatch.models.layers import LayerHalves
from flexbatch.models.specs import sink_role
from flexbatch.policy.schedule import Tick

SPARE_FROM_THREADS = 8
"""With a GPU and at least as many threads, CPU attention leaves one to launching: its threads meet later when one of
them has to make room. Passes of OPT-6.7B took 231 to 265 ms with 15 of 16 threads and 253 to 268 with 16."""


Watch = Callable[[int, MicroBatchInputs, Tensor], None]
"""Is shown the hidden states of a micro-batch after every layer, and first what the layers are given, as those of layer
-1."""


@dataclass
class PendingTick:
    """A tick between its two halves: attention is done, but for the CPU's share, which may still be running."""

    tick: Tick
    inputs: MicroBatchInputs
    hidden: Tensor
    attention: Tensor
    cpu_output: Tensor | None = None
    cpu_done: Handle = READY
    watch: Watch | None = None
    halves: LayerHalves | None = None
    """The rest of a layer whose experts are in part computed on the CPU."""


class CacheAttention:
    """Appends the keys and values of a tick to the cache and attends, group by group."""

    def __init__(
        self,
        arch: Arch,
        cache: KVCache,
        queues: TransferQueues,
        host_buffers: HostBuffers,
        embedding_weights: Mapping[str, Tensor],
    ) -> None:
        self.arch, self.cache, self.queues, self.host_buffers = arch, cache, queues, host_buffers
        slopes, devices = arch.alibi_slopes(), {queues.device, torch.device("cpu")}
        self.slopes = (
            {device: torch.tensor(slopes, dtype=torch.float32, device=device) for device in devices} if slopes else {}
        )
        roles = [sink_role(layer) for layer in range(arch.num_layers)] if arch.sinks else []
        self.sinks = {
            device: [embedding_weights[role].to(device, torch.float32) for role in roles] for device in devices
        }
        threads = torch.get_num_threads()
        self.cpu_threads = threads - 1 if queues.device.type == "cuda" and threads >= SPARE_FROM_THREADS else 0
        """Threads of CPU attention; 0: as many as torch uses."""

    def attend_resident(
        self, pending: PendingTick, group: AttentionGroup, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Attention of sequences on the gpu tier."""
        layer = pending.tick.layer
        rows = self.cache.rows("gpu", layer)
        self.append(rows, group.slots, group.of(key), group.of(value))
        self.attend(group.of(pending.attention), layer, group.of(query), rows, group)

    def append(self, rows: Tensor, slots: Tensor, key: Tensor, value: Tensor, threads: int = 0) -> None:
        """Store the token rows of new query tokens. threads: of CPU attention, the same here and in `attend`: OpenMP
        ends a thread that a smaller team leaves over, and starts it anew for the next larger one."""
        layout = self.cache.layout
        if self.arch.latent is not None:
            ops.append_latent_rows(rows, slots, key, layout.bits, layout.group)
        else:
            ops.append_rows(rows, slots, key, value, layout.bits, layout.group, threads=threads)

    def attend(
        self,
        out: Tensor,
        layer: int,
        query: Tensor,
        rows: Tensor,
        group: AttentionGroup,
        threads: int = 0,
    ) -> None:
        """Attention of one group over token rows that already hold its own keys and values."""
        halves = group.halves if query.is_cuda and self.arch.latent is None else ()
        for part in halves:
            self.attend_part(part.of(out, group.start), layer, part.of(query, group.start), rows, part, threads)
        if not halves:
            self.attend_part(out, layer, query, rows, group, threads)

    def attend_part(
        self, out: Tensor, layer: int, query: Tensor, rows: Tensor, group: AttentionGroup, threads: int
    ) -> None:
        """One launch of attention."""
        arch, layout = self.arch, self.cache.layout
        shared: dict[str, Any] = {
            "page_tokens": layout.page_tokens,
            "scale": arch.attention_scale,
            "bits": layout.bits,
            "group": layout.group,
            "tree_masks": group.tree_masks,
            "positions": group.positions,
            "max_query_len": group.max_query_len,
            "max_context_len": group.max_context_len,
            "out": out,
        }
        tables = group.page_table, group.query_starts, group.context_lens
        if arch.latent is not None:
            ops.latent_attention(query, rows, *tables, value_dim=arch.latent.rank, **shared)
            return
        ops.paged_attention(
            query,
            rows,
            *tables,
            num_kv_heads=arch.num_kv_heads,
            alibi_slopes=self.slopes.get(query.device),
            alibi_scale=arch.attention_scale if arch.scaled_alibi else 0.0,
            window=arch.window(layer),
            chunked=arch.chunked_window,
            soft_cap=arch.soft_cap,
            sinks=self.sinks[query.device][layer] if arch.sinks else None,
            threads=threads,
            **shared,
        )

    def attend_staged(
        self,
        pending: PendingTick,
        staged: StagedGroup,
        buffer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        """Attention over staging that holds what was gathered; the new token rows are stored beside it."""
        layer, group = pending.tick.layer, staged.attention
        rows = self.cache.staging_rows(buffer)
        self.append(rows, group.slots, group.of(key), group.of(value))
        new_rows = rows.index_select(0, group.slots)
        if staged.num_cpu_tokens:
            self.cache.drain_cpu(layer, new_rows[: staged.num_cpu_tokens], staged.cpu_slots)
        if staged.disk_pages:
            to_disk, written = new_rows[staged.num_cpu_tokens :], self.queues.mark()
            self.cache.drain_disk(layer, to_disk, staged.disk_pages, written)
        self.attend(group.of(pending.attention), layer, group.of(query), rows, group)
        self.cache.release_staging(buffer, self.queues.mark())

    def start_cpu_attention(
        self, pending: PendingTick, group: AttentionGroup, query: Tensor, key: Tensor, value: Tensor, in_turn: bool
    ) -> None:
        """Send queries, keys and values of the CPU's share down, and let the CPU append and attend where the cache
        lies. in_turn: as soon as somebody waits for it, because nothing is computed beside it."""
        layer, mine = pending.tick.layer, (group.of(query), group.of(key), group.of(value))
        host_query, host_key, host_value, output = self.host_buffers.acquire(*mine)
        arrived = self.queues.mark()
        rows = self.cache.rows("cpu", layer)
        drained = self.cache.drained[layer]

        def attend() -> None:
            drained.synchronize()
            self.append(rows, group.slots, host_key, host_value, self.cpu_threads)
            self.attend(output, layer, host_query, rows, group, self.cpu_threads)

        num_bytes = group.num_context_tokens * self.cache.layout.token_bytes
        queue = self.queues.cpu_attention
        hand_over = queue.postpone if in_turn else queue.submit
        pending.cpu_done = hand_over(attend, arrived, f"cache {layer}.{pending.tick.micro_batch}", num_bytes)
        pending.cpu_output = output
