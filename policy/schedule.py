"""The zig-zag block schedule: a pure generator of ticks. No torch here."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """One (layer, micro-batch) cell of a pass, with what to fetch ahead and what to drain beside it."""

    layer: int
    micro_batch: int
    fetch_weights: tuple[int, int, int] | None
    """(layer, slice, slices): which K-th of which layer's weights to put on the link now. After the last layer comes
    layer 0 of the next pass."""
    fetch_inputs: tuple[int, int] | None
    """(layer, micro_batch) whose KV pages and activations the next tick needs; None at the end of the pass."""
    drain: tuple[int, int] | None
    """(layer, micro_batch) whose new KV and activations are stored; None at the first tick."""


def zigzag(num_layers: int, num_micro_batches: int) -> Iterator[Tick]:
    """Ticks of one pass, layer-outer and micro-batch-inner (FlexGen, section 4.1: the zig-zag block schedule).

    Every tick carries one K-th of the next layer's weights, so that the load is spread over all K ticks of a layer
    and not bunched at its first. ``num_layers`` counts the head. Raises ValueError for an empty pass.
    """
    if num_layers < 1 or num_micro_batches < 1:
        raise ValueError(
            f"a pass needs at least one layer and one micro-batch, got {num_layers} and {num_micro_batches}"
        )
    previous: tuple[int, int] | None = None
    for layer in range(num_layers):
        for k in range(num_micro_batches):
            following = (layer, k + 1) if k + 1 < num_micro_batches else (layer + 1, 0)
            yield Tick(
                layer=layer,
                micro_batch=k,
                fetch_weights=((layer + 1) % num_layers, k, num_micro_batches) if num_layers > 1 else None,
                fetch_inputs=following if following[0] < num_layers else None,
                drain=previous,
            )
            previous = (layer, k)


@functools.lru_cache(maxsize=4)
def ticks_of(num_layers: int, num_micro_batches: int) -> tuple[Tick, ...]:
    """Those of `zigzag`, made once for passes that are alike."""
    return tuple(zigzag(num_layers, num_micro_batches))


def after_next(tick: Tick, num_micro_batches: int) -> tuple[int, int]:
    """The (layer, micro-batch) two ticks later; its layer may be beyond the last."""
    cell = tick.layer * num_micro_batches + tick.micro_batch + 2
    return divmod(cell, num_micro_batches)
