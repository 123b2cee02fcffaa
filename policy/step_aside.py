"""What it costs that a sequence steps aside for others: its pages are moved and come back, or its tokens are read
anew. Plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flexbatch.policy.hardware import Hardware
from flexbatch.policy.model_shape import ModelShape

BATCHED_TOKENS = 512
"""Tokens among which those of a sequence are read anew: the rate of GEMMs is taken at so many."""


@dataclass(frozen=True)
class StepAsideCosts:
    """Rates of moving and of reading anew. Without any, pages are moved wherever they fit."""

    token_seconds: float = math.inf
    """To read one token anew."""
    byte_seconds: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Of one byte by (tier it leaves, tier it goes to); nothing where a pair is missing."""

    @classmethod
    def of(cls, shape: ModelShape, hardware: Hardware) -> StepAsideCosts:
        """By the machine's rates alone: in a pass that waits for another resource either may be cheaper than this,
        which is the same for both."""
        up, down = 1 / hardware.h2d, 1 / hardware.d2h
        read, write = 1 / hardware.disk_read, 1 / hardware.disk_write
        pairs = {
            ("gpu", "cpu"): down,
            ("cpu", "gpu"): up,
            ("cpu", "disk"): write,
            ("disk", "cpu"): read,
            ("gpu", "disk"): down + write,
            ("disk", "gpu"): read + up,
        }
        flops = 2.0 * shape.active_elements
        return cls(flops / hardware.gemm.at(BATCHED_TOKENS), pairs)

    def moving(self, num_bytes: int, source: str, target: str) -> float:
        """Seconds for pages of so many bytes to go to ``target`` and come back."""
        there, back = ((source, target), (target, source))
        return num_bytes * (self.byte_seconds.get(there, 0.0) + self.byte_seconds.get(back, 0.0))

    def reading(self, num_tokens: int) -> float:
        """Seconds to read so many tokens anew."""
        return num_tokens * self.token_seconds

    def cheapest(self, num_tokens: int, num_bytes: int, source: str, targets: Iterable[str]) -> str | None:
        """The tier to move a sequence's pages to; None where reading its tokens anew is cheaper, or no tier has
        pages for them."""
        best = min(targets, key=lambda tier: self.moving(num_bytes, source, tier), default=None)
        if best is None or self.reading(num_tokens) < self.moving(num_bytes, source, best):
            return None
        return best
