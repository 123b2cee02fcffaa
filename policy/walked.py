"""The passes of a job that was walked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexbatch.policy.pass_load import PassLoad


@dataclass(frozen=True)
class Walk:
    """The passes of a job in order: rows of alike ones, and how many passes each row stands for."""

    load: PassLoad
    counts: np.ndarray
    in_flight: np.ndarray
    """Sequences of the block in each row."""
    admitted: np.ndarray
    """Sequences that have been admitted by each row."""

    @property
    def passes(self) -> float:
        return float(self.counts.sum())

    @property
    def tail(self) -> np.ndarray:
        """Rows after the last admission whose block is not as full as it was."""
        last = int(np.argmax(self.admitted == self.admitted[-1]))
        return (np.arange(len(self.counts)) >= last) & (self.in_flight < self.in_flight.max())
