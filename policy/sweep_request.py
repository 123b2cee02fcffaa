"""Which sizes of memory a sweep tries."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a mistake need not wait for it
    from flexbatch.policy.policy import Constraints

MOST_STEPS = 100
"""Sizes: each is a plan of its own, which takes some seconds."""


@dataclasses.dataclass(frozen=True)
class SweepRequest:
    """``kind`` "gpu_memory" or "cpu_memory", from ``first`` to ``last`` bytes in ``steps`` equal steps."""

    kind: str
    first: int
    last: int
    steps: int

    @classmethod
    def parse(cls, text: str, parse_bytes: Callable[[str], int]) -> SweepRequest:
        """From ``gpu_memory=8GiB:48GiB:5``. Raises ValueError."""
        match = re.fullmatch(r"(gpu_memory|cpu_memory)=([^:]+):([^:]+):(\d+)", text.strip())
        if match is None:
            raise ValueError(
                f"--sweep {text!r}: write gpu_memory=8GiB:48GiB:5 or cpu_memory=...: first, last and how many"
            )
        try:
            request = cls(match[1], parse_bytes(match[2]), parse_bytes(match[3]), int(match[4]))
        except ValueError as error:
            raise ValueError(f"--sweep {text!r}: {error}") from None
        if not 2 <= request.steps <= MOST_STEPS or request.last <= request.first:
            raise ValueError(f"--sweep {text!r}: needs 2 to {MOST_STEPS} steps and a last size above the first")
        return request

    def constrain(self, constraints: Constraints, size: int) -> Constraints:
        gpu = self.kind == "gpu_memory"
        return dataclasses.replace(
            constraints,
            gpu_memory=size if gpu else constraints.gpu_memory,
            cpu_memory=constraints.cpu_memory if gpu else size,
        )

    @property
    def sizes(self) -> list[int]:
        return [self.first + (self.last - self.first) * i // (self.steps - 1) for i in range(self.steps)]
