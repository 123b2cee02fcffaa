"""What it takes to multiply with quantized weights: they are expanded to 16 bits first, or read as they are, for a few
tokens on a GPU, and on a processor that was measured at it."""

from __future__ import annotations

import numpy as np

from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import CODED_TOKENS
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.policy import Policy

CODED_RATE = 0.5
"""Of the GPU's memory bandwidth: that at which one token reads matrices in codes. An H100 reads those of a layer of
OPT-6.7B at 48 and 54 % of its copy rate at 4 and 8 bits."""
TWICE_TOKENS = 64
"""Tokens with which this takes twice as long, by the instructions of the products (there 2.3 and 1.8 times)."""


def in_codes(hardware: Hardware, policy: Policy, tokens: np.ndarray) -> np.ndarray:
    """For passes of so many tokens: whether they are multiplied with weights in codes. What was measured on a processor
    has in it what is expanded for many tokens."""
    if hardware.device == "cpu":
        return np.full(np.shape(tokens), hardware.coded(policy.weight_bits) is not None)
    few = np.asarray(tokens) / policy.num_gpu_batches <= CODED_TOKENS
    return few & (policy.weight_bits != 16)


def coded_seconds(
    hardware: Hardware, bits: int, elements: float, stored_bytes: float, tokens: np.ndarray
) -> np.ndarray:
    """So many ``tokens`` of one micro-batch times matrices in codes."""
    if hardware.device == "cpu":
        return hardware.gemm_seconds(elements, tokens, weight_bits=bits)
    return stored_bytes / (CODED_RATE * hardware.gpu_bandwidth) * (1 + np.asarray(tokens) / TWICE_TOKENS)


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
