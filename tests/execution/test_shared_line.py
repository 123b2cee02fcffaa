"""Several engines take from one line: each its part, little at a time, and nothing twice."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from flexbatch.execution.shared_line import SharedLine, level_of
from flexbatch.request import Request, SamplingParams

PARAMS = SamplingParams(max_tokens=1)


def requests(count: int, samples: int = 1) -> list[Request]:
    return [Request(i, [1], PARAMS, sample) for i in range(count) for sample in range(samples)]


@given(st.integers(0, 200), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_the_level_is_the_least_at_which_slots_take_all(unfinished, slots):
    level = level_of(unfinished, slots)
    assert sum(min(level, each) for each in slots) >= min(unfinished, sum(slots))
    assert level == 0 or sum(min(level - 1, each) for each in slots) < unfinished


@given(st.integers(0, 10**6), st.integers(1, 60), st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_engines_that_ask_in_any_order_run_everything_once(seed, count, slots):
    """Whoever has free slots asks now and then; requests end in any order; some engines give back, some prompts are
    dropped. As long as anything waits, somebody who has room is given it."""
    chance, line = random.Random(seed), SharedLine(len(slots))
    line.slots = list(slots)
    line.add(requests(count))
    running: list[list[Request]] = [[] for _ in slots]
    ended: list[int] = []
    while len(line) or any(running):
        hungry = 0
        for engine in chance.sample(range(len(slots)), len(slots)):
            free = slots[engine] - len(running[engine])
            taken = [line.pop()] if engine == 0 and free else line.share(engine, free, slots[engine]) if free else []
            found = [each for each in taken if each is not None]
            assert len(found) <= free
            hungry += bool(found)
            running[engine] += found
        line.check()
        assert hungry or any(running)
        for engine, mine in enumerate(running):
            if engine and mine and chance.random() < 0.1:
                line.returned(mine)
                mine.clear()
            for request in [each for each in mine if chance.random() < 0.5]:
                mine.remove(request)
                assert line.finished(request.index, request.sample) is request
                assert line.finished(request.index, request.sample) is None, "told twice"
                line.done(request.index, request.sample)
                ended.append(request.index)
        line.check()
    assert sorted(ended) == list(range(count)) and not line.holdings


def test_the_first_to_ask_does_not_get_it_all():
    """Two engines with room for everything: each gets half, and the late one the last ones one by one."""
    line = SharedLine(2)
    line.slots = [64, 64]
    line.add(requests(100))
    own = [line.pop() for _ in range(100)]
    assert sum(each is not None for each in own) == 50
    shares = []
    while found := line.share(1, 64 - sum(shares), 64):
        shares.append(len(found))
    assert sum(shares) == 50 and shares == sorted(shares, reverse=True) and shares[0] == 8 and shares[-1] == 1
    line.check()
    for request in own[:40]:
        if request is not None:
            line.done(request.index, request.sample)
    line.returned([holding.request for holding in line.holdings.values() if holding.engine == 1][-20:])
    assert len(line) == 20 and [line.pop() is not None for _ in range(21)] == [True] * 20 + [False], "both have 30"


def test_what_other_engines_have_is_away_until_somebody_was_told():
    line = SharedLine(2)
    line.slots = [2, 2]
    line.add(requests(2, samples=2))
    mine, (theirs,) = line.pop(), line.share(1, 1, 2)
    assert mine is not None and line.away() == {theirs.index}
    assert line.finished(theirs.index, theirs.sample) is theirs and line.away() == {theirs.index}
    line.done(theirs.index, theirs.sample)
    assert not line.away()
    assert len(line.ahead(None)) == 1 and len(line) == 2, "the other half is the other engine's"
    line.keep(lambda request: request.index != mine.index)
    line.check()
    assert not line.held[0]
    assert line.finished(mine.index, mine.sample) is None, "nobody waits for it any more"
