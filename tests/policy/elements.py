"""How many weights a shape has."""

from __future__ import annotations

from flexbatch.policy.model_shape import ModelShape


def total_elements(shape: ModelShape) -> int:
    return shape.num_layers * shape.block_elements + shape.head_elements + sum(shape.embedding_tensors)
