"""Hidden states between layers: they come back as they were put, from any mix of tiers, and the mix is the one that
was asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.memory.activations import ActivationStore
from flexbatch.policy.policy import TIERS, Split
from tests.memory.rigs import dawdle, open_tiers, splits

PAGE_TOKENS, WIDTH, MAX_TOKENS = 4, 6, 40
TOKENS = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=3)


@contextmanager
def open_store(split: Split, count: int) -> Iterator[ActivationStore]:
    with tempfile.TemporaryDirectory() as folder, open_tiers(Path(folder)) as (tiers, queues):
        dawdle(queues, 4, 0.006)
        store = ActivationStore(split, count, MAX_TOKENS, WIDTH, torch.float32, PAGE_TOKENS, tiers, queues)
        assert not list(Path(folder).iterdir()), "a killed run would leave the file behind"
        yield store
        store.check()
        store.close()
        assert not tiers.cpu.used_bytes and not tiers.disk.used_bytes


@settings(max_examples=60, deadline=None)
@given(split=splits(), tokens=TOKENS)
def test_the_rows_of_a_pass_are_within_one_page_of_the_split(split: Split, tokens: list[int]) -> None:
    with open_store(split, len(tokens)) as store:
        store.plan(tokens)
        total = sum(tokens)
        for position, (tier, part) in enumerate(zip(TIERS, split.fractions, strict=True)):
            rows = sum(store.counts[k][position] for k in range(len(tokens)))
            assert abs(rows - part * total) <= PAGE_TOKENS + 1e-6
            assert store.realized_percent[tier] == pytest.approx(100 * rows / total)
        assert [sum(store.counts[k]) for k in range(len(tokens))] == tokens
        largest = dict(store.realized_percent)
        store.plan([1])
        assert total == 1 or store.realized_percent == largest, "the end of a job says nothing about the split"


@settings(max_examples=40, deadline=None)
@given(split=splits(), passes=st.lists(TOKENS, min_size=1, max_size=2), layers=st.integers(1, 4), ahead=st.booleans())
def test_hidden_states_come_back_as_they_were_put(
    split: Split, passes: list[list[int]], layers: int, ahead: bool
) -> None:
    """Zig-zag over layers and micro-batches, with and without the fetch ahead of the next tick."""
    generator = torch.Generator().manual_seed(0)
    with open_store(split, 3) as store:
        for tokens in passes:
            store.plan(tokens)
            hidden = [torch.randn(count, WIDTH, generator=generator) for count in tokens]
            for k, rows in enumerate(hidden):
                store.put(k, rows.clone())
            for _ in range(layers):
                for k in range(len(tokens)):
                    got = store.get(k)
                    assert torch.equal(got, hidden[k])
                    if ahead and k + 1 < len(tokens):
                        store.fetch(k + 1)
                    hidden[k] = torch.randn(got.shape, generator=generator)
                    store.put(k, hidden[k].clone())
                    store.check()
            for k, rows in enumerate(hidden):
                assert torch.equal(store.get(k), rows)
            assert not store.stored


def test_rows_handed_on_stay_on_the_device() -> None:
    with open_store(Split(0, 0.5, 0.5), 1) as store:
        store.plan([8])
        rows = torch.randn(3, WIDTH)
        store.set(0, rows)
        assert store.get(0) is rows and not store.resident


def test_a_row_without_a_home_is_noticed() -> None:
    with open_store(Split(1, 0, 0), 1) as store:
        store.plan([8])
        store.put(0, torch.zeros(7, WIDTH))
        with pytest.raises(AssertionError):
            store.check()
        store.get(0)
