"""A pass walked tick by tick with the rates of the cost model: sequence by sequence, no averages, no affine forms. The check of the closed form.

Every resource is a queue that serves one task at a time in the order of issue. A tick waits for its layer's weights, its micro-batch's pages
and hidden states, and for the CPU attention of two ticks before (of the last tick, when there is one micro-batch only). With a tick start the copies to the GPU for the next tick, one K-th of the
next layer's weights, and the disk reads for the tick after it and for the layer after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flexbatch.policy.loads import PAGE_TOKENS
from flexbatch.policy.types import Hardware, ModelShape, Policy


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


def zigzag(num_layers: int, num_micro_batches: int) -> Iterator[tuple[int, int]]:
    """Ticks (layer, micro-batch), layer outer; the head is layer ``num_layers``."""
    for layer in range(num_layers + 1):
        for batch in range(num_micro_batches):
            yield layer, batch


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
        disk_pages = sum(row * (s.before if s.prompt else s.before + 1 + (PAGE_TOKENS - 1) / 2) for s in gathered if s.home == "disk")
        fresh = row * sum(s.query_tokens for s in away)
        attended = [s for s in sequences if s.attended_on_cpu]
        exchanged = sum(s.query_tokens for s in attended) * shape.num_heads * shape.head_dim * shape.element_bytes
        hidden = tokens * shape.hidden_bytes * (1 - policy.activations.gpu)
        hidden_disk = tokens * shape.hidden_bytes * policy.activations.disk
        self.h2d = pages / hardware.gather + (hidden + exchanged) / hardware.h2d
        self.d2h = fresh / hardware.scatter + (hidden + exchanged) / hardware.d2h
        self.disk_read = (disk_pages + hidden_disk) / hardware.disk_read
        self.disk_write = (row * sum(s.query_tokens for s in sequences if s.home == "disk") + hidden_disk) / hardware.disk_write
        rate = hardware.cpu_attention_rate(policy.query_tokens * shape.num_heads / shape.num_kv_heads)
        self.cpu_attention = sum(shape.token_bytes(16) * (s.before + 1) for s in attended) / rate
        self.gpu = self._gpu(sequences, tokens, row)
        rows = sum((s.query_tokens if not s.prompt else 1) for s in sequences if s.needs_logits)
        self.head = float(hardware.gemm_seconds(shape.head_elements, rows, shape.element_bytes)) + 12 * rows * shape.vocab_size / hardware.gpu_bandwidth

    def _gpu(self, sequences: Sequence[SimulatedSequence], tokens: int, row: int) -> float:
        shape, hardware = self.shape, self.hardware
        seconds = float(hardware.gemm_seconds(shape.block_elements, tokens, shape.element_bytes)) + 2 * tokens * shape.workspace_bytes / hardware.gpu_bandwidth
        for s in sequences:
            if s.prompt:
                pairs = sum(s.before + i + 1 for i in range(s.query_tokens))
                seconds += 4 * shape.num_heads * shape.head_dim * pairs / hardware.attention_prefill
            elif not s.attended_on_cpu:
                flops = 4 * shape.num_heads * shape.head_dim * s.query_tokens * (s.before + 1)
                read = max(row, shape.token_bytes(16) / 2) * (s.before + 1)
                seconds += max(flops / hardware.attention_prefill, read / hardware.attention_decode)
        return seconds


def simulate(shape: ModelShape, hardware: Hardware, policy: Policy, sequences: Sequence[SimulatedSequence], passes: int = 4) -> float:
    """Seconds of one pass once the pipeline is full: the mean over all but the first of ``passes`` equal passes.

    CPU attention and the link do not slow each other here, and launching costs nothing: both are terms that the closed form adds.
    """
    count, layers = policy.num_gpu_batches, shape.num_layers
    costs = [_TickCosts(shape, hardware, policy, [s for s in sequences if s.micro_batch == k]) for k in range(count)]
    queues = {name: _Queue() for name in ("h2d", "d2h", "disk_read", "disk_write", "gpu", "cpu_attention")}
    ticks = [(p, layer, batch) for p in range(passes) for layer, batch in zigzag(layers, count)]
    weights_ready, weights_read = {0: 0.0}, {0: 0.0, 1: 0.0}
    data_ready, data_read, attention_done, ends, starts_of_pass = [0.0], [0.0, 0.0], [0.0] * min(2, count), [], []
    for index, (number, layer, batch) in enumerate(ticks):
        stage = number * (layers + 1) + layer
        before = ends[-1] if ends else 0.0
        start = max(before, data_ready[index], weights_ready[stage], attention_done[index])
        if layer == 0 and batch == 0:
            starts_of_pass.append(before)

        def size_of(stage: int) -> float:
            elements = shape.head_elements if stage % (layers + 1) == layers else shape.block_elements
            return shape.weight_bytes(elements, policy.weight_bits) / count

        def cost_of(index: int) -> _TickCosts | None:
            return costs[ticks[index][2]] if index < len(ticks) and ticks[index][1] < layers else None

        later = cost_of(index + 2)
        data_read.append(queues["disk_read"].serve(start, later.disk_read) if later and later.disk_read else 0.0)
        following = cost_of(index + 1)
        data_ready.append(queues["h2d"].serve(max(start, data_read[index + 1]), following.h2d) if following and following.h2d else 0.0)
        on_disk = size_of(stage + 2) * policy.weights.disk / hardware.disk_read
        weights_read[stage + 2] = queues["disk_read"].serve(start, on_disk) if on_disk else 0.0
        away = size_of(stage + 1) * (1 - policy.weights.gpu) / hardware.h2d
        weights_ready[stage + 1] = queues["h2d"].serve(max(start, weights_read[stage + 1]), away) if away else 0.0
        cost = costs[batch]
        expand = 0.0
        if batch == 0 and policy.weight_bits != 16:
            own = shape.head_elements if layer == layers else shape.block_elements
            expand = (shape.weight_bytes(own, policy.weight_bits) + shape.weight_bytes(own, 16)) / hardware.expand
        end = queues["gpu"].serve(start, expand + (cost.head if layer == layers else cost.gpu))
        ends.append(end)
        attended = layer < layers and cost.cpu_attention
        attention_done.append(queues["cpu_attention"].serve(end, cost.cpu_attention) if attended else 0.0)
        if layer < layers:
            drained = queues["d2h"].serve(end, cost.d2h) if cost.d2h else end
            if cost.disk_write:
                queues["disk_write"].serve(drained, cost.disk_write)
    return (max(ends[-1], *(q.free for q in queues.values())) - starts_of_pass[1]) / (passes - 1)

