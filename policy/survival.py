"""The chance that an answer goes on beyond a length, by answers that were seen: what memory is reserved by, in the
scheduler and in a plan's walk of its passes alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EDGES = np.unique(np.concatenate([np.arange(0, 1024, 8), np.geomspace(1024, 2**31, 240)]).round())
"""Of the bins in which ends of answers are counted: 8 tokens wide at first, then 6 % of the length."""
PRIOR = 2
"""Answers that are taken to have passed every bin without an end, beside those that were seen, where memory is
reserved: before there are any, every answer is expected to reach its limit, and the estimate falls as they end."""
PASSES_AHEAD = np.unique(np.concatenate([[0], np.geomspace(8, 2**31, 340)]).astype(np.int64))
"""Times to come at which the pages of all sequences are estimated."""


@dataclass(frozen=True)
class Survival:
    """The chance that an answer goes on beyond a length, at ``EDGES``.

    It is the estimate of Kaplan and Meier: an answer that was cut at its limit, or is still growing, says that it did
    not end before. Without those that still grow, the first answers of a run, which are its short ones, would stand
    for all.
    """

    survived: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, ended: np.ndarray) -> Survival:
        """Of answers of these lengths; ``ended``: which of them came to their end there, and were not cut."""
        ends, cuts = (np.histogram(lengths[which], EDGES)[0] for which in (ended, ~ended))
        reached = len(lengths) - np.concatenate([[0], np.cumsum(ends + cuts)])[:-1]
        # Those that were cut within a bin have been in it for half of its width, on average.
        return cls(np.concatenate([[1], np.cumprod(1 - ends / (reached - cuts / 2 + PRIOR))]))

    def at(self, lengths: np.ndarray) -> np.ndarray:
        return np.interp(lengths, EDGES, self.survived)

    def check(self) -> None:
        assert self.survived[0] == 1 and self.survived[-1] > 0 and (np.diff(self.survived) <= 0).all()


NOTHING_SEEN = Survival.of(np.zeros(0), np.zeros(0, dtype=bool))
