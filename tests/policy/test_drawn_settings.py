"""Settings that a seed draws for the comparison of predicted with measured throughput."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.drawn_settings import MODELS, draw
from benchmark.observed import chosen_here


@given(seed=st.integers(0, 10**9), count=st.integers(1, 30))
def test_a_seed_draws_the_same_jobs_of_prime_size_every_time(seed: int, count: int) -> None:
    settings = draw(seed, count)
    assert settings == draw(seed, count) and len(settings) == count
    assert list(draw(seed, count + 3).items())[:count] == list(settings.items())
    for setting in settings.values():
        size = setting.num_prompts
        assert size > 1 and all(size % divisor for divisor in range(2, math.isqrt(size) + 1))
        assert 0 < setting.prompt_len[0] <= setting.prompt_len[1] and 0 < setting.gen_len[0] <= setting.gen_len[1]


def test_seeds_draw_every_model_and_different_jobs() -> None:
    settings = [*draw(1, 40).values(), *draw(2, 40).values()]
    assert {setting.model for setting in settings} == set(MODELS)
    assert len({(setting.num_prompts, setting.memory) for setting in settings}) > 70


@pytest.mark.slow
@pytest.mark.parametrize("name", draw(1, 20))
def test_what_is_drawn_fits_its_budgets(name: str) -> None:
    chosen = chosen_here(draw(1, 20)[name], "h200")
    assert chosen["predicted_seconds"] < 40, f"{name} is too long for a borrowed machine"
