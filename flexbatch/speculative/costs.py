"""What passes and drafting cost, learned from the passes of this run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from flexbatch.speculative.acceptance import PiecewiseLinear

BUCKETS_PER_DOUBLING = 3
"""Sizes within a quarter are one point of the curve."""
RECENT = 7
"""Measurements of a size that count, by the fastest: the context grows and with it the cost, while slow moments and
caches that another size has left cold only ever add. A single plain pass among passes with trees took up to a third
longer than many in a row."""
PATIENCE, MAX_PATIENCE = 16, 256
"""Passes after which a size that was not seen again is doubted: one slow moment must not rule it out for good. When
it comes back, it is believed for twice as long."""


@dataclass
class Point:
    """The last passes of about one size."""

    measured: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """(query tokens, seconds)."""
    seen: int = 0
    patience: int = PATIENCE

    @property
    def tokens(self) -> float:
        return fmean(tokens for tokens, _ in self.measured)

    @property
    def seconds(self) -> float:
        return min(seconds for _, seconds in self.measured)


class MeasuredCosts:
    """Seconds by query tokens: of a pass of the target, or of one level of drafting."""

    def __init__(self) -> None:
        self.points: dict[int, Point] = {}
        self.passes = 0

    def elapse(self) -> None:
        """A pass of the target has gone by."""
        self.passes += 1

    def observe(self, query_tokens: int, seconds: float, patience: int = PATIENCE) -> None:
        """One measurement; ``patience`` of a size that is new."""
        point = self.points.setdefault(bucket(query_tokens), Point(seen=self.passes, patience=patience))
        if self.stale(point):
            point.patience = min(2 * point.patience, MAX_PATIENCE)
        point.measured.append((query_tokens, seconds))
        point.seen = self.passes

    def stale(self, point: Point) -> bool:
        return self.passes - point.seen > point.patience

    @property
    def known(self) -> bool:
        """Whether anything has been measured that is not in doubt."""
        return not all(map(self.stale, self.points.values()))

    def doubted(self, query_tokens: int) -> bool:
        """Whether passes of this size have not been measured, or not for long."""
        point = self.points.get(bucket(query_tokens))
        return point is None or self.stale(point)

    def curve(self, anchor: int | None = None) -> PiecewiseLinear:
        """Seconds by query tokens, linear between sizes that are not in doubt, and beyond the last two; of all sizes
        where all are in doubt.

        anchor: a size that counts in any case. A larger pass is never cheaper: what contradicts that is shared out
        by the number of measurements.
        """
        kept = [
            point
            for key, point in self.points.items()
            if key == (None if anchor is None else bucket(anchor)) or not self.stale(point)
        ]
        ordered = sorted(kept or self.points.values(), key=lambda point: point.tokens)
        seconds = rising([(point.seconds, len(point.measured)) for point in ordered])
        return PiecewiseLinear(tuple((point.tokens, value) for point, value in zip(ordered, seconds, strict=True)))

    def hopeful_curve(self, anchor: int) -> PiecewiseLinear:
        """`curve`, but flat up to twice the largest size and proportional from there: sizes in reach are tried and
        then known."""
        points = self.curve(anchor).points
        tokens, seconds = points[-1]
        return PiecewiseLinear((*points, (2 * tokens, seconds), (4 * tokens, 2 * seconds)))

    def report(self) -> list[dict[str, float]]:
        """The latest seconds by size."""
        return [
            {"query_tokens": round(point.tokens), "seconds": point.seconds} for _, point in sorted(self.points.items())
        ]


def bucket(query_tokens: int) -> int:
    return round(math.log2(max(query_tokens, 1)) * BUCKETS_PER_DOUBLING)


def rising(values: Sequence[tuple[float, int]]) -> list[float]:
    """The rising values nearest to these (value, weight) in the least-squares sense: isotonic regression by pooling
    adjacent violators.

    Importing the one in SciPy takes 0.3 to 0.7 s in the middle of a job, as long as a hundred passes of a small
    model.
    """
    pools: list[tuple[float, int, int]] = []
    """(mean, weight, values)."""
    for value, weight in values:
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (mean, heavy, count), (other, light, more) = pools[-2:]
            pools[-2:] = [((mean * heavy + other * light) / (heavy + light), heavy + light, count + more)]
    return [mean for mean, _, count in pools for _ in range(count)]
