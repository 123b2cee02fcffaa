"""Values as messages show them."""

from __future__ import annotations

import math

import pytest

from flexbatch import SamplingParams
from flexbatch.validation.checks import short
from flexbatch.validation.errors import ConfigurationError

HUGE = 10**6000
"""Python refuses to print integers of more than 4,300 digits."""
NESTED: list[object] = []
NESTED.append(NESTED)


VALUES = [
    "x" * 10**6,
    HUGE,
    -HUGE,
    list(range(10**5)),
    {"a": "b" * 10**6},
    [HUGE],
    {"a": [HUGE]},
    (HUGE,),
    NESTED,
    None,
]


@pytest.mark.parametrize("value", [*VALUES, b"\xff" * 999, math.nan], ids=lambda value: type(value).__name__)
def test_any_value_can_be_shown_in_a_line(value: object) -> None:
    text = short(value)
    assert text and len(text) < 500 and "\n" not in text


def test_values_in_messages_are_short() -> None:
    assert short("a") == "'a'" and len(short("x" * 10**6)) == 80 and "too long" in short(10**5000)


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "n", "logprobs", "min_tokens", "temperature"])
@pytest.mark.parametrize("value", [HUGE, [HUGE], {"a": HUGE}], ids=["number", "list", "dict"])
def test_a_number_that_python_will_not_print_is_refused_by_its_name(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=name):
        SamplingParams(**{name: value})
