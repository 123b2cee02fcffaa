"""Grids of cases of which a few run by default and all of them with ``-m slow``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def covering(cells: Iterable[Sequence[Any]], together: int = 1) -> list[int]:
    """Places of a few cells in which every value of every axis occurs; with ``together=2`` every pair of values of two
    axes. The first of those that bring most, so that it is the same choice in every process."""
    rows = [frozenset(itertools.combinations(enumerate(map(repr, cell)), together)) for cell in cells]
    missing, chosen = frozenset().union(*rows), []
    while missing:
        chosen.append(max(range(len(rows)), key=lambda position: (len(rows[position] & missing), -position)))
        missing -= rows[chosen[-1]]
    return sorted(chosen)


def sampled(cells: Iterable[Sequence[Any]], together: int = 1) -> list[Any]:
    """The cells as parameters of a test: those of `covering` run by default, the others are marked ``slow``."""
    cells = list(cells)
    quick = set(covering(cells, together))
    return [
        pytest.param(*cell, marks=() if position in quick else pytest.mark.slow) for position, cell in enumerate(cells)
    ]


def grid(*axes: Iterable[Any], together: int = 1) -> list[Any]:
    """All combinations of one value of each axis, as `sampled` has them."""
    return sampled(itertools.product(*axes), together)
