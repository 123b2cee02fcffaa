"""Sampling parameters: what is out of range is named, and what is in range is kept as it is."""

from __future__ import annotations

import math

import pytest

from flexbatch.request import SamplingParams

BAD = {
    "max_tokens": (-1,),
    "temperature": (-0.1, math.nan, math.inf),
    "top_p": (0.0, 1.1, math.nan),
    "top_k": (-2,),
    "min_p": (-0.1, 1.1, math.nan),
    "repetition_penalty": (0.0, -1.0, math.inf, math.nan),
    "presence_penalty": (-2.1, 2.1, math.nan),
    "frequency_penalty": (-2.1, 2.1, math.nan),
    "logit_bias": ({3: math.nan}, {3: 1.0, 4: math.inf}),
    "n": (0,),
    "logprobs": (-1,),
    "prompt_logprobs": (-1,),
    "prompt_logprobs_start": (0,),
    "stop": ("", ["a", ""]),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=str)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"sampling parameter {name}=.* must be "):
        SamplingParams(**{name: value})


def test_the_ends_of_the_ranges_are_in_them():
    params = SamplingParams(
        max_tokens=0, temperature=0, top_p=1, top_k=-1, min_p=1, presence_penalty=-2, frequency_penalty=2, logit_bias={3: -math.inf}, seed=-1
    )
    assert params.greedy and params.logit_bias == {3: -math.inf}


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="ab").stop == ("ab",) and SamplingParams(stop=["a", "b"], stop_token_ids=[3]).stop_token_ids == (3,)
