"""A pass walked tick by tick with the rates of the cost model: sequence by sequence, no averages, no affine forms. The
check of the closed form.

Every resource is a queue that serves one task at a time in the order of issue. A tick waits for its layer's weights,
its micro-batch's pages and hidden states, and for the CPU attention of two ticks before (of the last tick, when
there is one micro-batch only). With a tick start the copies to the GPU for the next tick, one K-th of the next
layer's weights, and the disk reads for the tick after it and for the layer after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import PAGE_TOKENS
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.policy import Policy
from flexbatch.policy.schedule import zigzag


@dataclass(frozen=True)
class SimulatedSequence:
    """What one sequence brings to the pass: ``query_tokens`` after ``before`` tokens that its cache holds."""

    micro_batch: int
    home: str
    """Tier of its cache."""
    query_tokens: int
    before: int
    prompt: bool = False
    attended_on_cpu: bool = False
    needs_logits: bool = True


@dataclass
class _Queue:
    """Serves tasks one after another."""

    free: float = 0.0

    def serve(self, ready: float, seconds: float) -> float:
        self.free = max(self.free, ready) + seconds
        return self.free


class _TickCosts:
    """Seconds of one micro-batch's tick on each resource."""

    def __init__(self, shape: ModelShape, hardware: Hardware, policy: Policy, sequences: Sequence[SimulatedSequence]):
        self.shape, self.hardware, self.policy = shape, hardware, policy
        row = shape.token_bytes(policy.cache_bits)
        tokens = sum(s.query_tokens for s in sequences)
        away = [s for s in sequences if s.home != "gpu"]
        gathered = [s for s in away if not s.attended_on_cpu and s.before + (not s.prompt) * s.query_tokens]
        pages = sum(row * (s.before if s.prompt else s.before + 1 + (PAGE_TOKENS - 1) / 2) for s in gathered)
        disk_pages = sum(
            row * (s.before if s.prompt else s.before + 1 + (PAGE_TOKENS - 1) / 2) for s in gathered if s.home == "disk"
        )
        fresh = row * sum(s.query_tokens for s in away)
        attended = [s for s in sequences if s.attended_on_cpu]
        exchanged = sum(s.query_tokens for s in attended) * shape.num_heads * shape.head_dim * shape.element_bytes
        hidden = tokens * shape.hidden_bytes * (1 - policy.activations.gpu)
        hidden_disk = tokens * shape.hidden_bytes * policy.activations.disk
        self.h2d = pages / hardware.gather + (hidden + exchanged) / hardware.h2d
        self.d2h = fresh / hardware.scatter + (hidden + exchanged) / hardware.d2h
        self.disk_read = (disk_pages + hidden_disk) / hardware.disk_read
        self.disk_write = (
            row * sum(s.query_tokens for s in sequences if s.home == "disk") + hidden_disk
        ) / hardware.disk_write
        rate = hardware.cpu_attention_rate(shape.num_heads / shape.num_kv_heads, policy.cache_bits)
        self.cpu_attention = sum(shape.token_bytes(16) * (s.before + 1) for s in attended) / rate
        self.gpu = self._gpu(sequences, tokens, row)
        rows = sum((s.query_tokens if not s.prompt else 1) for s in sequences if s.needs_logits)
        self.head = (
            float(hardware.gemm_seconds(shape.head_elements, rows, shape.element_bytes))
            + 12 * rows * shape.vocab_size / hardware.gpu_bandwidth
        )

    def _gpu(self, sequences: Sequence[SimulatedSequence], tokens: int, row: int) -> float:
        shape, hardware = self.shape, self.hardware
        seconds = (
            float(hardware.gemm_seconds(shape.block_elements, tokens, shape.element_bytes))
            + 2 * tokens * shape.workspace_bytes / hardware.gpu_bandwidth
        )
        for s in sequences:
            if s.prompt:
                pairs = sum(s.before + i + 1 for i in range(s.query_tokens))
                seconds += 4 * shape.num_heads * shape.head_dim * pairs / hardware.attention_prefill
            elif not s.attended_on_cpu:
                flops = 4 * shape.num_heads * shape.head_dim * s.query_tokens * (s.before + 1)
                expand = 0.0 if self.policy.cache_bits == 16 else shape.token_bytes(16) / hardware.quantized_attention
                read = max(row / hardware.attention_decode, expand) * (s.before + 1 + hardware.attention_tile_keys / 2)
                seconds += max(flops / hardware.attention_prefill, read)
        return seconds


class _Walk:
    """The state of a walk: when every queue is free and when every tick's data, weights and attention are there."""

    def __init__(
        self, shape: ModelShape, hardware: Hardware, policy: Policy, sequences: Sequence[SimulatedSequence], passes: int
    ):
        count = policy.num_gpu_batches
        self.shape, self.hardware, self.policy, self.count = shape, hardware, policy, count
        self.costs = [
            _TickCosts(shape, hardware, policy, [s for s in sequences if s.micro_batch == k]) for k in range(count)
        ]
        self.queues = {name: _Queue() for name in ("h2d", "d2h", "disk", "gpu", "cpu_attention")}
        self.ticks = [
            (number, tick.layer, tick.micro_batch)
            for number in range(passes)
            for tick in zigzag(shape.num_layers + 1, count)
        ]
        self.weights_ready, self.weights_read = {0: 0.0}, {0: 0.0, 1: 0.0}
        self.data_ready, self.data_read = [0.0], [0.0, 0.0]
        self.attention_done, self.ends = [0.0] * min(2, count), [0.0]

    def cost_of(self, index: int) -> _TickCosts | None:
        """Of a tick that has a cache; None for the head and behind the end."""
        return (
            self.costs[self.ticks[index][2]]
            if index < len(self.ticks) and self.ticks[index][1] < self.shape.num_layers
            else None
        )

    def stored_bytes(self, stage: int) -> int:
        """Weights of a stage as they are stored: the head keeps 16 bits."""
        if stage % (self.shape.num_layers + 1) == self.shape.num_layers:
            return self.shape.weight_bytes(self.shape.head_elements, 16)
        return self.shape.block_bytes(self.policy.weight_bits)

    def serve(self, queue: str, ready: float, seconds: float) -> float:
        """When a task is done; nothing to do is done at once."""
        return self.queues[queue].serve(ready, seconds) if seconds else 0.0

    def fetch(self, index: int, stage: int, start: float) -> None:
        """What starts with tick ``index``: disk reads for two ticks and layers on, copies for one."""
        later, following = self.cost_of(index + 2), self.cost_of(index + 1)
        self.data_read.append(self.serve("disk", start, later.disk_read if later else 0.0))
        self.data_ready.append(
            self.serve("h2d", max(start, self.data_read[index + 1]), following.h2d if following else 0.0)
        )
        weights = self.policy.weights
        on_disk = self.stored_bytes(stage + 2) / self.count * weights.disk / self.hardware.disk_read
        self.weights_read[stage + 2] = self.serve("disk", start, on_disk)
        away = self.stored_bytes(stage + 1) / self.count * (1 - weights.gpu) / self.hardware.h2d
        self.weights_ready[stage + 1] = self.serve("h2d", max(start, self.weights_read[stage + 1]), away)

    def compute(self, stage: int, layer: int, batch: int, start: float) -> None:
        """The tick itself, its CPU attention and its drain."""
        cost, shape, bits = self.costs[batch], self.shape, self.policy.weight_bits
        expand = 0.0
        head = layer == shape.num_layers
        if batch == 0 and bits != 16 and not head:
            expand = (self.stored_bytes(stage) + shape.block_bytes(16)) / self.hardware.expand
        end = self.queues["gpu"].serve(start, expand + (cost.head if head else cost.gpu))
        self.ends.append(end)
        self.attention_done.append(0.0 if head else self.serve("cpu_attention", end, cost.cpu_attention))
        if not head:
            self.serve("disk", max(end, self.serve("d2h", end, cost.d2h)), cost.disk_write)


def simulate(
    shape: ModelShape, hardware: Hardware, policy: Policy, sequences: Sequence[SimulatedSequence], passes: int = 4
) -> float:
    """Seconds of one pass once the pipeline is full: the mean over all but the first of ``passes`` equal passes.

    CPU attention and the link do not slow each other here, and launching costs nothing: both are terms that the
    closed form adds.
    """
    walk = _Walk(shape, hardware, policy, sequences, passes)
    first_pass_end = 0.0
    for index, (number, layer, batch) in enumerate(walk.ticks):
        stage = number * (shape.num_layers + 1) + layer
        if (number, layer, batch) == (1, 0, 0):
            first_pass_end = walk.ends[-1]
        start = max(walk.ends[-1], walk.data_ready[index], walk.weights_ready[stage], walk.attention_done[index])
        walk.fetch(index, stage, start)
        walk.compute(stage, layer, batch, start)
    return (max(walk.ends[-1], *(queue.free for queue in walk.queues.values())) - first_pass_end) / (passes - 1)
