"""Decode passes as CUDA graphs, for blocks that live on the GPU whole: one launch for all layers instead of a thousand.

Without them such a pass costs what Python needs to launch it: 30 ms for the 32 layers of OPT-6.7B on the H200
machine, where reading the weights takes 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from flexbatch.execution.garbage import no_collection
from flexbatch.execution.inputs import AttentionGroup, CacheGroups, MicroBatchInputs
from flexbatch.execution.set_up import SetUp
from flexbatch.execution.static_adapters import GroupAdapters, fill_adapters, static_adapters
from flexbatch.policy.decode_graphs import CONTEXT_STEP, MAX_GRAPHS, RECORDING_PASSES, bucket_of, wasted_by
from flexbatch.policy.limits import MAX_GRAPH_SEQUENCES

Key = tuple[int, int, bool, bool]
"""(sequences, longest context, whether any has an adapter, whether tokens are drawn)."""
Layers = Callable[[MicroBatchInputs], Tensor]
"""Runs all layers on static inputs: hidden states [num_sequences, hidden_size] after the last one, or the tokens
[num_sequences] that are drawn from them."""


def smallest_covering(keys: Iterable[Key], key: Key) -> Key | None:
    """The least of ``keys`` with room for ``key``, None when there is none."""
    alike = (other for other in keys if other[-1] == key[-1])
    covering = (other for other in alike if all(has >= wants for has, wants in zip(other, key, strict=True)))
    return min(covering, default=None)


class Recorded(Protocol):
    """What launches the recorded kernels again."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


Record = Callable[[Callable[[], Tensor]], tuple[Recorded, Tensor]]
"""Records what a call launches, without running it; gives what replays it, and the call's result, which each replay
writes anew."""


class CudaRecorder:
    """Records into one memory pool: intermediate results of one graph take the place of another's. The allocator
    gives up a pool with the last graph in it, so the next graph gets a new one. Work is done once before it is
    recorded: kernels are chosen by the number of tokens, and while it is recorded, none may be loaded.

    `torch.cuda.graph` would wait for the device and give all cached memory back to the driver before every graph, of
    which a pass in pieces has one for every layer; its stream is used, for which the workspaces of cuBLAS are there.
    """

    def __init__(self, set_up: SetUp, kind: str) -> None:
        """kind: of set-up, that a graph is."""
        self.pool = torch.cuda.graph_pool_handle()
        self.num_graphs = 0
        self.set_up, self.kind = set_up, kind

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Recorded, Tensor]:
        with self.set_up.making(self.kind):
            return self.recorded(work)

    def recorded(self, work: Callable[[], Tensor]) -> tuple[Recorded, Tensor]:
        work()
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with no_collection(), torch.cuda.stream(torch.cuda.graph(graph).capture_stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                hidden = work()
            finally:
                graph.capture_end()
        self.num_graphs += 1
        return PooledGraph(graph, self), hidden

    def forget(self) -> None:
        """One graph less."""
        self.num_graphs -= 1
        if not self.num_graphs:
            self.pool = torch.cuda.graph_pool_handle()


@dataclass(frozen=True)
class PooledGraph:
    graph: torch.cuda.CUDAGraph
    recorder: CudaRecorder

    def replay(self) -> None:
        self.graph.replay()

    def reset(self) -> None:
        self.graph.reset()
        self.recorder.forget()


@dataclass
class Captured:
    """A graph with the tensors that it reads and writes."""

    graph: Recorded
    inputs: MicroBatchInputs
    result: Tensor


class DecodeGraphs:
    """Captured decode passes by `Key`. Of more than ``most`` the one that was not used for longest goes.
    group_adapters: of tokens with these adapters.

    A bucket runs in the smallest graph that covers it until the places that it leaves empty there have cost as much as
    its own would, and where none does, it is captured when it comes for the second time. At the end of a job, where
    sequences leave with every pass, most sizes come only once: OPT-1.3B took the H200 machine 17 to 22 ms launched one
    by one and 14 in the graph for 512. An earlier version captured every bucket that came twice: a job that came twice
    paid for the end of the first one in the second, 500 prompts of Llama-3-8B on an H100 with twelve graphs and what
    was compiled for them.

    Places beyond the real sequences repeat the first one: they compute the same keys and values and write them to
    the same slot.
    """

    def __init__(
        self,
        device: torch.device,
        page_tokens: int,
        max_positions: int,
        record: Record,
        most: int = MAX_GRAPHS,
        group_adapters: GroupAdapters = lambda adapter_ids: None,
        ring: int = 0,
    ) -> None:
        """ring: pages of a sequence in layers that keep only their window."""
        self.device, self.page_tokens, self.max_positions, self.record, self.most = (
            device,
            page_tokens,
            max_positions,
            record,
            most,
        )
        self.group_adapters, self.ring = group_adapters, ring
        self.wasted: dict[Key, float] = {}
        """Of each bucket so far, `wasted_by`."""
        self.captured: dict[Key, Captured] = {}
        """The one that was used last at the end."""

    def run(self, inputs: MicroBatchInputs, layers: Layers, draws: bool = False) -> Tensor | None:
        """What ``layers`` give of a decode pass, or None when it has to run as usual (no plain decode, or its bucket is
        new and no graph covers it). draws: they give tokens."""
        group = inputs.gpu
        if (
            group is None
            or group.max_query_len > 1
            or group.tree_masks is not None
            or len(inputs.logit_index) != inputs.num_tokens
        ):
            return None
        if inputs.num_tokens > MAX_GRAPH_SEQUENCES or not self.most:
            return None
        key = (
            bucket_of(inputs.num_tokens),
            min(-(-group.max_context_len // CONTEXT_STEP) * CONTEXT_STEP, self.max_positions),
            inputs.adapters is not None,
            draws,
        )
        wasted = self.wasted.setdefault(key, 0.0)
        if key not in self.captured and wasted >= RECORDING_PASSES:
            while len(self.captured) >= self.most:
                self.evict(next(iter(self.captured)))
            self.captured[key] = self.capture(key[0], key[1], inputs, layers)
        covering = smallest_covering(self.captured, key)
        self.wasted[key] += wasted_by(key[0], covering and covering[0])
        if covering is None:
            return None
        captured = self.captured[covering] = self.captured.pop(covering)
        self.fill(captured.inputs, inputs)
        captured.graph.replay()
        return captured.result[: inputs.num_tokens]

    def capture(self, bucket: int, max_context_len: int, inputs: MicroBatchInputs, layers: Layers) -> Captured:
        """Record the layers over static inputs; nothing runs yet."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        positions = zeros(bucket, dtype=torch.int64)
        static = replace(
            inputs,
            queries=(),
            decoding=None,
            token_ids=zeros(bucket, dtype=torch.int64),
            host_token_ids=torch.empty(0, dtype=torch.int64),
            positions=positions,
            host_positions=torch.empty(0, dtype=torch.int64),
            gpu=self.static_group(bucket, max_context_len),
            windows=None
            if inputs.windows is None
            else CacheGroups(self.static_group(bucket, min(max_context_len, self.ring * self.page_tokens)), None, None),
            logit_rows=(),
            logit_index=torch.arange(bucket, device=self.device),
            adapters=static_adapters(bucket, inputs.adapters, self.device),
        )
        self.fill(static, inputs)
        graph, result = self.record(lambda: layers(static))
        return Captured(graph, static, result)

    def static_group(self, bucket: int, max_context_len: int) -> AttentionGroup:
        """Room for the pages of so many sequences, each of so many tokens."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        return AttentionGroup(
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

    def fill(self, static: MicroBatchInputs, inputs: MicroBatchInputs) -> None:
        """Copy the inputs of a pass into a graph's static tensors."""
        fill(static, inputs)
        fill_adapters(static.adapters, inputs.adapter_ids, self.group_adapters)

    def evict(self, key: Key) -> None:
        """Let go of a graph. Its bucket begins anew: passes that go round among more buckets than are kept would
        capture all the time."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.captured.pop(key).graph.reset()
        del self.wasted[key]

    def clear(self) -> None:
        for key in list(self.captured):
            self.evict(key)

    def check(self) -> None:
        """Invariant: no more graphs than the budget holds, each of a bucket that came before."""
        assert len(self.captured) <= self.most, (len(self.captured), self.most)
        early = [key for key in self.captured if self.wasted.get(key, 0.0) < RECORDING_PASSES]
        assert not early, f"graphs of {early}, which were not worth one"


def fill(static: MicroBatchInputs, inputs: MicroBatchInputs) -> None:
    """Copy the inputs of a pass into a graph's static tensors."""
    pairs = [(static.token_ids, inputs.token_ids), (static.positions, inputs.positions)]
    for windowed in (False,) if inputs.windows is None else (False, True):
        target, source = static.groups(windowed).gpu, inputs.groups(windowed).gpu
        assert target is not None and source is not None
        pairs += [(getattr(target, name), getattr(source, name)) for name in ("page_table", "context_lens", "slots")]
    count = inputs.num_tokens
    for tensor, new in pairs:
        view = tensor[:, : new.shape[1]] if tensor.ndim == 2 else tensor
        view[:count].copy_(new)
        view[count:].copy_(new[:1].expand_as(view[count:]))
