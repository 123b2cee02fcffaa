"""What passes and drafting cost, learned from the passes of this run."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median

from flexbatch.speculative.acceptance import PiecewiseLinear

BUCKETS_PER_DOUBLING = 3
"""Sizes within a quarter are one point of the curve."""
RECENT = 7
"""Measurements of a size that count, by their median: the context grows and with it the cost, and a busy machine has slow moments."""
FORGET_PASSES = 200
"""A size not seen for so long is forgotten: what was too dear once is tried again when acceptance promises a gain."""


@dataclass
class Point:
    """The last passes of about one size."""

    measured: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """(query tokens, seconds)."""
    seen: int = 0

    @property
    def tokens(self) -> float:
        return fmean(tokens for tokens, _ in self.measured)

    @property
    def seconds(self) -> float:
        return median(seconds for _, seconds in self.measured)


class MeasuredCosts:
    """Seconds of a target pass by its query tokens, and of drafting by depth."""

    def __init__(self) -> None:
        self.points: dict[int, Point] = {}
        self.levels: deque[float] = deque(maxlen=RECENT)
        self.passes = 0

    def observe_pass(self, query_tokens: int, seconds: float) -> None:
        """One pass of the target."""
        self.passes += 1
        bucket = round(math.log2(max(query_tokens, 1)) * BUCKETS_PER_DOUBLING)
        point = self.points.setdefault(bucket, Point())
        point.measured.append((query_tokens, seconds))
        point.seen = self.passes
        self.points = {key: point for key, point in self.points.items() if self.passes - point.seen <= FORGET_PASSES}

    def observe_draft(self, levels: int, seconds: float) -> None:
        """Growing trees of so many levels, for all sequences of the block together."""
        if levels:
            self.levels.append(seconds / levels)

    @property
    def known(self) -> bool:
        return bool(self.points)

    def pass_seconds(self) -> PiecewiseLinear:
        """The curve of a pass. Beyond what was seen it is flat up to twice the largest size, then proportional: sizes in reach are tried and then known.

        A larger pass is never cheaper: isotonic regression shares out what contradicts that, by the number of measurements.
        """
        from scipy.optimize import isotonic_regression  # 0.3 s that only an automatic tree needs

        ordered = sorted(self.points.values(), key=lambda point: point.tokens)
        seconds = isotonic_regression([point.seconds for point in ordered], weights=[len(point.measured) for point in ordered]).x.tolist()
        curve = {point.tokens: value for point, value in zip(ordered, seconds, strict=True)}
        largest = ordered[-1].tokens
        return PiecewiseLinear((*curve.items(), (2 * largest, seconds[-1]), (4 * largest, 2 * seconds[-1])))

    def draft_seconds(self, depth: float) -> float:
        """Of growing ``depth`` levels; nothing before the first was measured."""
        return median(self.levels) * depth if self.levels else 0.0

    def report(self) -> dict[str, object]:
        """What was learned: the latest seconds of a pass by its query tokens, and of one level of drafting."""
        passes = [{"query_tokens": round(point.tokens), "seconds": point.seconds} for _, point in sorted(self.points.items())]
        return {"pass_seconds": passes, "draft_level_seconds": self.draft_seconds(1)}
