"""Decode passes as CUDA graphs, for blocks that live on the GPU whole: one launch for all layers instead of a thousand.

Without them such a pass costs what Python needs to launch it: 30 ms for the 32 layers of OPT-6.7B on the H200 machine, where reading the weights takes 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexbatch.execution.inputs import AttentionGroup, MicroBatchInputs

MAX_SEQUENCES = 512
CONTEXT_STEP = 512
"""Tokens. The longest context is rounded up to a multiple; it only decides how a sequence's keys are split over the chip."""

Layers = Callable[[MicroBatchInputs], Tensor]
"""Runs all layers on static inputs: hidden states [num_sequences, hidden_size] after the last one."""


def bucket_of(num_sequences: int) -> int:
    """Sequences that a graph is captured for: powers of two up to 32, then multiples of 32."""
    if num_sequences <= 32:
        return 1 << (num_sequences - 1).bit_length()
    return -(-num_sequences // 32) * 32


def smallest_covering(keys: Iterable[tuple[int, int]], key: tuple[int, int]) -> tuple[int, int] | None:
    """The least of ``keys`` (sequences, longest context) with room for ``key``, None when there is none."""
    return min((other for other in keys if other[0] >= key[0] and other[1] >= key[1]), default=None)


@dataclass
class Captured:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: MicroBatchInputs
    hidden: Tensor


class DecodeGraphs:
    """Captured decode passes by (sequences, longest context), sharing one memory pool; a bucket is captured when it comes for the second time.

    The first time it runs in the smallest graph that covers it: at the end of a job, where sequences leave with every pass, most sizes come only once
    (OPT-1.3B on the H200 machine: 17 to 22 ms launched one by one, 14 in the graph for 512).

    Places beyond the real sequences repeat the first one: they compute the same keys and values and write them to the same slot.
    """

    def __init__(self, device: torch.device, page_tokens: int, max_positions: int) -> None:
        self.device, self.page_tokens, self.max_positions = device, page_tokens, max_positions
        self.pool = torch.cuda.graph_pool_handle()
        self.seen: set[tuple[int, int]] = set()
        self.captured: dict[tuple[int, int], Captured] = {}

    def run(self, inputs: MicroBatchInputs, layers: Layers) -> Tensor | None:
        """Hidden states [num_sequences, hidden_size] of a decode pass, or None when it has to run as usual (no plain decode, or its bucket is new)."""
        group = inputs.gpu
        if group is None or group.max_query_len > 1 or group.tree_masks is not None or len(inputs.logit_rows) != inputs.num_tokens:
            return None
        if inputs.num_tokens > MAX_SEQUENCES:
            return None
        key = (bucket_of(inputs.num_tokens), min(-(-group.max_context_len // CONTEXT_STEP) * CONTEXT_STEP, self.max_positions))
        if key not in self.captured and key in self.seen:
            self.captured[key] = self.capture(*key, inputs, layers)
        self.seen.add(key)
        covering = smallest_covering(self.captured, key)
        if covering is None:
            return None
        captured = self.captured[covering]
        fill(captured.inputs, inputs)
        captured.graph.replay()
        return captured.hidden[: inputs.num_tokens]

    def capture(self, bucket: int, max_context_len: int, inputs: MicroBatchInputs, layers: Layers) -> Captured:
        """Record the layers over static inputs; nothing runs yet."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        group = AttentionGroup(
            start=0,
            end=bucket,
            page_table=zeros(bucket, -(-max_context_len // self.page_tokens), dtype=torch.int32),
            query_starts=torch.arange(bucket + 1, dtype=torch.int32, device=self.device),
            context_lens=zeros(bucket, dtype=torch.int32),
            slots=zeros(bucket, dtype=torch.int64),
            tree_masks=None,
            max_query_len=1,
            max_context_len=max_context_len,
        )
        positions = zeros(bucket, dtype=torch.int64)
        static = replace(
            inputs,
            queries=(),
            token_ids=zeros(bucket, dtype=torch.int64),
            host_token_ids=torch.empty(0, dtype=torch.int64),
            positions=positions,
            host_positions=torch.empty(0, dtype=torch.int64),
            gpu=group,
            logit_rows=(),
            logit_index=torch.arange(bucket, device=self.device),
        )
        fill(static, inputs)
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            hidden = layers(static)
        return Captured(graph, static, hidden)


def fill(static: MicroBatchInputs, inputs: MicroBatchInputs) -> None:
    """Copy the inputs of a pass into a graph's static tensors."""
    assert static.gpu is not None and inputs.gpu is not None
    pairs = (
        (static.token_ids, inputs.token_ids),
        (static.positions, inputs.positions),
        (static.gpu.page_table, inputs.gpu.page_table),
        (static.gpu.context_lens, inputs.gpu.context_lens),
        (static.gpu.slots, inputs.gpu.slots),
    )
    count = inputs.num_tokens
    for target, source in pairs:
        place = target[:, : source.shape[1]] if target.ndim == 2 else target
        place[:count].copy_(source)
        place[count:].copy_(source[:1].expand_as(place[count:]))
