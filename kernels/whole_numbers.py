"""Whole numbers that launches are made of.

Triton has both functions too, made for its kernels: called on the host each of them takes 2 us to look for constants of
kernels among its arguments, and a tick calls them 23 times.
"""

from __future__ import annotations


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The least power of two that is x or more, of x from 1 on."""
    return 1 << (x - 1).bit_length()
