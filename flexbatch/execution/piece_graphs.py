"""Passes of any query tokens as CUDA graphs, for blocks that live on the GPU whole: graphs of what lies between two
attentions, and attention launched by itself.

::

    graphs     | embedding, q k v of 0 |        | o, MLP of 0, q k v of 1 |        ...        | o, MLP of the last |
    launched                           | append, attend 0 |               | append, attend 1 |

Only attention knows which tokens belong together and how long their contexts are; all else depends on nothing but the
number of tokens. So a pass that mixes prompts with tokens to decode, or verifies token trees, finds its graphs by a
bucket of tokens. Without them such a pass costs what Python needs to launch it: 57 ms on an H200's host for the 32
layers of Llama-3-8B and 1,000 sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flexbatch.execution.attention import PendingTick
from flexbatch.execution.graphs import Record, Recorded
from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.execution.static_adapters import GroupAdapters, fill_adapters, static_adapters
from flexbatch.execution.tick_halves import TickHalves
from flexbatch.memory.handles import READY
from flexbatch.policy.decode_graphs import RECORDING_PASSES
from flexbatch.policy.schedule import Tick

Key = tuple[int, bool]
"""(bucket of tokens, whether any has an adapter)."""


@dataclass
class Pieces:
    """The graphs of a bucket, in the order in which they run, and what they read: a graph knows addresses, and does not
    keep the tensors there. An earlier version let the index of the last graph go, and ended its process."""

    graphs: list[Recorded]
    inputs: MicroBatchInputs


class PieceGraphs:
    """Captured pieces by `Key`, as many as there are buckets; they are captured once launching their bucket's passes
    kernel by kernel has cost about as much. Of more those that were not used for longest go. An earlier version
    captured a bucket when it came for the second time: the four prompts of a job of OPT-6.7B, which are one pass, took
    an H100 0.17 of 0.70 s so.

    All buckets read and write the beginnings of the same tensors. What lies there beyond the real tokens was real once
    or is zero: it is computed along, and goes nowhere.
    """

    recording_passes = RECORDING_PASSES
    """A bucket is captured when its passes come for this time."""

    def __init__(
        self,
        halves: TickHalves,
        device: torch.device,
        record: Record,
        buckets: Sequence[int],
        group_adapters: GroupAdapters = lambda adapter_ids: None,
    ) -> None:
        """buckets: numbers of tokens, the least first; none: every pass is launched kernel by kernel."""
        self.halves, self.device, self.record, self.buckets = halves, device, record, tuple(buckets)
        self.group_adapters, self.windowed = group_adapters, halves.attention.cache.windowed
        self.came: Counter[Key] = Counter()
        """Passes of those that are not captured."""
        self.captured: dict[Key, Pieces] = {}
        """The ones that were used last at the end."""
        self.passes = 0
        """That ran in pieces."""
        most = max(buckets, default=0)
        self.token_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self.positions = torch.zeros(most, dtype=torch.int64, device=device)
        self.index = torch.arange(most, device=device)
        self.projected: tuple[Tensor, ...] = ()
        """Queries, keys and values [most tokens, heads, width] of the layer at hand; of latent attention the keys are
        the values."""
        self.attention = self.hidden = torch.empty(0)
        """[most tokens, heads, width] of the layer at hand; [most tokens, hidden size] after the last layer."""

    def run(self, inputs: MicroBatchInputs) -> Tensor | None:
        """Hidden states of the rows that the head reads, or None when the pass has to run as usual (too many tokens,
        cache elsewhere, or its bucket is new)."""
        count = inputs.num_tokens
        bucket = next((bucket for bucket in self.buckets if bucket >= count), None)
        elsewhere = inputs.gpu is None or inputs.staged is not None or inputs.cpu is not None
        if bucket is None or elsewhere:
            return None
        key = bucket, inputs.adapters is not None
        if key not in self.captured:
            self.came[key] += 1
            if self.came[key] < self.recording_passes:
                return None
            while len(self.captured) >= len(self.buckets):
                self.evict(next(iter(self.captured)))
            self.captured[key] = self.capture(bucket, inputs)
        pieces = self.captured[key] = self.captured.pop(key)
        fill_adapters(pieces.inputs.adapters, inputs.adapter_ids, self.group_adapters)
        self.token_ids[:count].copy_(inputs.token_ids)
        self.positions[:count].copy_(inputs.positions)
        attend = [self.attending(inputs, windowed) for windowed in (False, True)]
        for layer, graph in enumerate(pieces.graphs):
            if layer:
                attend[self.windowed[layer - 1]](layer - 1)
            graph.replay()
        self.passes += 1
        return self.hidden.index_select(0, inputs.logit_index)

    def attending(self, inputs: MicroBatchInputs, windowed: bool) -> Callable[[int], None]:
        """The part of a layer that depends on which tokens belong together. Of the tensors that all layers share the
        real tokens are cut out once a pass."""
        attention, group = self.halves.attention, inputs.groups(windowed).gpu
        assert group is not None
        query, key, value, out = (
            each[group.start : group.end]
            for each in (self.projected[0], self.projected[1], self.projected[-1], self.attention)
        )

        def attend(layer: int) -> None:
            rows = attention.cache.rows("gpu", layer)
            attention.append(rows, group.slots, key, value)
            attention.attend(out, layer, query, rows, group)

        return attend

    def capture(self, bucket: int, inputs: MicroBatchInputs) -> Pieces:
        """Record the pieces for so many tokens. They run, and no keys and values are stored."""
        static = replace(
            inputs,
            queries=(),
            decoding=None,
            token_ids=self.token_ids[:bucket],
            host_token_ids=torch.empty(0, dtype=torch.int64),
            positions=self.positions[:bucket],
            host_positions=torch.empty(0, dtype=torch.int64),
            gpu=None,
            logit_rows=(),
            logit_index=self.index[:bucket],
            windows=None,
            adapters=static_adapters(bucket, inputs.adapters, self.device),
        )
        fill_adapters(static.adapters, inputs.adapter_ids, self.group_adapters)
        halves, routing = self.halves, self.halves.routing
        if not self.projected:
            self.allocate(static)
        graphs: list[Recorded] = []
        given = torch.empty(0)
        try:
            with halves.recorded(), nullcontext() if routing is None else routing.of_pieces():
                for layer in range(halves.arch.num_layers + 1):
                    # The memory of what a piece is given may become that of a later one: by then it has been read.
                    graph, given = self.record(partial(self.piece, layer, given, static))
                    graphs.append(graph)
                    # The next piece runs once before it is recorded, and should not be given anything.
                    graph.replay()
        except BaseException:
            for graph in graphs:
                graph.reset()
            raise
        if routing is not None:
            routing.of_pass.zero_()
        return Pieces(graphs, static)

    def piece(self, layer: int, given: Tensor, static: MicroBatchInputs) -> Tensor:
        """From the attention of the layer before, which was ``given`` these hidden states, to that of ``layer``: the
        hidden states that it is given."""
        halves, bucket = self.halves, static.num_tokens
        if layer:
            before = PendingTick(Tick(layer - 1, 0, None, None, None), static, given, self.attention[:bucket])
            halves.finish(before, 1)
        if layer == halves.arch.num_layers:
            return self.hidden[:bucket].copy_(halves.ends.activations.get(0))
        # The recorder runs a piece before it records it: what that has expanded of the layer is to be expanded anew.
        halves.weights.release(layer, READY)
        pending, projected = halves.project(Tick(layer, 0, None, None, None), static)
        for target, part in zip(self.projected, projected, strict=False):
            target[:bucket].copy_(part)
        return pending.hidden

    def allocate(self, static: MicroBatchInputs) -> None:
        """The tensors between pieces and attention. All layers have the same heads."""
        pending, (query, key, value) = self.halves.project(Tick(0, 0, None, None, None), static)
        most = max(self.buckets)
        parts = [query, key] if value is key else [query, key, value]
        self.projected = tuple(part.new_zeros(most, *part.shape[1:]) for part in parts)
        self.attention = pending.attention.new_zeros(most, *pending.attention.shape[1:])
        self.hidden = pending.hidden.new_zeros(most, *pending.hidden.shape[1:])

    def evict(self, key: Key) -> None:
        """Let go of the graphs of a bucket; it has to come twice again."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        for graph in self.captured.pop(key).graphs:
            graph.reset()
        self.came.pop(key, None)

    def clear(self) -> None:
        """Let go of all graphs: tables that they read are elsewhere now."""
        for key in list(self.captured):
            self.evict(key)
        self.came.clear()

    def check(self) -> None:
        """Invariants: only buckets that came before, each with a graph before, between and after all attentions."""
        assert self.captured.keys() <= self.came.keys() and {bucket for bucket, _ in self.came} <= set(self.buckets)
        assert len(self.captured) <= len(self.buckets), (self.captured.keys(), self.buckets)
        for pieces in self.captured.values():
            assert len(pieces.graphs) == self.halves.arch.num_layers + 1
