"""What GPUs that have a part of the model each take to give each other what they have computed."""

from __future__ import annotations

import numpy as np

from flexbatch.policy.hardware import Hardware
from flexbatch.policy.model_shape import ModelShape


def sum_seconds(hardware: Hardware, tokens: np.ndarray, hidden_bytes: float, micro_batches: int) -> np.ndarray:
    """GPUs that share a layer add up its two products, and compute nothing meanwhile. Each sends, of a sum, twice what
    it does not have itself of the result: NCCL's ring."""
    ranks, rate = hardware.tensor_ranks, hardware.interconnect or hardware.d2h
    sent = 2 * (ranks - 1) / ranks * tokens * hidden_bytes
    return 2 * (sent / rate + micro_batches * hardware.interconnect_seconds)


def sums_of_pass(shape: ModelShape, hardware: Hardware, micro_batches: int) -> int:
    """How often they do so in a pass: twice a layer, and once for what the embedding looks up."""
    return (2 * shape.num_layers + 1) * micro_batches if hardware.tensor_ranks > 1 else 0


def send_rate(hardware: Hardware) -> float:
    """Bytes a second of hidden states that one stage of a pipeline sends to the next."""
    return hardware.interconnect_send or hardware.interconnect or hardware.d2h
