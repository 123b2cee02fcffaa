"""zigzag: every cell once, everything fetched before it is used and drained after, two buffers enough."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.execution.executor import Executor
from flexbatch.policy.schedule import Tick, zigzag

SIZES = {"num_layers": st.integers(1, 9), "count": st.integers(1, 7)}


@given(**SIZES)
def test_every_cell_is_computed_once_layer_outer_micro_batch_inner(num_layers: int, count: int) -> None:
    cells = [(tick.layer, tick.micro_batch) for tick in zigzag(num_layers, count)]
    assert cells == [(layer, k) for layer in range(num_layers) for k in range(count)]


@given(**SIZES)
def test_inputs_are_fetched_one_tick_ahead_and_drained_one_tick_later(num_layers: int, count: int) -> None:
    ticks = list(zigzag(num_layers, count))
    cells = [(tick.layer, tick.micro_batch) for tick in ticks]
    assert [tick.fetch_inputs for tick in ticks] == [*cells[1:], None]
    assert [tick.drain for tick in ticks] == [None, *cells[:-1]]


@given(**SIZES, passes=st.integers(1, 3))
def test_weights_come_in_even_slices_before_their_layer_and_two_slabs_are_enough(
    num_layers: int, count: int, passes: int
) -> None:
    """Over several passes: what is fetched is always the next layer; a third slab is never needed."""
    held: dict[int, set[int]] = {0: set(range(count))}
    for _ in range(passes):
        for tick in zigzag(num_layers, count):
            if tick.fetch_weights is not None:
                layer, index, slices = tick.fetch_weights
                assert (layer, slices) == ((tick.layer + 1) % num_layers, count)
                assert index not in held.setdefault(layer, set()), "fetched twice"
                held[layer].add(index)
            assert held[tick.layer] == set(range(count)), "used before it is all there"
            assert len(held) <= 2, "a layer is fetched into a slab that is in use"
            if tick.micro_batch == count - 1 and num_layers > 1:
                del held[tick.layer]
    assert set(held) == {0}, "the next pass starts with its first layer there"


@given(**SIZES)
def test_the_link_carries_the_same_at_every_tick(num_layers: int, count: int) -> None:
    per_layer: dict[int, list[int]] = {}
    for tick in zigzag(num_layers, count):
        if tick.fetch_weights is not None:
            per_layer.setdefault(tick.fetch_weights[0], []).append(tick.fetch_weights[1])
    assert per_layer == ({layer: list(range(count)) for layer in range(num_layers)} if num_layers > 1 else {})


@given(**SIZES)
def test_a_staging_buffer_is_filled_while_only_the_other_is_read(num_layers: int, count: int) -> None:
    buffers = [Executor.staging_buffer(tick.layer, tick.micro_batch, count) for tick in zigzag(num_layers, count)]
    for tick, reading in zip(zigzag(num_layers, count), buffers, strict=True):
        if tick.fetch_inputs is not None:
            assert Executor.staging_buffer(*tick.fetch_inputs, count) == 1 - reading


@pytest.mark.parametrize(("num_layers", "count"), [(0, 1), (1, 0), (-1, 2)])
def test_an_empty_pass_is_an_error_with_its_numbers(num_layers: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_layers} and {count}"):
        list(zigzag(num_layers, count))


def test_one_layer_and_one_micro_batch() -> None:
    assert list(zigzag(1, 1)) == [Tick(0, 0, None, None, None)]
    assert list(zigzag(2, 1)) == [Tick(0, 0, (1, 0, 1), (1, 0), None), Tick(1, 0, (0, 0, 1), None, (0, 0))]
