"""What it takes to multiply with quantized weights: they are expanded to 16 bits first, or read as they are, for a few
tokens on a GPU where a policy has it so, and on a processor that was measured at it."""

from __future__ import annotations

import numpy as np

from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import CODED_PASS_TOKENS, CODED_TOKENS
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.policy import Policy

PRODUCTS_OF_LAYER = 4
"""Queries, keys and values; what attention gives; up, with the gate; down."""
CODED_TILES = (8, 16, 32, 64, 128, 256)
"""Tokens of the tiles that they are multiplied in; a tile that is not full takes as long as one that is."""
START_SECONDS = (3.5e-6, 4e-6, 9e-6, 9e-6, 14e-6, 17e-6)
"""Of a product in tiles of these, beside what its elements take, and what a plain one takes to begin and end."""
BANDWIDTH_SHARES = (0.64, 0.58, 0.58, 0.58, 0.58, 0.58)
"""Of the GPU's memory bandwidth, at which matrices in codes are read."""
RATE_SHARES = {4: (np.inf, np.inf, 0.20, 0.36, 0.53, 0.72), 8: (np.inf, np.inf, 0.16, 0.27, 0.45, 0.66)}
"""Of the best rate of plain products, what tiles reach of 4 and 8 bits: codes are expanded for each.

All by the best launches of the matrices of OPT-6.7B and Llama-3-8B in benchmark/results/kernel-tuning-h100.jsonl and
kernel-tuning-coded-h200.jsonl: seconds against elements are lines, the same on both cards where no memory bounds
them."""


def most_in_codes(num_gpu_batches: int) -> int:
    """Tokens of the largest pass of so many micro-batches that a GPU multiplies with weights in codes."""
    return max(CODED_TOKENS * num_gpu_batches, CODED_PASS_TOKENS)


def in_codes(hardware: Hardware, policy: Policy, tokens: np.ndarray) -> np.ndarray:
    """For passes of so many tokens: whether they are multiplied with weights in codes. What was measured on a processor
    has in it what is expanded for many tokens."""
    if not policy.few_in_codes or policy.weight_bits == 16:
        return np.zeros(np.shape(tokens), dtype=bool)
    if hardware.device == "cpu":
        return np.full(np.shape(tokens), hardware.coded(policy.weight_bits) is not None)
    return np.asarray(tokens) <= most_in_codes(policy.num_gpu_batches)


def quantized_launch_seconds(hardware: Hardware, policy: Policy, tokens: np.ndarray) -> np.ndarray:
    """Of a layer: launching the expansion of its weights once, or with every tick products with their codes. Nothing of
    16 bits."""
    if policy.weight_bits == 16:
        return np.zeros(np.shape(tokens))
    coded = policy.num_gpu_batches * hardware.launched_seconds("coded")
    return np.where(in_codes(hardware, policy, tokens), coded, hardware.launched_seconds("expand"))


def coded_seconds(
    hardware: Hardware, bits: int, elements: float, stored_bytes: float, tokens: np.ndarray
) -> np.ndarray:
    """So many ``tokens`` of one micro-batch times the matrices of a layer in codes."""
    if hardware.device == "cpu":
        return hardware.gemm_seconds(elements, tokens, weight_bits=bits)
    tile = np.minimum(np.searchsorted(CODED_TILES, tokens), len(CODED_TILES) - 1)
    reading = stored_bytes / (np.asarray(BANDWIDTH_SHARES)[tile] * hardware.gpu_bandwidth)
    size = np.asarray(CODED_TILES)[tile]
    rate = np.asarray(RATE_SHARES.get(bits, RATE_SHARES[8]))[tile] * max(hardware.gemm.values)
    multiplying = 2.0 * elements * size * np.ceil(np.maximum(1, tokens) / size) / rate
    return np.maximum(reading, multiplying) + PRODUCTS_OF_LAYER * np.asarray(START_SECONDS)[tile]


def expanded_bytes(
    shape: ModelShape, hardware: Hardware, policy: Policy, tokens: np.ndarray, kind: str
) -> float | np.ndarray:
    """Read and written to expand a layer ("layer", or "dense": one without experts) for passes of so many tokens; 0 for
    16 bits, for the head, for experts, which are expanded in registers, and for tokens that are multiplied with
    codes."""
    bits = policy.weight_bits
    stored = {"layer": shape.block_bytes, "dense": shape.dense_bytes}.get(kind)
    if stored is None or bits == 16:
        return 0.0
    whole = float(stored(bits) + stored(16))
    if kind == "layer":
        whole -= shape.expert_bytes(bits) + shape.expert_bytes(16)
    return np.where(in_codes(hardware, policy, tokens), 0.0, whole)
