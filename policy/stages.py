"""What the layers and the head of a pass ask of every resource: bytes, FLOPs and seconds, affine in the placement."""

from __future__ import annotations

import functools

import numpy as np

from flexbatch.policy.affine import affine, total
from flexbatch.policy.attention_seconds import KEYS_OF_SEQUENCE, decode_seconds, prompt_seconds
from flexbatch.policy.collectives import logits_seconds, send_rate, sum_seconds
from flexbatch.policy.expansion import expanded_bytes
from flexbatch.policy.expert_traffic import NO_EXPERTS, hit_fetch_seconds, routed_traffic, spared_bytes
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.in_turn import in_turn_seconds
from flexbatch.policy.limits import DECODING_APART, DISK_THREADS, PAGE_TOKENS
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.policy import Policy
from flexbatch.policy.products import Demand, products, routed_products
from flexbatch.policy.recorded_load import RecordedLoad, apart, pieced_seconds
from flexbatch.policy.stage import Stage, first_pages

SERIAL = ("h2d", "d2h", "disk_read", "disk_write", "gpu_compute", "cpu_attention", "cpu_experts")
"""What adds up when nothing overlaps; the memories are used by these, not beside them."""


class PassStages:
    """The stages of the passes ``load``: a layer, in a model with experts also one without them, the last layer (the
    head's weights are fetched beside it) and the head, where it is here. hits: whether passes of few tokens bring only
    the experts that they hit. recorded: of passes that may be graphs."""

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        policy: Policy,
        load: PassLoad,
        hits: bool,
        recorded: RecordedLoad | None = None,
    ) -> None:
        self.shape, self.hardware, self.policy, self.load, self.hits = shape, hardware, policy, load, hits
        self.batches = policy.num_gpu_batches
        self.decode_tokens = np.asarray(load.decode_sequences)
        self.tokens = load.tokens
        recorded = recorded or RecordedLoad(self.tokens, self.decode_tokens, np.zeros_like(self.tokens))
        self.padded, self.attended = recorded.tokens, recorded.attended
        self.pieced = pieced_seconds(
            hardware, recorded.pieces, apart(self.decode_tokens, np.asarray(load.prompt_tokens), self.batches)
        )
        self.decode_context = self.seen(load.decode_context, load.decode_sequences)
        """Of the mean layer, as all of the next three."""
        self.prompt_context = self.seen(load.prompt_context, np.ceil(np.asarray(load.prompt_tokens) / policy.chunk))
        self.prompt_pairs = self.seen(load.prompt_pairs, load.prompt_tokens)
        self.row_bytes = shape.token_bytes(policy.cache_bits)
        self.row_bytes_16 = shape.token_bytes(16)

    def seen(self, tokens: float | np.ndarray, queries: float | np.ndarray) -> np.ndarray:
        """Tokens that so many queries see in the mean layer, where they see ``tokens`` in one without a window."""
        shape, whole = self.shape, np.asarray(tokens, dtype=float)
        share = shape.window_layers / shape.num_layers
        return whole - share * np.maximum(0.0, whole - shape.window * np.asarray(queries, dtype=float))

    def stages(self) -> list[Stage]:
        dense = min(self.shape.dense_layers, self.shape.num_layers - 1)
        has_head = bool(self.shape.head_tensors)
        kinds = [
            ("layer", "layer", "layer", self.shape.num_layers - 1 - dense),
            ("dense layer", "dense", "dense", dense),
            ("last layer", "layer", "head" if has_head else "layer", 1),
            ("head", "head", "layer", int(has_head)),
        ]
        found = [self._stage(name, compute, fetch, count) for name, compute, fetch, count in kinds if count]
        beside = "gather beside gpu_compute"
        return found + [first_pages(each, beside) for each in found[:1] if beside in each.seconds]

    def _stage(self, name: str, compute: str, fetch: str, count: int) -> Stage:
        shape, bits = self.shape, self.policy.weight_bits
        weights = {"layer": shape.block_bytes, "dense": shape.dense_bytes}.get(fetch, self._head_bytes)(bits)
        traffic = dict(self._head_traffic() if compute == "head" else self._layer_traffic)
        traffic["h2d"] = traffic["h2d"] + affine(weights_cpu=weights, weights_disk=weights)
        if fetch == "layer":
            traffic["h2d"] = traffic["h2d"] - spared_bytes(shape, self.policy, self.tokens, self.hits)
        traffic |= (
            routed_traffic(shape, self.hardware, self.policy, self.tokens, traffic)
            if compute == "layer"
            else NO_EXPERTS
        )
        traffic["disk_read"] = traffic["disk_read"] + affine(weights_disk=weights)
        others = self._dense_compute if compute == "dense" else self._head_compute
        gpu_seconds, gpu_flops, gpu_bytes = self._layer_compute if compute == "layer" else others()
        seconds = self._seconds(traffic, gpu_seconds, gpu_bytes)
        if self.policy.overlap and bits != 16:
            # Expansion falls into the first tick, and fetches run one tick ahead only: the other ticks may wait for
            # another resource.
            dequantization = (
                expanded_bytes(shape, self.hardware, self.policy, self.tokens, compute) / self.hardware.expand
            )
            first = (gpu_seconds - affine(dequantization)) / self.batches + affine(dequantization)
            for row in ("h2d", "cpu_attention"):
                seconds[f"{row} after dequantization"] = first + seconds[row] * (1 - 1 / self.batches)
        if shape.stages > 1:
            # They travel while others are computed, any time of a pass.
            sent = self.tokens * shape.hidden_bytes / send_rate(self.hardware) / shape.num_layers
            seconds["between stages"] = affine(sent if compute != "head" else 0.0 * sent)
        return Stage(name, count, seconds, self._work(traffic, gpu_flops, gpu_bytes))

    @property
    def _begun_keys(self) -> np.ndarray:
        """Those that the CPU would attend in the time in which it begins with the sequences of a layer."""
        return np.asarray(KEYS_OF_SEQUENCE[self.policy.cache_bits] * self.decode_tokens)

    @functools.cached_property
    def _layer_traffic(self) -> dict[str, np.ndarray]:
        """Bytes of one layer but for weights, and counts; ``gathered`` and ``scattered`` cross the link by kernel,
        ``attended`` is read by the CPU."""
        shape, load = self.shape, self.load
        activations = self.tokens * shape.hidden_bytes
        # Whole pages cross: half a page more than the context of every sequence.
        decode = self.row_bytes * (self.decode_context + np.asarray(load.decode_sequences) * (PAGE_TOKENS - 1) / 2)
        prompt = self.row_bytes * self.prompt_context
        fresh = self.row_bytes * self.tokens
        calls = np.where(self.decode_tokens > 0, self.batches, 0.0)
        attending = calls if self.policy.cpu_attention > 0 else 0.0 * calls
        exchanged = self.decode_tokens * shape.num_heads * shape.head_dim * shape.element_bytes
        return {
            "h2d": affine(activations_cpu=activations, activations_disk=activations, cpu_attention=exchanged),
            "d2h": affine(activations_cpu=activations, activations_disk=activations, cpu_attention=exchanged),
            "gathered": affine(cache_cpu=decode + prompt, cache_disk=decode + prompt, cpu_attention=-decode),
            "scattered": affine(cache_cpu=fresh, cache_disk=fresh),
            "disk_read": affine(cache_disk=decode + prompt, activations_disk=activations),
            "disk_write": affine(cache_disk=fresh, activations_disk=activations),
            "cpu_attention": affine(cpu_attention=self.row_bytes * self.decode_context),
            "attended_16": affine(cpu_attention=self.row_bytes_16 * (self.decode_context + self._begun_keys)),
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
            "cpu_attention",
            "attended_16",
            "calls",
            "requests",
        )
        return {"h2d": affine(weights_cpu=rows, weights_disk=rows), **dict.fromkeys(names, zero)}

    def _head_bytes(self, bits: int) -> int:
        """The head keeps 16 bits."""
        return self.shape.weight_bytes(self.shape.head_elements, 16)

    @functools.cached_property
    def _layer_compute(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Seconds, FLOPs and GPU-memory bytes of one layer's kernels, which run one after another."""
        shape, experts = self.shape, self.shape.experts
        routed = experts.count * experts.elements(shape.hidden_size) if experts else 0
        seconds, flops, moved = self._products(shape.block_elements - routed, self.padded, "layer")
        if experts is None:
            return self._around(seconds, flops, moved)
        more_seconds, more_flops, more_moved = routed_products(self.shape, self.hardware, self.policy, self.tokens)
        products = self._around(seconds + more_seconds, flops + more_flops, moved + more_moved)
        fetching = hit_fetch_seconds(shape, self.hardware, self.policy, self.tokens) if self.hits else 0.0
        return products[0] + fetching, products[1], products[2]

    def _dense_compute(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same for one of the layers without experts."""
        return self._around(*self._products(sum(self.shape.dense_tensors), self.padded, "dense"))

    def _products(self, elements: int, tokens: np.ndarray, kind: str) -> Demand:
        return products(self.shape, self.hardware, self.policy, elements, tokens, kind)

    def _around(
        self, seconds: np.ndarray, flops: np.ndarray, moved: float | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """With what a layer does besides its products: attention, and what reads and writes between them."""
        shape, hardware, load = self.shape, self.hardware, self.load
        elementwise = 2.0 * self.padded * shape.workspace_bytes
        heads = 4.0 * shape.num_heads * shape.head_dim
        prompt_flops = heads * self.prompt_pairs
        decode_flops = heads * self.decode_context
        read = self.row_bytes * self.decode_context
        filling, bits = self.attended / np.maximum(1.0, self.decode_tokens), self.policy.cache_bits
        keys = filling * self.decode_context + hardware.attention_tile_keys / 2 * self.attended
        tiled = (np.asarray(load.prompt_tokens) > 0) & (self.decode_tokens < DECODING_APART)
        decode = np.maximum(
            decode_seconds(shape, hardware, bits, keys, tiled),
            decode_flops / hardware.attention_prefill,
        )
        prompts = prompt_seconds(shape, hardware, bits, self.prompt_pairs, np.asarray(load.prompt_tokens), self.batches)
        seconds = seconds + elementwise / hardware.gpu_bandwidth + prompts + decode
        seconds = seconds + self.batches * hardware.graph_seconds + self.pieced
        if hardware.tensor_ranks > 1:
            seconds = seconds + sum_seconds(hardware, self.tokens, shape.hidden_bytes, self.batches)
        flops = flops + prompt_flops + decode_flops
        return (
            affine(seconds, cpu_attention=-decode),
            affine(flops, cpu_attention=-decode_flops),
            affine(moved + elementwise + read, cpu_attention=-read),
        )

    def _head_compute(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape, hardware = self.shape, self.hardware
        # A pass of a single graph computes the rows that fill it up, too.
        rows = np.where(self.load.prompt_tokens == 0, self.padded, self.decode_tokens + self.load.finished_prompts)
        seconds, flops, moved = self._products(shape.head_elements, rows, "head")
        # Float32 logits are written once and read about twice by sampling.
        logits = 3.0 * 4 * rows * shape.vocab_size
        seconds = seconds + logits / hardware.gpu_bandwidth + self.batches * hardware.graph_seconds
        seconds = seconds + logits_seconds(shape, hardware, rows)
        return affine(seconds), affine(flops), affine(moved + logits)

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
            "cpu_attention": traffic["cpu_attention"],
            "cpu_experts": traffic["experts"],
            "host_memory": h2d + d2h + disk + traffic["cpu_attention"] + traffic["experts"],
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
            "cpu_experts": traffic["expert_seconds"],
            "host_memory": work["host_memory"] / hardware.host_bandwidth,
        }
        if not policy.overlap:
            waits = affine(self.batches * hardware.synchronize_seconds)
            return {
                **seconds,
                "no overlap": total(seconds[name] for name in SERIAL)
                + traffic["calls"] * hardware.exchange_seconds
                + waits,
            }
        # Pages are gathered by a kernel, to which the products of a layer leave no multiprocessors: passes of
        # Llama-3.2-1B with prompts and half of their cache in host memory took the sum, to 2 %.
        seconds["gather beside gpu_compute"] = gpu_seconds + traffic["gathered"] / hardware.gather
        seconds["h2d + d2h"] = (work["h2d"] + work["d2h"]) / hardware.link_both
        # One device: passes of OPT-1.3B that read half a cache and wrote prompts took the sum of both, within 5 % of
        # it.
        seconds["disk_read + disk_write"] = seconds["disk_read"] + seconds["disk_write"]
        on_cores = seconds["cpu_attention"] + seconds["cpu_experts"]
        if self.shape.experts is not None:
            seconds["cpu_attention + cpu_experts"] = on_cores
        read = traffic["cpu_attention"] + traffic["experts"]
        seconds["h2d beside cpu_attention"] = seconds["h2d"] + read * hardware.link_slowdown / hardware.h2d
        slowdown = hardware.cpu_attention_slowdown / hardware.cpu_attention.values[0]
        seconds["cpu_attention beside h2d"] = on_cores + work["h2d"] * slowdown
        if self.batches == 1 or policy.cpu_attention > 0:
            given = self.shape, hardware, policy, self.load
            calls = traffic["calls"][..., 0]
            seconds["CPU attention in turn"] = in_turn_seconds(*given, on_cores, gpu_seconds, calls)
        if hardware.device == "cpu":
            attended = traffic["attended_16"] / attention_rate
            links = seconds["h2d"] + seconds["d2h"]
            seconds["cores"] = links + seconds["gpu_compute"] + attended + seconds["cpu_experts"]
        return seconds
