"""Measured quantities: numbers that may be rates, and curves of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np


def is_rate(value: object) -> bool:
    # JSON knows integers that no float holds.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


@dataclass(frozen=True)
class Curve:
    """A measured quantity at increasing points; constant outside them."""

    points: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(map(is_rate, (*self.points, *self.values))):
            raise ValueError(
                f"a curve needs finite positive numbers, got points {self.points} and values {self.values}"
            )
        if len(self.points) != len(self.values) or not self.points:
            raise ValueError(
                f"a curve needs as many values as points and at least one, got {len(self.points)} points and "
                f"{len(self.values)} values"
            )
        if list(self.points) != sorted(set(self.points)):
            raise ValueError(f"a curve needs increasing points, got {self.points}")

    def at(self, point: float) -> float:
        """Linear between the points."""
        return float(np.interp(point, self.points, self.values))
