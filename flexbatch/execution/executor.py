"""Interprets the schedule: waits for exactly what a tick needs, computes, launches the next fetches and drains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flexbatch.execution.attention import CacheAttention, PendingTick, Watch
from flexbatch.execution.ends import Ends
from flexbatch.execution.graphs import CudaRecorder, DecodeGraphs
from flexbatch.execution.head import Head
from flexbatch.execution.input_builder import InputBuilder
from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.execution.layers_ahead import LayersAhead
from flexbatch.execution.pass_batch import Lead, LogitsChunk, NewestTokens, PassBatch
from flexbatch.execution.piece_graphs import PieceGraphs
from flexbatch.execution.resident import ResidentPass
from flexbatch.execution.routed_rows import RoutedRows
from flexbatch.execution.set_up import DECODE_GRAPHS, PIECE_GRAPHS, SetUp
from flexbatch.execution.tick_halves import TickHalves
from flexbatch.memory.activations import ActivationStore
from flexbatch.memory.handles import READY, Handle
from flexbatch.memory.host_buffers import HostBuffers
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.rotary import Rotary
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weights import WeightStore
from flexbatch.models.arch import Arch
from flexbatch.models.lora.applied import AdapterTables
from flexbatch.models.routing import RoutingCounts
from flexbatch.parallel.rank_links import RankLinks
from flexbatch.policy.decode_graphs import MAX_GRAPHS
from flexbatch.policy.limits import LOGITS_CHUNK_BYTES
from flexbatch.policy.schedule import Tick, after_next, ticks_of


class Executor:
    """Runs passes of one model. State is in the stores it is given; the executor itself holds none between passes.

    ``overlap=False`` waits for what a tick sends for before it computes, and for everything after it: the same
    ticks, the same tokens. ``logits_chunk_bytes``: float32 logits that are given at one time. ``max_graphs``: of
    decode passes that are kept; ``piece_buckets``: tokens of other passes that become graphs (`PieceGraphs`). routing:
    counts the tokens of experts. ``links``: to the ranks that have the rest of the model, None where it is here whole;
    ``lead``: of rank 0, which decides what a pass is. ``routed``: the way to the CPU's experts.
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
        piece_buckets: Sequence[int] = (),
        adapters: AdapterTables | None = None,
        routing: RoutingCounts | None = None,
        links: RankLinks | None = None,
        lead: Lead | None = None,
        routed: RoutedRows | None = None,
    ) -> None:
        self.arch, self.lead = arch, lead
        self.ends = Ends(arch, weights.tensors, activations, links, queues.tracer)
        self.ranks, self.stages = self.ends.ranks, self.ends.stages
        self.layers_ahead = LayersAhead(weights, overlap, self.stages is None)
        self.weights, self.cache, self.activations = weights, cache, activations
        self.queues, self.dtype, self.overlap = queues, dtype, overlap
        self.device, self.tracer = queues.device, queues.tracer
        self.uploads = host_buffers.uploads
        logit_rows = max(1, logits_chunk_bytes // (4 * arch.vocab_size))
        self.builder = InputBuilder(cache.layout.page_tokens, self.uploads, adapters, logit_rows)
        self.rotary, self.routing = rotary, routing
        attention = CacheAttention(arch, cache, queues, host_buffers, weights.tensors.embedding_weights)
        if routed is not None:
            routed.threads = attention.cpu_threads
        self.halves = TickHalves(arch, self.ends, weights, queues, host_buffers, rotary, attention, routing, routed)
        self.head = Head(self.halves, logit_rows)
        self.resident_pass = ResidentPass(self.halves, self.head)
        self.set_up = SetUp(self.device)
        self.graphs: DecodeGraphs | None = None
        self.pieces: PieceGraphs | None = None
        recordable = self.resident and overlap and self.stages is None
        assert recordable or self.ranks is None or not max_graphs, f"{max_graphs} graphs of what is not on this GPU"
        if self.device.type == "cuda" and recordable:
            sizes, group = (cache.layout.page_tokens, arch.max_positions), self.builder.adapters_at_once
            decode, pieces = (CudaRecorder(self.set_up, kind) for kind in (DECODE_GRAPHS, PIECE_GRAPHS))
            self.graphs = DecodeGraphs(self.device, *sizes, decode, max_graphs, group, cache.ring)
            self.pieces = PieceGraphs(self.halves, self.device, pieces, piece_buckets, group)

    @property
    def resident(self) -> bool:
        """Whether all that a pass needs lies on the compute device."""
        return self.weights.resident and self.cache.resident and self.activations.resident

    @property
    def on_one_gpu(self) -> bool:
        """Whether a pass needs nothing but this process's GPU."""
        return self.resident and self.device.type == "cuda" and self.ranks is None and self.stages is None

    def reach(self, longest: int) -> None:
        """Between passes: hold sequences of so many tokens. Graphs read the tables where these were."""
        if self.rotary.grow_to(longest):
            self.clear_graphs()

    def check(self) -> None:
        for each in (self.graphs, self.pieces):
            if each is not None:
                each.check()

    def clear_graphs(self) -> None:
        for each in (self.graphs, self.pieces):
            if each is not None:
                each.clear()

    def close(self) -> None:
        self.clear_graphs()

    def run(
        self, batch: PassBatch, newest: NewestTokens | None = None, watch: Watch | None = None
    ) -> Iterator[LogitsChunk]:
        """One sweep through all layers. Yields logits by chunks of rows; the pass is complete when the iterator is
        exhausted. newest: tokens that the pass before has drawn, and the host has not read. On the first stage of a
        pipeline an empty chunk comes when the layers here are launched; other passes may begin before it goes on."""
        chunks = self.sweep(batch, newest, watch)
        return chunks if self.lead is None else self.lead(chunks, batch, newest)

    def sweep(self, batch: PassBatch, newest: NewestTokens | None, watch: Watch | None) -> Iterator[LogitsChunk]:
        """`run` of this rank. Those other than 0 yield nothing."""
        inputs = self.begin_pass(batch, newest)
        count, num_layers = len(inputs), self.arch.num_layers + (self.stages is None)
        replays = self.graphs is not None and count == 1 and watch is None
        if replays and (result := self.replay(inputs[0], batch.greedy)) is not None:
            yield from self.replayed(inputs[0], result, batch.greedy)
            return
        self.weights.fetch_rest(0, count)
        gathers: dict[tuple[int, int], Handle] = {}
        self.fetch_cache(inputs, (0, 0), gathers)
        deferred, most_deferred = list[PendingTick](), self.halves.most_deferred(inputs)
        computing: list[PendingTick] = []  # with the CPU's experts: one micro-batch, while the next one is begun
        for tick in ticks_of(num_layers, count):
            with self.tracer.span("tick", f"layer {tick.layer} micro-batch {tick.micro_batch}"):
                while deferred and self.needed(tick, *deferred, *computing):
                    # Before the host waits for the CPU's experts, so that it has the next ones to compute.
                    self.finish(deferred.pop(0), computing, count)
                if computing and self.needed(tick, *computing):
                    self.complete(computing, count)
                self.fetch_cache(inputs, tick.fetch_inputs, gathers)
                if behind := bool(deferred):
                    self.layers_ahead.before_deferred(tick)
                else:
                    self.fetch_ahead(tick)
                if not self.overlap:
                    self.synchronize()
                if tick.layer == self.arch.num_layers:
                    yield from self.head.chunks(inputs[tick.micro_batch], tick.micro_batch, count, batch.greedy)
                else:
                    gathered = gathers.pop((tick.layer, tick.micro_batch), READY)
                    buffer = self.staging_buffer(tick.layer, tick.micro_batch, count)
                    pending = self.halves.begin(tick, inputs[tick.micro_batch], gathered, buffer, watch)
                    if pending.cpu_output is not None and self.overlap:
                        self.gather(inputs, after_next(tick, count), gathers)
                    # With CPU attention the second half waits until later ticks have given the CPU more work.
                    put_off = most_deferred if pending.cpu_output is not None and self.overlap else 0
                    while len(deferred) > max(0, put_off - 1):
                        self.finish(deferred.pop(0), computing, count)
                    if behind:
                        self.fetch_ahead(tick)
                    if pending.cpu_output is not None:
                        self.layers_ahead.before_waiting(tick, count, self.pages_of(tick.fetch_inputs, gathers))
                    deferred.append(pending)
                    if not put_off:
                        self.finish(deferred.pop(0), computing, count)
            if not self.overlap:
                self.synchronize()
        for pending in deferred:
            self.finish(pending, computing, count)
        self.complete(computing, count)
        if self.routing is not None:
            self.routing.end_pass()
        yield from self.returned(inputs, batch.greedy)
        self.layers_ahead.at_end(count)

    def returned(self, inputs: list[MicroBatchInputs], greedy: bool) -> Iterator[LogitsChunk]:
        """The head over what comes back from the last stage of a pipeline to the first."""
        if self.stages is None or not self.stages.is_first:
            return
        yield LogitsChunk((), torch.empty(0, self.arch.vocab_size, device=self.device))
        count = len(inputs)
        self.weights.fetch_rest(self.arch.num_layers, count)
        for k, each in self.ends.returned(inputs):
            yield from self.head.chunks(each, k, count, greedy)

    def begin_pass(self, batch: PassBatch, newest: NewestTokens | None) -> list[MicroBatchInputs]:
        """Send the inputs of the micro-batches, and let the stores know of them."""
        self.uploads.begin_pass()
        inputs = [self.builder.build(queries, newest) for queries in batch.micro_batches]
        if self.routing is not None:
            self.routing.begin_pass(inputs[0].num_tokens)
        self.cache.begin_pass(self.queues.mark())
        self.activations.plan([each.num_tokens for each in inputs])
        self.halves.begin_pass([each.num_tokens for each in inputs])
        return inputs

    # The CPU's experts

    def needed(self, tick: Tick, *pending: PendingTick) -> bool:
        """Whether one of these has to be done before the tick: it is of the same micro-batch, or the head follows."""
        head = tick.layer == self.arch.num_layers
        return any(head or each.tick.micro_batch == tick.micro_batch for each in pending)

    def finish(self, pending: PendingTick, computing: list[PendingTick], count: int) -> None:
        """The second half of a tick; what waits for the CPU's experts is left for later, and what was left is done."""
        all_done = self.halves.finish(pending, count)
        self.complete(computing, count)
        if not all_done:
            computing.append(pending)
        if not self.overlap:
            self.complete(computing, count)

    def complete(self, computing: list[PendingTick], count: int) -> None:
        """Wait for the CPU's experts."""
        for pending in computing:
            self.halves.complete(pending, count)
        computing.clear()

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
        """Start bringing a (layer, micro-batch) cell its KV pages, and its hidden states from the stage before."""
        if cell is None or cell[0] >= self.arch.num_layers:
            return
        self.ends.expect(*cell, inputs[cell[1]])
        self.gather(inputs, cell, gathers)

    def gather(
        self, inputs: list[MicroBatchInputs], cell: tuple[int, int], gathers: dict[tuple[int, int], Handle]
    ) -> None:
        """Start bringing a cell its KV pages, unless that was done: once the attention is launched that last read the
        buffer, of the cell two before. So it is, before the host waits for the CPU's attention and launches what
        follows it: the link stood still meanwhile, for 4 ms of every 62 of gpt-oss-120b."""
        if cell in gathers or cell[0] >= self.arch.num_layers:
            return
        layer, micro_batch = cell
        staged = inputs[micro_batch].groups(self.cache.windowed[layer]).staged
        if staged is not None:
            buffer = self.staging_buffer(layer, micro_batch, len(inputs))
            gathers[cell] = self.cache.gather(staged.gather, layer, buffer)

    def pages_of(self, cell: tuple[int, int] | None, gathers: dict[tuple[int, int], Handle]) -> Handle:
        """When the link has brought a cell its pages. Of pages on the disk only the host can wait."""
        return READY if cell is None or self.cache.sizes.disk_pages else gathers.get(cell, READY)

    @staticmethod
    def staging_buffer(layer: int, micro_batch: int, count: int) -> int:
        return (layer * count + micro_batch) % 2

    def synchronize(self) -> None:
        """Wait for everything that was launched (no overlap): page gathers, too, of which nobody has asked for the
        result yet."""
        self.queues.synchronize()
        self.weights.synchronize()
        self.activations.synchronize()
        self.cache.synchronize()
        self.queues.mark().synchronize()

    def replay(self, inputs: MicroBatchInputs, greedy: bool) -> Tensor | None:
        """A pass of a block that is on the GPU whole, as one graph or as several: hidden states, or tokens where all
        are ``greedy`` and it decodes; None when the pass has to run tick by tick."""
        assert self.graphs is not None
        resident, draws = self.resident_pass, self.head.draws(inputs, greedy)
        with self.tracer.compute_span("layers"):
            result = self.graphs.run(inputs, resident.tokens if draws else resident.hidden, draws)
            return self.pieces.run(inputs) if result is None and self.pieces is not None else result

    def replayed(self, inputs: MicroBatchInputs, result: Tensor, greedy: bool) -> Iterator[LogitsChunk]:
        """The rest of a pass that was one graph."""
        if result.ndim == 1:
            yield inputs.drawn_chunk(result)
        else:
            self.activations.set(0, result)
            yield from self.head.chunks(inputs, 0, 1, greedy)
        if self.routing is not None:
            self.routing.end_pass()
