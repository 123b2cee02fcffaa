"""What GPUs that have a part of the model each take to give each other what they have computed."""

from __future__ import annotations

import numpy as np

from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import LOGITS_CHUNK_BYTES
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


TELLING = 1.8
"""Passes' own cost that rank 0 takes to tell the others what a pass is, where that was not measured: 1.6 to 2.5 of ten
jobs of two ranks on three hosts, 1.3 to 2 ms."""


def telling_seconds(shape: ModelShape, hardware: Hardware) -> float:
    """Of a pass whose layers or stages several ranks have: they begin when they know what it is, and the next pass is
    composed when this one's tokens are there."""
    if hardware.tensor_ranks * shape.stages == 1:
        return 0.0
    return hardware.tell_seconds or TELLING * hardware.pass_seconds


def logits_seconds(shape: ModelShape, hardware: Hardware, rows: np.ndarray) -> np.ndarray:
    """Ranks that share the head send rank 0 their columns of so many rows in float32, which puts them together."""
    ranks, rate = hardware.tensor_ranks, hardware.interconnect or hardware.d2h
    num_bytes = 4.0 * rows * shape.vocab_size
    return (ranks > 1) * num_bytes * ((ranks - 1) / ranks / rate + 2 / hardware.gpu_bandwidth)


def head_launch_seconds(shape: ModelShape, hardware: Hardware, rows: np.ndarray) -> np.ndarray:
    """Launching the head of ranks that share it, which is in no graph: a tick for every chunk of logits."""
    chunks = np.ceil(rows / max(1, LOGITS_CHUNK_BYTES // (4 * shape.vocab_size)))
    return (hardware.tensor_ranks > 1) * chunks * hardware.launch_seconds


def send_rate(hardware: Hardware) -> float:
    """Bytes a second of hidden states that one stage of a pipeline sends to the next."""
    return hardware.interconnect_send or hardware.interconnect or hardware.d2h
