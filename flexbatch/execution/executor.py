"""Interprets the schedule: waits for exactly what a tick needs, computes, launches the next fetches and drains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.execution.graphs import MAX_GRAPHS, CudaRecorder, DecodeGraphs
from flexbatch.execution.inputs import AttentionGroup, InputBuilder, MicroBatchInputs, StagedGroup
from flexbatch.execution.work import LogitsChunk, PassWork
from flexbatch.kernels import ops
from flexbatch.memory.activations import ActivationStore
from flexbatch.memory.host_buffers import HostBuffers
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.rotary import Rotary
from flexbatch.memory.transfer import READY, Handle, TransferQueues
from flexbatch.memory.weights import WeightStore
from flexbatch.models import layers
from flexbatch.models.arch import Arch
from flexbatch.policy.limits import LOGITS_CHUNK_BYTES
from flexbatch.policy.schedule import Tick, zigzag
from flexbatch.trace import Tracer

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


class Executor:
    """Runs passes of one model. State is in the stores it is given; the executor itself holds none between passes.

    ``overlap=False`` waits for what a tick sends for before it computes, and for everything after it: the same
    ticks, the same tokens. ``logits_chunk_bytes``: float32 logits that are given at one time. ``max_graphs``: of
    decode passes that are kept.
    """

    def __init__(
        self,
        arch: Arch,
        weights: WeightStore,
        cache: KVCache,
        activations: ActivationStore,
        queues: TransferQueues,
        host_buffers: HostBuffers,
        rotary: Rotary,
        dtype: torch.dtype,
        overlap: bool,
        logits_chunk_bytes: int = LOGITS_CHUNK_BYTES,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        self.arch, self.weights, self.cache, self.activations = arch, weights, cache, activations
        self.queues, self.dtype, self.overlap = queues, dtype, overlap
        self.logits_chunk_bytes = logits_chunk_bytes
        self.device, self.tracer = queues.device, queues.tracer
        self.uploads = host_buffers.uploads
        self.builder = InputBuilder(cache.layout.page_tokens, self.uploads)
        self.rotary = rotary
        slopes = arch.alibi_slopes()
        self.slopes = (
            {
                device: torch.tensor(slopes, dtype=torch.float32, device=device)
                for device in {self.device, torch.device("cpu")}
            }
            if slopes
            else {}
        )
        self.host_buffers = host_buffers
        threads = torch.get_num_threads()
        self.attention_threads = threads - 1 if self.device.type == "cuda" and threads >= SPARE_FROM_THREADS else 0
        """Of CPU attention; 0: torch's number."""
        resident = self.device.type == "cuda" and weights.resident and cache.resident and activations.resident
        self.graphs: DecodeGraphs | None = None
        if resident and overlap:
            self.graphs = DecodeGraphs(
                self.device, cache.layout.page_tokens, arch.max_positions, CudaRecorder(), max_graphs
            )

    def reach(self, longest: int) -> None:
        """Between passes: hold sequences of so many tokens. Graphs read the tables where these were."""
        if self.rotary.reach(longest) and self.graphs is not None:
            self.graphs.clear()

    def check(self) -> None:
        if self.graphs is not None:
            self.graphs.check()

    def close(self) -> None:
        if self.graphs is not None:
            self.graphs.clear()

    def run(self, work: PassWork, watch: Watch | None = None) -> Iterator[LogitsChunk]:
        """One sweep through all layers. Yields logits by blocks of rows; the pass is complete when the iterator is
        exhausted."""
        self.uploads.begin_pass()
        inputs = [self.builder.build(queries) for queries in work.micro_batches]
        count, num_layers = len(inputs), self.arch.num_layers + 1
        self.cache.begin_pass(self.queues.mark())
        self.activations.plan([batch.num_tokens for batch in inputs])
        if self.graphs is not None and count == 1 and watch is None and (hidden := self.replay(inputs[0])) is not None:
            self.activations.set(0, hidden)
            yield from self.head(inputs[0], num_layers - 1, 0, count)
            return
        self.weights.fetch_rest(0, count)
        gathers: dict[tuple[int, int], Handle] = {}
        self.fetch_cache(inputs, (0, 0), gathers)
        deferred: PendingTick | None = None
        for tick in zigzag(num_layers, count):
            with self.tracer.span("tick", f"layer {tick.layer} micro-batch {tick.micro_batch}"):
                if deferred and (deferred.tick.micro_batch == tick.micro_batch or tick.layer == num_layers - 1):
                    self.finish(deferred, count)
                    deferred = None
                self.fetch_cache(inputs, tick.fetch_inputs, gathers)
                if deferred is None:
                    self.fetch_ahead(tick)
                elif tick.fetch_weights is not None and self.weights.has_free_slab:
                    # A third slab: the link need not wait for the second half of the layer before.
                    self.weights.fetch(*tick.fetch_weights)
                if not self.overlap:
                    self.settle()
                if tick.layer == num_layers - 1:
                    yield from self.head(inputs[tick.micro_batch], tick.layer, tick.micro_batch, count)
                else:
                    gathered = gathers.pop((tick.layer, tick.micro_batch), READY)
                    begun = self.begin(
                        tick,
                        inputs[tick.micro_batch],
                        gathered,
                        self.staging_buffer(tick.layer, tick.micro_batch, count),
                        watch,
                    )
                    if deferred:
                        self.finish(deferred, count)
                        self.fetch_ahead(tick)
                    if begun.cpu_output is not None and tick.fetch_weights is not None:
                        # The host is about to wait for the CPU's share: what the link needs until then has to be queued
                        # now. With one slice a tick both links idled by turns (OPT-30B, 92 sequences on the CPU: 1.26 s
                        # a pass where the link needs 1.0).
                        self.weights.fetch_rest(tick.fetch_weights[0], count)
                    # With CPU attention the second half waits until the next tick has given the CPU more work.
                    deferred = begun if begun.cpu_output is not None and self.overlap else None
                    if deferred is None:
                        self.finish(begun, count)
            if not self.overlap:
                self.settle()
        # Only the head's slab was missing for the second layer of the next pass.
        if self.overlap and num_layers > 2:
            self.weights.fetch_rest(1, count)

    # What travels

    def fetch_ahead(self, tick: Tick) -> None:
        """The tick's slice of the next layer's weights, and the hidden states of the next tick."""
        if tick.fetch_weights is not None:
            self.weights.fetch(*tick.fetch_weights)
        if tick.fetch_inputs is not None:
            self.activations.fetch(tick.fetch_inputs[1])

    def fetch_cache(
        self, inputs: list[MicroBatchInputs], cell: tuple[int, int] | None, gathers: dict[tuple[int, int], Handle]
    ) -> None:
        """Start bringing the KV pages of a (layer, micro-batch) cell to its staging buffer."""
        if cell is None or cell[0] >= self.arch.num_layers:
            return
        staged = inputs[cell[1]].staged
        if staged is not None:
            gathers[cell] = self.cache.gather(
                staged.gather, cell[0], self.staging_buffer(cell[0], cell[1], len(inputs))
            )

    @staticmethod
    def staging_buffer(layer: int, micro_batch: int, count: int) -> int:
        return (layer * count + micro_batch) % 2

    def settle(self) -> None:
        """Wait for everything that was launched (no overlap): page gathers, too, of which nobody has asked for the
        result yet."""
        self.queues.settle()
        for lease in self.weights.leases.values():
            for handle in lease.handles:
                handle.synchronize()
        self.activations.synchronize()
        self.cache.synchronize()
        self.queues.mark().synchronize()

    # The two halves of a tick

    def begin(
        self, tick: Tick, inputs: MicroBatchInputs, gathered: Handle, buffer: int, watch: Watch | None = None
    ) -> PendingTick:
        """Up to and including attention; the CPU's share is only started."""
        weights = self.weights.weights(tick.layer, "pre")
        hidden = self.embed(inputs) if tick.layer == 0 else self.activations.get(tick.micro_batch)
        if watch is not None and tick.layer == 0:
            watch(-1, inputs, hidden)
        with self.tracer.compute_span(f"attention {tick.layer}.{tick.micro_batch}"):
            query, key, value = layers.pre_attention(
                self.arch, tick.layer, weights, hidden, inputs.positions, self.rotary.tables
            )
            begun = PendingTick(tick, inputs, hidden, torch.empty_like(query), watch=watch)
            if inputs.cpu is not None:
                self.start_cpu_attention(begun, inputs.cpu, query, key, value)
            if inputs.gpu is not None:
                part = slice(inputs.gpu.start, inputs.gpu.end)
                rows = self.cache.rows("gpu", tick.layer)
                ops.append_rows(
                    rows, inputs.gpu.slots, key[part], value[part], self.cache.layout.bits, self.cache.layout.group
                )
                self.attend(begun.attention[part], tick.layer, query[part], rows, inputs.gpu, inputs.positions[part])
            if inputs.staged is not None:
                self.attend_staged(begun, inputs.staged, gathered, buffer, query, key, value)
        return begun

    def attend(
        self,
        out: Tensor,
        layer: int,
        query: Tensor,
        rows: Tensor,
        group: AttentionGroup,
        positions: Tensor,
        threads: int = 0,
    ) -> None:
        """Attention of one group over token rows that already hold its own keys and values."""
        arch, layout = self.arch, self.cache.layout
        ops.paged_attention(
            query,
            rows,
            group.page_table,
            group.query_starts,
            group.context_lens,
            num_kv_heads=arch.num_kv_heads,
            page_tokens=layout.page_tokens,
            scale=arch.attention_scale,
            bits=layout.bits,
            group=layout.group,
            alibi_slopes=self.slopes.get(query.device),
            alibi_scale=arch.attention_scale if arch.scaled_alibi else 0.0,
            window=arch.window(layer),
            soft_cap=arch.soft_cap,
            tree_masks=group.tree_masks,
            positions=None if group.tree_masks is None else positions.to(torch.int32),
            max_query_len=group.max_query_len,
            max_context_len=group.max_context_len,
            out=out,
            threads=threads,
        )

    def attend_staged(
        self,
        begun: PendingTick,
        staged: StagedGroup,
        gathered: Handle,
        buffer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        """Attention over staging; the new token rows go home beside it."""
        layer, group, layout = begun.tick.layer, staged.attention, self.cache.layout
        gathered.wait()
        part = slice(group.start, group.end)
        rows = self.cache.staging_rows(buffer)
        ops.append_rows(rows, group.slots, key[part], value[part], layout.bits, layout.group)
        new_rows = rows.index_select(0, group.slots)
        written = self.queues.mark()
        if staged.num_cpu_tokens:
            self.cache.drain_cpu(layer, new_rows[: staged.num_cpu_tokens], staged.cpu_slots, written)
        if staged.disk_tables:
            self.cache.drain_disk(layer, new_rows[staged.num_cpu_tokens :], staged.disk_tables, written)
        self.attend(begun.attention[part], layer, query[part], rows, group, begun.inputs.positions[part])
        self.cache.release_staging(buffer, self.queues.mark())

    def start_cpu_attention(
        self, begun: PendingTick, group: AttentionGroup, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Send queries, keys and values of the CPU's share down, and let the CPU append and attend where the cache
        lies."""
        layer, part, layout = begun.tick.layer, slice(group.start, group.end), self.cache.layout
        host_query, host_key, host_value, output = self.host_buffers.take(query[part], key[part], value[part])
        arrived = self.queues.mark()
        rows, positions = self.cache.rows("cpu", layer), begun.inputs.host_positions[part]
        drained = self.cache.drained[layer]

        def attend() -> None:
            drained.synchronize()
            ops.append_rows(rows, group.slots, host_key, host_value, layout.bits, layout.group)
            self.attend(output, layer, host_query, rows, group, positions, self.attention_threads)

        num_bytes = int(group.context_lens.sum()) * layout.token_bytes
        begun.cpu_done = self.queues.cpu_attention.submit(
            attend, arrived, f"cache {layer}.{begun.tick.micro_batch}", num_bytes
        )
        begun.cpu_output = output

    def finish(self, begun: PendingTick, count: int) -> None:
        """Output projection and MLP, then the hidden states go home; the last micro-batch of a layer gives the
        layer's slab back."""
        tick = begun.tick
        if begun.cpu_output is not None:
            assert begun.inputs.cpu is not None
            begun.cpu_done.wait()
            self.queues.copy_to_device(begun.cpu_output, begun.attention[begun.inputs.cpu.start : begun.inputs.cpu.end])
            self.host_buffers.give_back(begun.cpu_output, self.queues.mark())
        weights = self.weights.weights(tick.layer, "post")
        with self.tracer.compute_span(f"mlp {tick.layer}.{tick.micro_batch}"):
            hidden = layers.post_attention(self.arch, tick.layer, weights, begun.hidden, begun.attention)
        if begun.watch is not None:
            begun.watch(tick.layer, begun.inputs, hidden)
        if tick.layer == self.arch.num_layers - 1:
            # Only the rows that the head reads go on.
            hidden = hidden.index_select(0, begun.inputs.logit_index)
            self.activations.set(tick.micro_batch, hidden)
        else:
            self.activations.put(tick.micro_batch, hidden)
        if tick.micro_batch == count - 1:
            self.weights.release(tick.layer, self.queues.mark())

    def embed(self, inputs: MicroBatchInputs) -> Tensor:
        rows, position_rows = self.weights.gather_rows("embed.weight", inputs.token_ids, inputs.host_token_ids), None
        if self.arch.position == "learned":
            offset = self.arch.position_offset
            position_rows = self.weights.gather_rows(
                "pos_embed.weight", inputs.positions + offset, inputs.host_positions + offset
            )
        return layers.embed(self.arch, self.weights.embedding_weights, rows, position_rows)

    def head(self, inputs: MicroBatchInputs, layer: int, micro_batch: int, count: int) -> Iterator[LogitsChunk]:
        """Logits of the rows that were asked for, in blocks."""
        weights = self.weights.weights(layer, "head")
        hidden = self.activations.get(micro_batch)
        step = max(1, self.logits_chunk_bytes // (4 * self.arch.vocab_size))
        for start in range(0, len(hidden), step):
            with self.tracer.compute_span(f"head {micro_batch}"):
                logits = layers.head(self.arch, weights, hidden[start : start + step])
            yield LogitsChunk(inputs.logit_rows[start : start + step], logits)
        if micro_batch == count - 1:
            self.weights.release(layer, self.queues.mark())

    def replay(self, inputs: MicroBatchInputs) -> Tensor | None:
        """A decode pass of a block that is on the GPU whole, as one graph; None when the pass has to run tick by
        tick."""
        assert self.graphs is not None
        with self.tracer.compute_span("layers"):
            return self.graphs.run(inputs, self.resident_layers)

    def resident_layers(self, inputs: MicroBatchInputs) -> Tensor:
        """All layers without a tick's transfers. Runs under capture: spans would record events that no replay
        repeats."""
        tracer, self.tracer = self.tracer, Tracer()
        try:
            for layer in range(self.arch.num_layers):
                tick = Tick(layer, 0, None, None, None)
                self.finish(self.begin(tick, inputs, READY, 0), 1)
            return self.activations.get(0)
        finally:
            self.tracer = tracer
