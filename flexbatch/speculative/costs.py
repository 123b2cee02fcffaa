"""What passes and drafting cost, learned from the passes of this run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexbatch.speculative.acceptance import PiecewiseLinear

BUCKETS_PER_DOUBLING = 3
"""Sizes within a quarter are one point of the curve."""
RECENT = 0.3
"""Weight of the newest measurement of a size: the context grows, and with it the cost."""
FORGET_PASSES = 200
"""A size not seen for so long is forgotten: what was too dear once is tried again when acceptance promises a gain."""


@dataclass
class Point:
    """Recent mean of the passes of about one size."""

    tokens: float
    seconds: float
    seen: int

    def add(self, tokens: float, seconds: float, now: int) -> None:
        self.tokens += RECENT * (tokens - self.tokens)
        self.seconds += RECENT * (seconds - self.seconds)
        self.seen = now


class MeasuredCosts:
    """Seconds of a target pass by its query tokens, and of drafting by depth."""

    def __init__(self) -> None:
        self.points: dict[int, Point] = {}
        self.level_seconds: float | None = None
        self.passes = 0

    def observe_pass(self, query_tokens: int, seconds: float) -> None:
        """One pass of the target."""
        self.passes += 1
        bucket = round(math.log2(max(query_tokens, 1)) * BUCKETS_PER_DOUBLING)
        if bucket in self.points:
            self.points[bucket].add(query_tokens, seconds, self.passes)
        else:
            self.points[bucket] = Point(query_tokens, seconds, self.passes)
        self.points = {key: point for key, point in self.points.items() if self.passes - point.seen <= FORGET_PASSES}

    def observe_draft(self, levels: int, seconds: float) -> None:
        """Growing trees of so many levels, for all sequences of the block together."""
        if levels:
            each = seconds / levels
            self.level_seconds = each if self.level_seconds is None else self.level_seconds + RECENT * (each - self.level_seconds)

    @property
    def known(self) -> bool:
        return bool(self.points)

    def pass_seconds(self) -> PiecewiseLinear:
        """The curve of a pass. Beyond what was seen it is flat up to twice the largest size, then proportional: sizes in reach are tried and then known.

        A larger pass is never cheaper, so a slow measurement (a first pass that compiles) counts no more than the passes above it.
        """
        ordered = sorted(self.points.values(), key=lambda point: point.tokens)
        seconds = [point.seconds for point in ordered]
        for i in reversed(range(len(seconds) - 1)):
            seconds[i] = min(seconds[i], seconds[i + 1])
        curve = {point.tokens: value for point, value in zip(ordered, seconds, strict=True)}
        largest = ordered[-1].tokens
        return PiecewiseLinear((*curve.items(), (2 * largest, seconds[-1]), (4 * largest, 2 * seconds[-1])))

    def draft_seconds(self, depth: float) -> float:
        """Of growing ``depth`` levels; nothing before the first was measured."""
        return (self.level_seconds or 0.0) * depth
