"""Fits are those of scipy, which has the same ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.calibrate.fits import fit_curve, non_negative, not_falling

optimize = pytest.importorskip("scipy.optimize")
NUMBERS = st.floats(0.01, 100.0)


@given(st.integers(1, 4), st.integers(4, 9), st.integers(0, 10**6))
def test_no_term_of_a_fit_is_negative_and_none_fits_better(terms, rows, seed):
    generator = np.random.default_rng(seed)
    design, values = generator.normal(size=(rows, terms)), generator.normal(size=rows)
    found, expected = non_negative(design, values), optimize.nnls(design, values)[0]
    assert found.min() >= 0
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_terms_that_only_hurt_are_nothing():
    np.testing.assert_array_equal(non_negative(np.array([[1.0, 2.0], [1.0, 1.0]]), np.array([-1.0, -2.0])), [0, 0])


@given(st.lists(NUMBERS, min_size=1, max_size=12))
def test_a_curve_that_does_not_fall_is_the_nearest(values):
    found = not_falling(np.array(values))
    assert (np.diff(found) >= 0).all()
    np.testing.assert_allclose(found, optimize.isotonic_regression(values).x, rtol=1e-9)


def test_a_curve_of_measurements_says_how_far_it_is_from_them():
    curve, error = fit_curve([4, 1, 2], [3.0, 2.0, 4.0])
    assert curve.points == (1, 2, 4) and curve.values == (2.0, 3.5, 3.5)
    assert error == pytest.approx(np.sqrt(np.mean(np.square([0.0, 3.5 / 4 - 1, 3.5 / 3 - 1]))))
