"""A stage of a pass, and the one before its layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FIRST_PAGES = "first pages"


@dataclass(frozen=True)
class Stage:
    """One kind of stage of a pass: how often, seconds of each of ``ROWS`` and bytes (FLOPs for gpu_compute) of each
    resource, all affine."""

    name: str
    count: int
    seconds: dict[str, np.ndarray]
    work: dict[str, np.ndarray]


def first_pages(layer: Stage, row: str) -> Stage:
    """What comes before the first layer: weights cross the link while the pass before ends, its pages when the pass is
    composed. Passes of Llama-3.2-1B that gathered 1.5 ms a layer took 3 ms more than their link was planned to be
    busy."""
    nothing, gathered = 0.0 * layer.seconds["h2d"], layer.seconds[row] - layer.seconds["gpu_compute"]
    seconds = {name: gathered if name == row else nothing for name in layer.seconds}
    return Stage(FIRST_PAGES, 1, seconds, {name: 0.0 * each for name, each in layer.work.items()})
