"""Products of a GPU, or of the processor in its place: with the weights of a layer, and with those of its experts."""

from __future__ import annotations

import numpy as np

from flexbatch.policy.decode_graphs import LAUNCHES_OF_EXPERTS
from flexbatch.policy.expansion import coded_seconds, expanded_bytes, in_codes
from flexbatch.policy.expert_traffic import product_seconds
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.launches import KERNELS_OF_TICK
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.policy import Policy

Demand = tuple[np.ndarray, np.ndarray, float | np.ndarray]
"""Seconds, FLOPs and bytes of the device's memory."""


def products(
    shape: ModelShape, hardware: Hardware, policy: Policy, elements: int, tokens: np.ndarray, kind: str
) -> Demand:
    """Of so many ``tokens`` of all micro-batches with ``elements`` of a kind of layer ("layer", "dense", "head"). Every
    micro-batch multiplies with all weights; quantized ones are expanded once, or read in codes by each."""
    batches, each = policy.num_gpu_batches, tokens / policy.num_gpu_batches
    expanded = expanded_bytes(shape, hardware, policy, tokens, kind)
    start = (hardware.device == "cuda") * hardware.expand_start_seconds * (np.asarray(expanded) > 0)
    seconds = batches * hardware.gemm_seconds(elements, each, shape.element_bytes) + start + expanded / hardware.expand
    moved = batches * shape.weight_bytes(elements, 16) + expanded
    if kind != "head":
        bits = policy.weight_bits
        stored, coded = shape.weight_bytes(elements, bits), in_codes(hardware, policy, tokens)
        in_turn = batches * coded_seconds(hardware, bits, elements, stored, each)
        seconds = np.where(coded, in_turn, seconds)
        moved = np.where(coded, batches * stored, moved)
    return seconds, 2.0 * elements * tokens, moved


def routed_products(shape: ModelShape, hardware: Hardware, policy: Policy, tokens: np.ndarray) -> Demand:
    """Every micro-batch multiplies with the experts that its tokens go to, each with the rows that it is given, and
    takes as long as if all had equally many. What routes, sorts and adds up beside the products costs the device as
    much a kernel as those of a layer: as graphs, layers of three models took an H100 35 to 67 us longer with four
    tokens an expert than their weights did, and this is 53 there."""
    experts, batches, bits = shape.experts, policy.num_gpu_batches, policy.weight_bits
    assert experts is not None
    elements, each = experts.elements(shape.hidden_size), tokens / batches
    hit = experts.hit(each)
    one = product_seconds(hardware, elements, experts.rows(each), bits, shape.element_bytes)
    routing = LAUNCHES_OF_EXPERTS / KERNELS_OF_TICK * hardware.graph_seconds
    moved = batches * hit * shape.expert_bytes(bits) / experts.count
    return batches * (hit * one + routing), 2.0 * experts.top_k * elements * tokens, moved
