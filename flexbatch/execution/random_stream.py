"""Counter-based random numbers: a pure function of (stream key, position, lane), the same on every device and in every
batch.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014)
used by index: lane i of a stream is mix(key + i * gamma). One such hash per vocabulary entry costs about ten
elementwise operations; a seeded generator object per row would cost a kernel launch per row, and its numbers would
differ between CPU and CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexbatch.execution.copies import sent

GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
TOKEN_DRAW = 0
"""Purpose of the stream that draws tokens; other purposes (accepting a drafted token) never reuse its numbers."""
ACCEPT_DRAW = 1


def _signed(word: int) -> int:
    """The int64 with the same bits: torch multiplies and adds int64 modulo 2**64."""
    word %= 2**64
    return word - 2**64 if word >= 2**63 else word


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64 [...]."""
    x = (x ^ _shift(x, 30)) * _signed(MULTIPLIERS[0])
    x = (x ^ _shift(x, 27)) * _signed(MULTIPLIERS[1])
    return x ^ _shift(x, 31)


def uniforms(
    keys: list[int], positions: list[int], queues: int, device: torch.device | str, purpose: int = TOKEN_DRAW
) -> Tensor:
    """Uniform float64 [len(keys), lanes] in (0, 1), never 0 or 1.

    keys: 64-bit stream keys; positions: index of the generated token each row draws. Row r depends on (keys[r],
    positions[r], purpose) alone.
    """
    start = sent([_signed(key) for key in keys], torch.int64, device)
    step = sent([_signed((2 * position + purpose + 1) * GAMMA) for position in positions], torch.int64, device)
    row = mix(start + step)
    queue = torch.arange(1, queues + 1, dtype=torch.int64, device=device) * _signed(GAMMA)
    # 52 bits and a half: the largest, 1 - 2**-53, is still below 1 in float64.
    return (_shift(mix(row[:, None] + queue), 12).to(torch.float64) + 0.5) * 2.0**-52


def gumbel(keys: list[int], positions: list[int], queues: int, device: torch.device | str) -> Tensor:
    """Standard Gumbel noise float64 [len(keys), lanes]: argmax(log p + noise) is a draw from p.

    Preferred over inverting the cumulative distribution: rounding of 1e-7 in the logits moves every boundary of a
    cumulative sum and flips about one draw in 200 from 50,000 nearly equal tokens; it flips the argmax with a
    probability of about 1e-7.
    """
    return -torch.log(-torch.log(uniforms(keys, positions, queues, device)))
