"""What the CPU's experts read and compute in a layer of the passes of a load, and what that spares the link."""

from __future__ import annotations

import numpy as np

from flexbatch.policy.affine import affine
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import cpu_expert_tokens
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.policy import Policy

NO_EXPERTS = {"experts": affine(), "expert_seconds": affine()}
"""What the CPU reads and computes of experts, where it has none."""


def leaves_experts(shape: ModelShape, policy: Policy, tokens: np.ndarray) -> np.ndarray:
    """Which passes have so few tokens that the CPU computes experts of them."""
    experts = shape.experts
    if experts is None or not policy.cpu_experts:
        return np.zeros(np.shape(tokens), dtype=bool)
    return np.asarray(tokens / policy.num_gpu_batches <= cpu_expert_tokens(experts.count, experts.top_k))


def spared_bytes(shape: ModelShape, policy: Policy, tokens: np.ndarray) -> np.ndarray:
    """What does not cross the link where the CPU computes all experts of a layer."""
    return np.where(leaves_experts(shape, policy, tokens), shape.expert_bytes(policy.weight_bits), 0.0)


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
