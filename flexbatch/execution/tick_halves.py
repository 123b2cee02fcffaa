"""What a tick computes: up to attention, then output projection and MLP, and last what waits for the CPU's experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from flexbatch.execution.attention import CacheAttention, PendingTick, Watch
from flexbatch.execution.ends import Ends
from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.execution.routed_rows import RoutedRows
from flexbatch.memory.handles import Handle
from flexbatch.memory.host_buffers import HostBuffers
from flexbatch.memory.rotary import Rotary
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weights import WeightStore
from flexbatch.models import layers
from flexbatch.models.arch import Arch
from flexbatch.models.experts import Elsewhere, RowsElsewhere
from flexbatch.models.routing import RoutingCounts
from flexbatch.policy.schedule import Tick
from flexbatch.trace import Tracer


class TickHalves:
    """The parts of a tick, which the executor calls in the order that keeps everything busy. ``routed``: what goes to
    the CPU's experts, None where it has none."""

    def __init__(
        self,
        arch: Arch,
        ends: Ends,
        weights: WeightStore,
        queues: TransferQueues,
        host_buffers: HostBuffers,
        rotary: Rotary,
        attention: CacheAttention,
        routing: RoutingCounts | None,
        routed: RoutedRows | None,
    ) -> None:
        self.arch, self.ends, self.weights, self.queues = arch, ends, weights, queues
        self.host_buffers, self.rotary, self.attention = host_buffers, rotary, attention
        self.routing, self.routed, self.ranks = routing, routed, ends.ranks
        self.tracer: Tracer = queues.tracer
        self.apart: dict[int, layers.Apart] = {}
        """By micro-batch, the hidden states that the next layer adds up, where none of them leave the device."""
        self.in_turn = False
        """Whether this pass has one micro-batch, so that nothing is computed beside the CPU's attention."""

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """While what is computed is recorded: spans would record events that no replay repeats, and sums between ranks
        are put in line with what computes."""
        tracer, self.tracer = self.tracer, Tracer()
        if self.ranks is not None:
            self.ranks.tracer, self.ranks.in_line = self.tracer, True
        try:
            yield
        finally:
            self.tracer = tracer
            if self.ranks is not None:
                self.ranks.tracer, self.ranks.in_line = tracer, False

    def begin_pass(self, tokens: list[int]) -> None:
        """What becomes of the experts in host memory in a pass whose micro-batches have so many tokens: whether the CPU
        computes some, and which, and whether the others cross the link only as they are hit."""
        self.weights.pass_tokens = sum(tokens)
        self.in_turn = len(tokens) == 1
        self.apart.clear()
        experts, hits = self.weights.cpu_experts, self.weights.hit_experts
        self.weights.fetches_hits = hits is not None and sum(tokens) <= hits.max_tokens
        if experts is None:
            return
        if self.routed is not None:
            self.routed.begin_pass()
        if self.routing is not None and self.routing.passes >= max(1, 2 * experts.passes):
            # After twice as many passes again: counts settle, and what crosses the link should not change every time.
            experts.choose(self.routing.total.cpu(), self.routing.passes)
        self.weights.leaves_experts = self.routed is not None and max(tokens, default=0) <= self.routed.max_tokens
        if not self.weights.leaves_experts:
            self.weights.fetch_experts()

    def most_deferred(self, inputs: Sequence[MicroBatchInputs]) -> int:
        """Ticks whose second halves may wait for the CPU's attention while later ones are begun.

        Two of three micro-batches that only decode: then the CPU always has the queries of the next tick. With one it
        waited until the GPU was done with the tick before: in a trace of gpt-oss-120b for 1.3 ms beside every 4.2 of a
        layer with a window. What two ticks leave on the GPU is little beside what a chunk of a prompt needs there.
        """
        several = len(inputs) > 2 and self.routed is None and self.ends.stages is None
        return 2 if several and all(each.decodes for each in inputs) and len(self.weights.slabs) != 2 else 1

    def begin(
        self, tick: Tick, inputs: MicroBatchInputs, gathered: Handle, buffer: int, watch: Watch | None = None
    ) -> PendingTick:
        """Up to and including attention; the CPU's share is only started. What weights and cache are waited for is no
        time of the GPU: spans that held it had GLM-4.5-Air compute for 381 ms of a pass that needs 46, and plans were
        made anew with smaller prompt budgets because of it."""
        self.weights.arrived(tick.layer)
        with self.tracer.compute_span(f"attention {tick.layer}.{tick.micro_batch}"):
            pending, (query, key, value) = self.project(tick, inputs, watch)
            groups = inputs.groups(self.attention.cache.windowed[tick.layer])
            if groups.cpu is not None:
                # Pages that are attended from staging take the host and the link a while, which the CPU uses.
                in_turn = self.in_turn and groups.staged is None
                self.attention.start_cpu_attention(pending, groups.cpu, query, key, value, in_turn)
            if groups.gpu is not None:
                self.attention.attend_resident(pending, groups.gpu, query, key, value)
        if groups.staged is not None:
            gathered.wait()
            with self.tracer.compute_span(f"staged {tick.layer}.{tick.micro_batch}"):
                self.attention.attend_staged(pending, groups.staged, buffer, query, key, value)
        return pending

    def project(
        self, tick: Tick, inputs: MicroBatchInputs, watch: Watch | None = None
    ) -> tuple[PendingTick, tuple[Tensor, Tensor, Tensor]]:
        """Up to attention: queries, keys and values, with room for what attention makes of them."""
        weights = self.weights.weights(tick.layer, "pre", inputs.num_tokens)
        apart = self.apart.pop(tick.micro_batch, None)
        hidden = self.ends.given(tick.layer, tick.micro_batch, inputs) if apart is None else apart.hidden
        given = hidden if apart is None else apart
        if watch is not None and tick.layer == 0:
            watch(-1, inputs, hidden)
        arguments = self.arch, tick.layer, weights, given, inputs.positions, self.rotary.tables, inputs.adapters
        query, key, value = layers.pre_attention(*arguments, self.ranks)
        output = query.new_empty(*query.shape[:-1], self.arch.value_dim)
        return PendingTick(tick, inputs, hidden, output, watch=watch), (query, key, value)

    def finish(self, pending: PendingTick, count: int) -> bool:
        """Output projection and MLP; returns whether this is all, or the CPU's experts have only been started."""
        tick, inputs = pending.tick, pending.inputs
        if pending.cpu_output is not None:
            assert inputs.cpu is not None
            pending.cpu_done.wait()
            self.queues.copy_to_device(pending.cpu_output, inputs.cpu.of(pending.attention))
            self.host_buffers.release(pending.cpu_output, self.queues.mark())
        with self.tracer.compute_span(f"mlp {tick.layer}.{tick.micro_batch}"):
            weights = self.weights.weights(tick.layer, "post", inputs.num_tokens)
            given, context = (weights, pending.hidden, pending.attention, inputs.adapters), self.context(tick.layer)
            inner = pending.watch is None and tick.layer < self.arch.num_layers - 1
            apart = inner and self.ends.activations.resident
            pending.halves = layers.post_attention(self.arch, tick.layer, *given, **context, apart=apart)
            try:
                next(pending.halves)
            except StopIteration as end:
                self.store(pending, end.value, count)
                return True
        return False

    def complete(self, pending: PendingTick, count: int) -> None:
        """With the results of the CPU's experts."""
        assert pending.halves is not None
        with self.tracer.compute_span(f"experts {pending.tick.layer}.{pending.tick.micro_batch}"):
            hidden = layers.end_of(pending.halves)
        self.store(pending, hidden, count)

    def store(self, pending: PendingTick, hidden: Tensor | layers.Apart, count: int) -> None:
        """The hidden states of a layer; the last micro-batch gives the layer's slab back."""
        tick = pending.tick
        if isinstance(hidden, layers.Apart):
            self.apart[tick.micro_batch] = hidden
        else:
            if pending.watch is not None:
                pending.watch(tick.layer, pending.inputs, hidden)
            self.ends.take(tick.layer, tick.micro_batch, pending.inputs, hidden)
        if tick.micro_batch == count - 1:
            self.weights.release(tick.layer, self.queues.mark())

    def context(self, layer: int) -> dict[str, Any]:
        """What `layers.post_attention` is told of ranks, and of a layer's experts."""
        if self.arch.experts is None:
            return {"ranks": self.ranks}
        return {
            "ranks": self.ranks,
            "routing": self.routing,
            "stacks": self.weights.experts(layer),
            "elsewhere": self.elsewhere(layer),
            "fetch_hit": partial(self.weights.fetch_hit, layer),
        }

    def elsewhere(self, layer: int) -> Elsewhere | None:
        """How rows get to the experts that are not in the layer's slab; None where all are."""
        left_out = self.weights.left_out(layer)
        if left_out is None:
            return None
        routed, experts = self.routed, self.weights.cpu_experts
        assert routed is not None and experts is not None, f"nobody computes {left_out} of layer {layer}"
        table = experts.table(layer)

        def start(x: Tensor, chosen: Tensor, scales: Tensor | None) -> RowsElsewhere:
            return routed.start(layer, x, chosen, scales, table, left_out)

        return start
