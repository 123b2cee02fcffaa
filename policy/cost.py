"""Closed-form time of a pass, per resource, and the bound.

Every demand is an affine function of the placement: a vector over ``VARIABLES`` with the constant first. The linear
program takes these vectors as rows and `pass_seconds` takes their maximum at a placement, so that the two cannot
disagree.

A pass is L layers and the head. While layer j computes, the weights of layer j + 1 cross the link, so a pass has
three kinds of stage: (computes a layer, fetches a layer) L - 1 times, (layer, head) once and (head, first layer of
the next pass) once. A stage takes the maximum over the resources; launching its ticks comes on top. What streamed
weights and staged cache have the host launch besides is done ahead, in the time of the busiest resource, unless a
single micro-batch or a schedule without overlap leaves nothing ahead to launch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import DISK_THREADS, MAX_GRAPH_SEQUENCES, PAGE_TOKENS
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.policy import TIERS, Policy

Number = float | np.ndarray
KINDS = ("weights", "cache", "activations")
VARIABLES = (*(f"{kind}_{tier}" for kind in KINDS for tier in TIERS), "attended")
"""The nine fractions, and the share of all sequences that is attended on the CPU."""
COLUMNS = {name: 1 + i for i, name in enumerate(VARIABLES)}
RESOURCES = ("h2d", "d2h", "disk_read", "disk_write", "gpu_compute", "gpu_memory", "cpu_attention", "host_memory")
SERIAL = ("h2d", "d2h", "disk_read", "disk_write", "gpu_compute", "cpu_attention")
"""What adds up when nothing overlaps; the memories are used by these, not beside them."""
JOINT = {
    "h2d + d2h": "h2d",
    "disk_read + disk_write": "disk_read",
    "h2d beside cpu_attention": "h2d",
    "cpu_attention beside h2d": "cpu_attention",
    "one micro-batch": "cpu_attention",
    "h2d after expansion": "h2d",
    "cpu_attention after expansion": "cpu_attention",
    "cores": "gpu_compute",
    "no overlap": "gpu_compute",
}
"""Rows where resources slow each other, and the resource that is named when such a row limits."""
ROWS = RESOURCES + tuple(JOINT)
RESIDENT = 1e-6


def affine(constant: Number = 0.0, **coefficients: Number) -> np.ndarray:
    """[..., 1 + len(VARIABLES)]: a constant and coefficients by variable, each a number or an array over passes."""
    # A search asks for ten thousands of rows of a single pass, and finding the common shape of numbers takes longer
    # than writing them.
    shapes = [value.shape for value in (constant, *coefficients.values()) if isinstance(value, np.ndarray)]
    row = np.zeros((*np.broadcast_shapes(*shapes), 1 + len(VARIABLES)))
    row[..., 0] = constant
    for name, value in coefficients.items():
        row[..., COLUMNS[name]] = value
    return row


def evaluate(row: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The affine ``row`` at ``point`` [1 + len(VARIABLES)]."""
    return row @ point


def total(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The sum of at least one array."""
    return functools.reduce(np.add, parts)


def slowest(rows: Iterable[np.ndarray], point: np.ndarray) -> np.ndarray:
    """The maximum over ``rows`` at ``point``, pass by pass."""
    return functools.reduce(np.maximum, (evaluate(row, point) for row in rows))


def point_of(policy: Policy) -> np.ndarray:
    """The placement of ``policy`` as a point, the constant 1 first."""
    attended = policy.cache.cpu * policy.cpu_attention
    return np.array([1.0, *policy.weights.fractions, *policy.cache.fractions, *policy.activations.fractions, attended])


@dataclass(frozen=True)
class Stage:
    """One kind of stage of a pass: how often, ticks that compute a layer, seconds per row of ``ROWS`` and bytes
    (FLOPs for gpu_compute) per resource, all affine."""

    name: str
    count: int
    layer_ticks: int
    seconds: dict[str, np.ndarray]
    work: dict[str, np.ndarray]


class PassModel:
    """Demands of the passes ``load`` of a model on a machine for a policy's sizes and bits.

    Of the policy's placement one thing counts: whether any sequence is attended on the CPU (``cpu_attention`` above
    0), which has fixed costs, however few they are.
    """

    def __init__(self, shape: ModelShape, hardware: Hardware, policy: Policy, load: PassLoad):
        self.shape, self.hardware, self.policy, self.load = shape, hardware, policy, load
        self.batches = policy.num_gpu_batches
        self.decode_tokens = np.asarray(load.decode_sequences)
        self.tokens = self.decode_tokens + load.prompt_tokens
        self.row_bytes = shape.token_bytes(policy.cache_bits)
        self.row_bytes_16 = shape.token_bytes(16)

    @property
    def host_seconds(self) -> np.ndarray:
        """Composing a pass, sampling, committing."""
        return self.hardware.pass_seconds + self.hardware.sequence_seconds * np.asarray(
            self.load.decode_sequences + self.load.finished_prompts
        )

    @property
    def launch_seconds(self) -> np.ndarray:
        """Of one pass: launching every tick, and what happens once a pass and for every sequence."""
        return (self.shape.num_layers + 1) * self.batches * self.hardware.launch_seconds + self.host_seconds

    @functools.cached_property
    def stages(self) -> list[Stage]:
        layers = self.shape.num_layers
        kinds = [
            ("layer", "layer", "layer", layers - 1),
            ("last layer", "layer", "head", 1),
            ("head", "head", "layer", 1),
        ]
        return [self._stage(name, compute, fetch, count) for name, compute, fetch, count in kinds if count]

    def launched(self, point: np.ndarray) -> np.ndarray:
        """Seconds of launching in each pass at a placement: a decode pass of a block that is on the GPU whole is one
        CUDA graph, launched by the GPU."""
        resident = all(point[COLUMNS[f"{kind}_gpu"]] >= 1 - RESIDENT for kind in KINDS)
        one_graph = resident and self.hardware.device == "cuda" and self.batches == 1 and self.policy.overlap
        if not one_graph:
            in_turn = 0.0 if self._launches_ahead else self._extra_launch_seconds(point)
            return self.launch_seconds + self.shape.num_layers * self.batches * in_turn
        graphed = (np.asarray(self.load.prompt_tokens) == 0) & (
            np.asarray(self.load.decode_sequences) <= MAX_GRAPH_SEQUENCES
        )
        in_graph = self.host_seconds + (self.shape.num_layers + 1) * self.hardware.graph_seconds
        return np.where(graphed, in_graph, self.launch_seconds)

    @property
    def _launches_ahead(self) -> bool:
        """One micro-batch's transfers are launched while another one's resources are busy (66 ticks of OPT-6.7B, 8
        bits, on an H200's host: 0.3 ms each on top of what link or CPU attention needed, where launching alone takes
        0.85)."""
        return self.batches > 1 and self.policy.overlap

    def _extra_launch_seconds(self, point: np.ndarray) -> np.ndarray:
        """Per tick: what a placement with streamed weights, or cache that is attended from staging, has the host
        launch besides."""
        weights_gpu, cache_gpu, attended = (point[COLUMNS[name]] for name in ("weights_gpu", "cache_gpu", "attended"))
        staged = 1 - cache_gpu > RESIDENT and (
            (np.asarray(self.load.prompt_tokens) > 0)
            | ((np.asarray(self.load.decode_sequences) > 0) & (1 - cache_gpu - attended > RESIDENT))
        )
        return np.where(staged, self.hardware.staging_seconds, 0.0) + (
            self.hardware.fetch_seconds if 1 - weights_gpu > RESIDENT else 0.0
        )

    def pass_seconds(self, point: np.ndarray) -> np.ndarray:
        """Predicted time of each pass at a placement."""
        ahead = self._extra_launch_seconds(point) if self._launches_ahead else 0.0
        return self.launched(point) + total(
            s.count * np.maximum(slowest(s.seconds.values(), point), s.layer_ticks * ahead) for s in self.stages
        )

    def resource_seconds(self, point: np.ndarray) -> dict[str, np.ndarray]:
        """Time that each row needs in one pass, were it alone."""
        stages = self.stages
        return {name: total(s.count * evaluate(s.seconds[name], point) for s in stages) for name in stages[0].seconds}

    def resource_work(self, point: np.ndarray) -> dict[str, np.ndarray]:
        """Bytes (FLOPs for gpu_compute) of each resource in one pass."""
        stages = self.stages
        return {name: total(s.count * evaluate(s.work[name], point) for s in stages) for name in RESOURCES}

    @property
    def ceilings(self) -> dict[str, float]:
        """What the machine was measured at, each resource alone: bytes a second, FLOP/s of gpu_compute, bytes of
        rows as they are stored of cpu_attention."""
        hardware, shape = self.hardware, self.shape
        attention = hardware.cpu_attention_rate(shape.num_heads / shape.num_kv_heads, self.policy.cache_bits)
        rates = {name: getattr(hardware, name) for name in ("h2d", "d2h", "disk_read", "disk_write")}
        return {
            **rates,
            "gpu_compute": max(hardware.gemm.values),
            "cpu_attention": attention * self.row_bytes / self.row_bytes_16,
        }

    def bound_seconds(self, point: np.ndarray) -> np.ndarray:
        """The least time of a pass at a placement: the busiest row, everything else hidden, nothing launched."""
        return functools.reduce(np.maximum, self.resource_seconds(point).values())

    def _stage(self, name: str, compute: str, fetch: str, count: int) -> Stage:
        shape, bits = self.shape, self.policy.weight_bits
        weights = shape.block_bytes(bits) if fetch == "layer" else shape.weight_bytes(shape.head_elements, 16)
        traffic = dict(self._layer_traffic if compute == "layer" else self._head_traffic())
        traffic["h2d"] = traffic["h2d"] + affine(weights_cpu=weights, weights_disk=weights)
        traffic["disk_read"] = traffic["disk_read"] + affine(weights_disk=weights)
        gpu_seconds, gpu_flops, gpu_bytes = self._layer_compute if compute == "layer" else self._head_compute()
        seconds = self._seconds(traffic, gpu_seconds, gpu_bytes)
        if self.policy.overlap and bits != 16:
            # Expansion falls into the first tick, and fetches run one tick ahead only: the other ticks may wait for
            # another resource.
            expansion = (self._expanded_bytes() if compute == "layer" else 0.0) / self.hardware.expand
            first = (gpu_seconds - affine(expansion)) / self.batches + affine(expansion)
            for row in ("h2d", "cpu_attention"):
                seconds[f"{row} after expansion"] = first + seconds[row] * (1 - 1 / self.batches)
        ticks = self.batches if compute == "layer" else 0
        return Stage(name, count, ticks, seconds, self._work(traffic, gpu_flops, gpu_bytes))

    @functools.cached_property
    def _layer_traffic(self) -> dict[str, np.ndarray]:
        """Bytes of one layer but for weights, and counts; ``gathered`` and ``scattered`` cross the link by kernel,
        ``attended`` is read by the CPU."""
        shape, load = self.shape, self.load
        activations = self.tokens * shape.hidden_bytes
        # Whole pages cross: half a page more than the context of every sequence.
        decode = self.row_bytes * (load.decode_context + np.asarray(load.decode_sequences) * (PAGE_TOKENS - 1) / 2)
        prompt = self.row_bytes * np.asarray(load.prompt_context, dtype=float)
        fresh = self.row_bytes * self.tokens
        calls = np.where(self.decode_tokens > 0, self.batches, 0.0)
        attending = calls if self.policy.cpu_attention > 0 else 0.0 * calls
        exchanged = self.decode_tokens * shape.num_heads * shape.head_dim * shape.element_bytes
        return {
            "h2d": affine(activations_cpu=activations, activations_disk=activations, attended=exchanged),
            "d2h": affine(activations_cpu=activations, activations_disk=activations, attended=exchanged),
            "gathered": affine(cache_cpu=decode + prompt, cache_disk=decode + prompt, attended=-decode),
            "scattered": affine(cache_cpu=fresh, cache_disk=fresh),
            "disk_read": affine(cache_disk=decode + prompt, activations_disk=activations),
            "disk_write": affine(cache_disk=fresh, activations_disk=activations),
            "attended": affine(attended=self.row_bytes * np.asarray(load.decode_context, dtype=float)),
            "attended_16": affine(attended=self.row_bytes_16 * np.asarray(load.decode_context, dtype=float)),
            # Counts, not bytes. On disk every sequence is a request; in proportion to the disk's share, so that they
            # stay linear.
            "calls": affine(attending),
            "requests": affine(cache_disk=calls + np.asarray(load.decode_sequences) / DISK_THREADS),
        }

    def _head_traffic(self) -> dict[str, np.ndarray]:
        """The embedding rows of the next pass are gathered where the table lives."""
        zero = affine(0.0 * self.tokens)
        rows = self.tokens * self.shape.hidden_bytes
        names = (
            "d2h",
            "gathered",
            "scattered",
            "disk_read",
            "disk_write",
            "attended",
            "attended_16",
            "calls",
            "requests",
        )
        return {"h2d": affine(weights_cpu=rows, weights_disk=rows), **dict.fromkeys(names, zero)}

    @functools.cached_property
    def _layer_compute(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Seconds, FLOPs and GPU-memory bytes of one layer's kernels, which run one after another."""
        shape, hardware, load = self.shape, self.hardware, self.load
        seconds, flops, moved = self._gemm(shape.block_elements, self.tokens, self._expanded_bytes())
        elementwise = 2.0 * self.tokens * shape.workspace_bytes
        heads = 4.0 * shape.num_heads * shape.head_dim
        prompt_flops = heads * np.asarray(load.prompt_pairs)
        decode_flops = heads * np.asarray(load.decode_context)
        read = self.row_bytes * np.asarray(load.decode_context)
        keys = np.asarray(load.decode_context) + hardware.attention_tile_keys / 2 * np.asarray(load.decode_sequences)
        reading = self.row_bytes * keys / hardware.attention_decode
        if self.policy.cache_bits != 16:
            # Expanding rows inside attention costs instructions, more than the bytes that it saves.
            reading = np.maximum(reading, self.row_bytes_16 * keys / hardware.quantized_attention)
        decode = np.maximum(reading, decode_flops / hardware.attention_prefill)
        seconds = seconds + elementwise / hardware.gpu_bandwidth + prompt_flops / hardware.attention_prefill + decode
        flops = flops + prompt_flops + decode_flops
        return (
            affine(seconds, attended=-decode),
            affine(flops, attended=-decode_flops),
            affine(moved + elementwise + read, attended=-read),
        )

    def _head_compute(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape, hardware = self.shape, self.hardware
        rows = self.decode_tokens + self.load.finished_prompts
        seconds, flops, moved = self._gemm(shape.head_elements, rows, expanded=0.0)
        # Float32 logits are written once and read about twice by sampling.
        logits = 3.0 * 4 * rows * shape.vocab_size
        return affine(seconds + logits / hardware.gpu_bandwidth), affine(flops), affine(moved + logits)

    def _gemm(self, elements: int, tokens: np.ndarray, expanded: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Every micro-batch multiplies with all weights; quantised ones (``expanded`` bytes) are expanded once for
        all of them."""
        shape = self.shape
        plain = shape.weight_bytes(elements, 16)
        seconds = self.batches * self.hardware.gemm_seconds(elements, tokens / self.batches, shape.element_bytes)
        return seconds + expanded / self.hardware.expand, 2.0 * elements * tokens, self.batches * plain + expanded

    def _expanded_bytes(self) -> float:
        """Read and written to expand a layer's quantised weights to 16 bits; 0 for 16 bits."""
        bits = self.policy.weight_bits
        return 0.0 if bits == 16 else float(self.shape.block_bytes(bits) + self.shape.block_bytes(16))

    def _work(
        self, traffic: dict[str, np.ndarray], gpu_flops: np.ndarray, gpu_bytes: np.ndarray
    ) -> dict[str, np.ndarray]:
        h2d, d2h = traffic["h2d"] + traffic["gathered"], traffic["d2h"] + traffic["scattered"]
        disk = traffic["disk_read"] + traffic["disk_write"]
        return {
            "h2d": h2d,
            "d2h": d2h,
            "disk_read": traffic["disk_read"],
            "disk_write": traffic["disk_write"],
            "gpu_compute": gpu_flops,
            "gpu_memory": gpu_bytes + h2d + d2h,
            "cpu_attention": traffic["attended"],
            "host_memory": h2d + d2h + disk + traffic["attended"],
        }

    def _seconds(
        self, traffic: dict[str, np.ndarray], gpu_seconds: np.ndarray, gpu_bytes: np.ndarray
    ) -> dict[str, np.ndarray]:
        hardware, policy = self.hardware, self.policy
        work = self._work(traffic, gpu_seconds, gpu_bytes)
        attention_rate = hardware.cpu_attention_rate(self.shape.num_heads / self.shape.num_kv_heads, policy.cache_bits)
        copies = affine(weights_cpu=self.batches, weights_disk=self.batches) * hardware.link_seconds
        requests = (traffic["requests"] + affine(weights_disk=1.0)) * hardware.disk_read_seconds
        seconds = {
            "h2d": traffic["h2d"] / hardware.h2d + traffic["gathered"] / hardware.gather + copies,
            "d2h": traffic["d2h"] / hardware.d2h + traffic["scattered"] / hardware.scatter,
            "disk_read": traffic["disk_read"] / hardware.disk_read + requests,
            "disk_write": traffic["disk_write"] / hardware.disk_write,
            "gpu_compute": gpu_seconds,
            "gpu_memory": work["gpu_memory"] / hardware.gpu_bandwidth,
            "cpu_attention": traffic["attended_16"] / attention_rate
            + traffic["calls"] * hardware.cpu_attention_seconds,
            "host_memory": work["host_memory"] / hardware.host_bandwidth,
        }
        if not policy.overlap:
            waits = affine(self.batches * hardware.settle_seconds)
            return {
                **seconds,
                "no overlap": total(seconds[name] for name in SERIAL)
                + traffic["calls"] * hardware.exchange_seconds
                + waits,
            }
        seconds["h2d + d2h"] = (work["h2d"] + work["d2h"]) / hardware.link_both
        # One device: passes of OPT-1.3B that read half a cache and wrote prompts took the sum of both, within 5 % of
        # it.
        seconds["disk_read + disk_write"] = seconds["disk_read"] + seconds["disk_write"]
        seconds["h2d beside cpu_attention"] = (
            seconds["h2d"] + traffic["attended"] * hardware.link_slowdown / hardware.h2d
        )
        seconds["cpu_attention beside h2d"] = (
            seconds["cpu_attention"] + work["h2d"] * hardware.cpu_attention_slowdown / hardware.cpu_attention.values[0]
        )
        if self.batches == 1:
            # Nothing is left to compute while the only micro-batch's attention runs on the CPU.
            seconds["one micro-batch"] = (
                seconds["cpu_attention"] + gpu_seconds + traffic["calls"] * hardware.exchange_seconds
            )
        if hardware.device == "cpu":
            seconds["cores"] = (
                seconds["h2d"] + seconds["d2h"] + seconds["gpu_compute"] + traffic["attended_16"] / attention_rate
            )
        return seconds
