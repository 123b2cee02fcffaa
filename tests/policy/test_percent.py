"""Six numbers of a placement: what may be given, and that what a plan has or prints can be given again."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.config import EngineConfig
from flexbatch.policy.percent import checked_pair, percent_text
from flexbatch.policy.policy import Constraints, Policy, Split
from flexbatch.validation.errors import ConfigurationError

ALL_ON_GPU = Split(1.0, 0.0)


@st.composite
def splits(draw):
    """As placements come about: of bytes that lie on each tier."""
    num_bytes = draw(st.tuples(*[st.integers(0, 2**45)] * 3).filter(any))
    return Split(*(count / sum(num_bytes) for count in num_bytes))


@given(splits(), splits())
def test_what_a_plan_has_can_be_given_again(weights, cache):
    percent = Policy(weights, cache, ALL_ON_GPU, 1, 1).percent
    config = EngineConfig(percent=percent)
    for index, split in ((0, weights), (2, cache)):
        again = Split.from_percent(*config.percent[index : index + 2])
        assert again.fractions == pytest.approx(split.fractions, abs=1e-6)
    assert Constraints(percent=percent).percent == config.percent
    assert all(sum(config.percent[index : index + 2]) <= 100 for index in (0, 2, 4))


@given(splits(), splits(), st.integers(2, 6))
def test_what_a_plan_prints_can_be_given_again(weights, cache, digits):
    printed = percent_text(Policy(weights, cache, ALL_ON_GPU, 1, 1).percent, digits)
    percent = EngineConfig(percent=tuple(float(word) for word in printed.split())).percent
    assert percent[:2] == pytest.approx((100 * weights.gpu, 100 * weights.cpu), abs=10 ** (2.5 - digits))


def test_shares_that_round_up_together_are_printed_as_a_hundred():
    assert percent_text((60.365, 39.635, 0.0, 100.0, 100.0, 0.0), 4) == "60.37 39.63 0 100 100 0"


@pytest.mark.parametrize(
    ("gpu", "cpu"),
    [
        (92.89449999999999, 7.105500000000007),
        (100.00000000000001, 0.0),
        (-1e-13, 100.0),
        (100.00005, 0),
        (33.3, 66.70004),
    ],
)
def test_rounding_is_no_fault(gpu, cpu):
    on_gpu, on_cpu = checked_pair(gpu, cpu)
    assert on_gpu >= 0 and on_cpu >= 0 and on_gpu + on_cpu <= 100


@pytest.mark.parametrize(
    ("gpu", "cpu"),
    [(60, 40.1), (-0.1, 50), (50, -1), (101, 0), (0, 100.001), (math.nan, 0), (0, math.nan), (math.inf, 0)],
)
def test_more_than_all_is_refused_everywhere(gpu, cpu):
    for percent in ((gpu, cpu, 100, 0, 100, 0), (100, 0, gpu, cpu, 100, 0), (100, 0, 100, 0, gpu, cpu)):
        with pytest.raises(ConfigurationError, match="percent"):
            EngineConfig(percent=percent)
        with pytest.raises(ValueError, match=r"on gpu .* and cpu .* at most 100"):
            Constraints(percent=percent)
    with pytest.raises(ValueError, match="at most 100"):
        Split.from_percent(gpu, cpu)


@pytest.mark.parametrize("percent", [(), (100,), (100, 0, 100, 0, 100), (100, 0, 100, 0, 100, 0, 0)])
def test_six_numbers_or_none(percent):
    with pytest.raises(ConfigurationError, match="six numbers"):
        EngineConfig(percent=percent)
    with pytest.raises(ValueError, match="six numbers"):
        Constraints(percent=percent)


def test_open_shares_are_bounded_by_the_other():
    assert Constraints(percent=(None, 100.00000001, 30, None, None, None)).percent == (
        None,
        100.0,
        30,
        None,
        None,
        None,
    )
    with pytest.raises(ValueError, match=r"weights on gpu \(open\) and cpu \(100\.1\)"):
        Constraints(percent=(None, 100.1, None, None, None, None))
