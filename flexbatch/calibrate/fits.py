"""Fits of measurements: a rate with a fixed cost, and a curve that does not fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from flexbatch.policy.curve import Curve


@dataclass(frozen=True)
class RateFit:
    """``seconds = amount / rate + fixed_seconds``; ``error``: root mean square of the relative residuals."""

    rate: float
    fixed_seconds: float
    error: float


def fit_rate(amounts: Sequence[float], seconds: Sequence[float]) -> RateFit:
    """Non-negative least squares of the relative error, so that short measurements count as much as long ones.

    Where the fit is faster than the largest measurement by more than half (a busy machine: time hardly grows with
    the amount), that measurement alone gives the rate, and the error is large. Raises ValueError for fewer than two
    timings or timings of zero.
    """
    if len(amounts) != len(seconds) or len(amounts) < 2 or min(seconds) <= 0:
        raise ValueError(
            f"a rate needs at least two positive timings, got amounts {list(amounts)} and seconds {list(seconds)}"
        )
    x, t = np.asarray(amounts, dtype=float), np.asarray(seconds, dtype=float)
    # Scaled to the longest measurement: bytes and seconds differ by ten orders of magnitude.
    scale = x.max()
    design = np.stack([x / scale, np.ones_like(x)], axis=1)
    slope, fixed = non_negative(design / t[:, None], np.ones_like(t))
    largest = float(t[np.argmax(x)])
    if slope < largest / 1.5:
        slope, fixed = largest, 0.0
    residual = design @ np.array([slope, fixed]) / t - 1
    return RateFit(scale / slope, float(fixed), float(np.sqrt(np.mean(residual**2))))


def non_negative(design: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares over a few terms, none of which may be negative: the best of all choices of terms that are not 0.
    scipy, which has both fits, takes 0.4 s to import, a third of what torch takes."""
    best, least = np.zeros(design.shape[1]), float(values @ values)
    for chosen in product((False, True), repeat=design.shape[1]):
        if not any(chosen):
            continue
        found = np.zeros(design.shape[1])
        found[list(chosen)] = np.linalg.lstsq(design[:, list(chosen)], values, rcond=None)[0]
        residual = design @ found - values
        if found.min() >= 0 and float(residual @ residual) < least:
            best, least = found, float(residual @ residual)
    return best


def not_falling(values: np.ndarray) -> np.ndarray:
    """The nearest numbers that do not fall (isotonic regression): neighbors that do have their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean, count = (before * number + mean * count) / (number + count), number + count
        blocks.append((mean, count))
    means, counts = zip(*blocks, strict=True)
    return np.repeat(means, counts)


def mean_rate(amounts: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Of readings of as much in parts of these amounts, which took so long each: the rate of all together, and the root
    mean square of what each was off by.

    Disks of clouds change from one second to the next more than with the size of a request: lines through three sizes
    were 34 to 48 % off on H100's hosts, and took a rate that was never read at.
    """
    each = np.asarray(seconds, dtype=float) / np.asarray(amounts, dtype=float)
    rate = float(1 / each.mean())
    return rate, float(np.sqrt(np.mean((each * rate - 1) ** 2)))


def fit_curve(points: Sequence[float], values: Sequence[float]) -> tuple[Curve, float]:
    """The nearest curve that does not fall (isotonic regression), and the relative root-mean-square error."""
    order = np.argsort(points)
    x, y = np.asarray(points, dtype=float)[order], np.asarray(values, dtype=float)[order]
    fitted = not_falling(y)
    error = float(np.sqrt(np.mean((fitted / y - 1) ** 2)))
    return Curve(tuple(float(v) for v in x), tuple(float(v) for v in fitted)), error
