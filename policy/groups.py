"""How many elements share a scale and a minimum where weights or cache are quantised: fewer in small models, which feel the error and not the bytes."""

from __future__ import annotations

SMALLEST, LARGEST = 16, 64


def _bounded(elements: int) -> int:
    """The power of two at or below ``elements``, within the bounds: kernels divide by it and read its codes in whole bytes."""
    return max(SMALLEST, min(LARGEST, 1 << max(0, elements.bit_length() - 1)))


def weight_group(hidden_size: int) -> int:
    """Inputs of a matrix that share a scale: 64 from 2,048 wide models on, 32 from 1,024, else 16."""
    return _bounded(hidden_size // 32)


def cache_group(head_dim: int) -> int:
    """Elements of a head that share a scale: two groups a head, of 64 at most. Keys have a few channels far larger than the rest (docs/compression.md)."""
    return _bounded(head_dim // 2)
