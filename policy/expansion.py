"""What it takes to expand quantized weights to 16 bits before a pass multiplies with them."""

from __future__ import annotations

import numpy as np

from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import CODED_TOKENS
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.policy import Policy


def expanded_bytes(
    shape: ModelShape, hardware: Hardware, policy: Policy, tokens: np.ndarray, kind: str
) -> float | np.ndarray:
    """Read and written to expand a layer ("layer", or "dense": one without experts) for passes of so many tokens; 0 for
    16 bits, for the head, for experts, which are expanded in registers, and for the few tokens that a GPU multiplies
    with codes."""
    bits = policy.weight_bits
    stored = {"layer": shape.block_bytes, "dense": shape.dense_bytes}.get(kind)
    if stored is None or bits == 16:
        return 0.0
    whole = float(stored(bits) + stored(16))
    if kind == "layer":
        whole -= shape.expert_bytes(bits) + shape.expert_bytes(16)
    if hardware.device != "cuda":
        return whole
    return np.where(tokens / policy.num_gpu_batches <= CODED_TOKENS, 0.0, whole)
