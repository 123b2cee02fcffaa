"""What a search gives blocks up by: no placement of theirs is faster than it says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.policy.affine import KINDS
from flexbatch.policy.candidates import Sizes
from flexbatch.policy.card_names import shipped_names
from flexbatch.policy.hardware import Hardware, load_hardware
from flexbatch.policy.policy import TIERS, Constraints, Policy, Split
from flexbatch.policy.search import Search
from flexbatch.policy.shapes import public_shape
from flexbatch.policy.workload import Workload

MACHINES = {name: load_hardware(name) for name in shipped_names()}
FACTORS = (0.0, 0.01, 0.3, 3.0, 100.0)
COSTS = [each.name for each in dataclasses.fields(Hardware) if each.name.endswith("_seconds")]


@st.composite
def machines(draw: st.DrawFn) -> Hardware:
    """A shipped one, some of whose fixed costs are others."""
    hardware = MACHINES[draw(st.sampled_from(sorted(MACHINES)))]
    changed = draw(st.dictionaries(st.sampled_from(COSTS), st.sampled_from(FACTORS), max_size=8))
    return dataclasses.replace(
        hardware, **{name: factor * (getattr(hardware, name) or 1e-4) for name, factor in changed.items()}
    )


@st.composite
def sizes_of_blocks(draw: st.DrawFn) -> Sizes:
    one, pick = Split(1, 0), st.sampled_from
    policy = Policy(
        *(one, one, one, draw(pick((1, 2, 8, 24, 64, 300))), draw(pick((1, 1, 2, 8)))),
        weight_bits=draw(pick((16, 8, 4))),
        cache_bits=draw(pick((16, 8, 4))),
        overlap=draw(pick((True, True, False))),
        async_scheduling=draw(st.booleans()),
        piece_tokens=draw(pick((0, 64, 512))),
        prefill_budget=draw(pick((0, 512))),
    )
    shape = public_shape(draw(pick(("opt-125m", "opt-6.7b", "llama-3-8b", "mixtral-8x7b", "deepseek-v2-lite"))))
    workload = Workload.uniform(draw(pick((8, 100, 512))), draw(pick((1, 8, 100))), draw(pick((None, 30))))
    return Search(shape, draw(machines()), workload, Constraints()).sizes(policy)


def split() -> st.SearchStrategy[tuple[float, ...]]:
    whole = st.sampled_from([tuple(float(tier == chosen) for tier in TIERS) for chosen in TIERS])
    parts = st.tuples(*(st.integers(0, 5) for _ in TIERS)).filter(any)
    return whole | parts.map(lambda drawn: tuple(each / sum(drawn) for each in drawn))


@st.composite
def placements(draw: st.DrawFn) -> np.ndarray:
    on_gpu = draw(st.integers(0, 3)) == 0
    weights, cache, activations = ((1.0, 0.0, 0.0) if on_gpu else draw(split()) for _ in KINDS)
    share = draw(st.sampled_from((0.0, 0.0, 0.5, 1.0)))
    return np.array([1.0, *weights, *cache, *activations, share * cache[1], 0.0])


@settings(max_examples=150, deadline=None)
@given(sizes=sizes_of_blocks(), points=st.lists(placements(), min_size=1, max_size=6))
def test_no_placement_is_faster_than_blocks_are_given_up_by(sizes: Sizes, points: list[np.ndarray]) -> None:
    for point in points:
        seconds = sizes.model.pass_seconds(point)
        assert np.all(np.isfinite(seconds)) and np.all(seconds > 0)
        in_all, busy = (float(np.sum(sizes.counts * x)) for x in (seconds, sizes.model.busy_seconds(point)))
        assert sizes.least_seconds <= in_all * (1 + 1e-9), (point, "of no placement")
        assert sizes.least_beside(busy) <= in_all * (1 + 1e-9), (point, "of none that is as busy")


@pytest.mark.parametrize("ahead", [True, False])
def test_they_are_given_up_by_what_all_on_the_gpu_takes(ahead: bool) -> None:
    """Where launching takes longest nothing is, but for composing in the open."""
    one = Split(1, 0)
    hardware = dataclasses.replace(MACHINES["h200"], launch_seconds=0.01)
    policy = Policy(one, one, one, 8, 1, async_scheduling=ahead)
    search = Search(public_shape("opt-125m"), hardware, Workload.uniform(100, 100), Constraints())
    sizes, point = search.sizes(policy), np.array([1.0, *(1.0, 0.0, 0.0) * 3, 0.0, 0.0])
    assert sizes.model.goes_ahead(point) == ahead
    taken = float(np.sum(sizes.counts * sizes.model.pass_seconds(point)))
    assert 0.8 * taken < sizes.least_seconds <= taken
