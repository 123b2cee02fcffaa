"""What experts cost in a layer of the passes of a load: their products on a GPU, and what the CPU's experts read and
compute, and spare the link."""

from __future__ import annotations

import numpy as np

from flexbatch.policy.affine import affine
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import EXPERT_TILES, cpu_expert_tokens, hit_expert_tokens
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.policy import Policy

TILE_SHARES = (0.4, 0.4, 0.4, 0.68)
"""Of the best rate of a dense product, what the grouped one reaches in the tiles of each of the `EXPERT_TILES`."""
EXPANSION_SECONDS = 0.45e-12
"""Of a weight in codes, once for each tile that is multiplied with it."""
STORED_BYTES = {8: 1.06, 4: 0.56}
"""Of a weight, with its share of the parameters."""


def product_seconds(
    hardware: Hardware, elements: float, rows: np.ndarray, weight_bits: int, element_bytes: int, even: bool = False
) -> np.ndarray:
    """Of one expert of so many weights among many, which have so many rows in the mean, or ``even`` each. Processors
    multiply one expert after another, as dense weights.

    A tile that is not full takes as long as one that is. Experts with unlike numbers of rows leave half of their last
    one empty; where the mean one just fits one tile, half of them need two. The numbers are an H100's: within 7 % in
    the median of benchmark/results/expert_kernels-h100.json, and within 30 % of all. A machine of one rate for any
    number of rows has no tiles either.
    """
    rows = np.asarray(rows, dtype=float)
    if hardware.device != "cuda" or len(hardware.gemm.points) == 1:
        return hardware.gemm_seconds(elements, rows, element_bytes)
    index = np.minimum(np.searchsorted(EXPERT_TILES, rows), len(EXPERT_TILES) - 1)
    tile, share = np.asarray(EXPERT_TILES)[index], np.asarray(TILE_SHARES)[index]
    full = rows / tile
    tiles = np.ceil(full) if even else np.maximum(1.0, full + 0.5)
    expansion = 0.0 if weight_bits == 16 else EXPANSION_SECONDS
    multiplying = tiles * (expansion + 2 * tile / (share * max(hardware.gemm.values)))
    reading = STORED_BYTES.get(weight_bits, element_bytes) / hardware.gpu_bandwidth
    return elements * np.where(rows > 0, np.maximum(reading, multiplying), 0.0)


NO_EXPERTS = {"experts": affine(), "expert_seconds": affine()}
"""What the CPU reads and computes of experts, where it has none."""


def leaves_experts(shape: ModelShape, policy: Policy, tokens: np.ndarray) -> np.ndarray:
    """Which passes have so few tokens that the CPU computes experts of them."""
    experts = shape.experts
    if experts is None or not policy.cpu_experts:
        return np.zeros(np.shape(tokens), dtype=bool)
    most = cpu_expert_tokens(experts.count, experts.top_k, policy.gpu_batch_size)
    return np.asarray(tokens / policy.num_gpu_batches <= most)


def fetches_hits(shape: ModelShape, tokens: np.ndarray) -> np.ndarray:
    """Which passes have so few tokens that only the experts that these hit cross the link."""
    experts = shape.experts
    most = 0 if experts is None else hit_expert_tokens(experts.count, experts.top_k)
    return np.asarray(tokens) <= most


def _hit_share(shape: ModelShape, tokens: np.ndarray) -> np.ndarray:
    return np.zeros(np.shape(tokens)) if shape.experts is None else shape.experts.hit(tokens) / shape.experts.count


def spared_bytes(shape: ModelShape, policy: Policy, tokens: np.ndarray, hits: bool) -> np.ndarray:
    """What of a layer does not cross the link: the experts that the CPU computes, and in passes that bring the others
    only as they are hit, those that are not. Affine in the placement."""
    whole = shape.expert_bytes(policy.weight_bits)
    share = np.where(fetches_hits(shape, tokens), _hit_share(shape, tokens), 1.0) if hits else np.ones(np.shape(tokens))
    on_cpu = np.where(leaves_experts(shape, policy, tokens), share * whole, 0.0)
    return affine(weights_cpu=(1 - share) * whole, cpu_experts=on_cpu)


def hit_fetch_seconds(shape: ModelShape, hardware: Hardware, policy: Policy, tokens: np.ndarray) -> np.ndarray:
    """Of a layer whose experts come as they are hit: its products wait for them, and a kernel fetches them as it
    gathers pages. Affine in the placement."""
    brought = _hit_share(shape, tokens) * shape.expert_bytes(policy.weight_bits) / hardware.gather
    brought = np.where(fetches_hits(shape, tokens), brought, 0.0)
    return affine(weights_cpu=brought, cpu_experts=-np.where(leaves_experts(shape, policy, tokens), brought, 0.0))


def routed_traffic(
    shape: ModelShape, hardware: Hardware, policy: Policy, tokens: np.ndarray, traffic: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Of a layer whose experts the CPU computes: hidden states go down, a row of each choice comes up, and every
    micro-batch reads the experts that its tokens go to, as if routed evenly. The least used are computed there, so that
    it is less in truth."""
    experts, bits, left = shape.experts, policy.weight_bits, leaves_experts(shape, policy, tokens)
    if experts is None or not left.any():
        return NO_EXPERTS
    batches, each = policy.num_gpu_batches, shape.expert_bytes(bits) / experts.count
    hit = np.where(left, batches * experts.hit(tokens / batches), 0.0)
    seconds = hit * hardware.cpu_expert_seconds(each, experts.rows(tokens / batches), bits)
    rows = np.where(left, tokens * shape.hidden_bytes, 0.0)
    calls = np.where(left, batches * hardware.cpu_attention_seconds, 0.0)
    return {
        "h2d": traffic["h2d"] + affine(cpu_experts=experts.top_k * rows),
        "d2h": traffic["d2h"] + affine(rows),
        "experts": affine(cpu_experts=hit * each),
        "expert_seconds": affine(calls, cpu_experts=seconds),
    }
