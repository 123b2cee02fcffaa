"""Affine functions of a placement: what the linear program is made of.

A row [1 + variables] is a constant and a coefficient for each share of a tensor kind on a tier.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np

from flexbatch.policy.percent import KINDS
from flexbatch.policy.policy import TIERS, Policy

Number = float | np.ndarray

VARIABLES = (*(f"{kind}_{tier}" for kind in KINDS for tier in TIERS), "cpu_attention", "cpu_experts")
"""The nine fractions, the share of all sequences that is attended on the CPU, and the share of a layer's experts that
is computed there."""

COLUMNS = {name: 1 + i for i, name in enumerate(VARIABLES)}

RESIDENT = 1e-6


def affine(constant: Number = 0.0, **coefficients: Number) -> np.ndarray:
    """[..., 1 + len(VARIABLES)]: a constant and coefficients by variable, each a number or an array over passes."""
    # A search asks for ten thousands of rows of a single pass, and finding the common shape of numbers takes longer
    # than writing them.
    shapes = {value.shape for value in (constant, *coefficients.values()) if isinstance(value, np.ndarray)} - {()}
    shape = np.broadcast_shapes(*shapes) if len(shapes) > 1 else next(iter(shapes), ())
    row = np.zeros((*shape, 1 + len(VARIABLES)))
    row[..., 0] = constant
    for name, value in coefficients.items():
        row[..., COLUMNS[name]] = value
    return row


def evaluate(row: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The affine ``row`` at ``point`` [1 + len(VARIABLES)]."""
    return row @ point


def total(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The sum of at least one array."""
    return functools.reduce(np.add, parts)


def slowest(rows: Iterable[np.ndarray], point: np.ndarray) -> np.ndarray:
    """The maximum over ``rows`` at ``point``, pass by pass."""
    return functools.reduce(np.maximum, (evaluate(row, point) for row in rows))


def point_of(policy: Policy) -> np.ndarray:
    """The placement of ``policy`` as a point, the constant 1 first."""
    cpu_attention = policy.cache.cpu * policy.cpu_attention
    cpu_experts = policy.weights.cpu * policy.cpu_experts
    splits = (*policy.weights.fractions, *policy.cache.fractions, *policy.activations.fractions)
    return np.array([1.0, *splits, cpu_attention, cpu_experts])
