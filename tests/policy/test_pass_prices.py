"""What passes take beside their busiest resource: pieces on the GPU and on the host, what is launched for the CPU's
attention, and pages that come before the first layer."""

from __future__ import annotations

import dataclasses

import pytest

from flexbatch.policy.affine import point_of
from flexbatch.policy.beside import WAITING_IN_VIEW
from flexbatch.policy.cost import PassModel
from flexbatch.policy.hardware import Hardware, load_hardware
from flexbatch.policy.launches import COUNTED, KERNELS_OF_TICK
from flexbatch.policy.limits import DECODING_APART
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.recorded_load import APART_KERNELS, PIECE_KERNELS
from flexbatch.policy.shapes import public_shape
from flexbatch.policy.stage import FIRST_PAGES

ALL, NONE = Split(1, 0), Split(0, 1)
SHAPE = public_shape("llama-3.2-1b")
LAYERS = 16
PIECES = Policy(ALL, ALL, ALL, 128, 1, prefill_chunk=64, prefill_budget=512, piece_tokens=2048, async_scheduling=False)


def machine(**changes: float) -> Hardware:
    return dataclasses.replace(load_hardware("h200"), piece_seconds=2e-4, pass_seconds=1e-3, **changes)


def model(load: PassLoad, policy: Policy = PIECES, **changes: float) -> PassModel:
    return PassModel(SHAPE, machine(**changes), policy, load)


def mixed(decoding: int) -> PassLoad:
    return PassLoad.decode(decoding, 100) + PassLoad.prefill(4, 64)


@pytest.mark.parametrize(("decoding", "is_apart"), [(DECODING_APART - 1, 0), (DECODING_APART, 1)])
def test_layers_in_pieces_begin_more_kernels_than_layers_in_a_graph(decoding: int, is_apart: int) -> None:
    """Most where attention of prompts is launched by itself; as a graph, or kernel by kernel, none more."""
    load, point = mixed(decoding), point_of(PIECES)
    launched, found = {}, {}
    for graph_seconds in (0.0, 1e-3):
        pieces, plain = (
            model(load, policy, graph_seconds=graph_seconds)
            for policy in (PIECES, dataclasses.replace(PIECES, piece_tokens=0))
        )
        assert pieces.in_pieces.all() and not plain.in_pieces.any()
        found[graph_seconds] = [float(each.resource_seconds(point)["gpu_compute"]) for each in (pieces, plain)]
        launched[graph_seconds] = float(pieces.launched(point) - pieces.composed(point))
    pieces, plain = (after - before for before, after in zip(*found.values(), strict=True))
    assert plain == pytest.approx((LAYERS + 1) * 1e-3)
    assert pieces - plain == pytest.approx(LAYERS * (PIECE_KERNELS + is_apart * APART_KERNELS) * 1e-3)
    apart = is_apart * COUNTED["apart"] / KERNELS_OF_TICK * machine().launch_seconds
    assert list(launched.values()) == [pytest.approx((LAYERS + 1) * 2e-4 + LAYERS * apart)] * 2


@pytest.mark.parametrize("piece_seconds", [1e-5, 1e-2])
def test_pieces_hide_launching_or_the_gpu_behind_the_first(piece_seconds: float) -> None:
    """Composed beside the pass before, the first is as the others."""
    passes = PassModel(SHAPE, machine(graph_seconds=0.0), PIECES, mixed(64))
    passes = PassModel(SHAPE, dataclasses.replace(passes.hardware, piece_seconds=piece_seconds), PIECES, mixed(64))
    point = point_of(PIECES)
    busy, ticks = float(passes.busy_seconds(point)), float(passes.launched(point) - passes.composed(point))
    assert float(passes.pass_seconds(point)) == pytest.approx(
        float(passes.host_seconds) + piece_seconds + max(busy, ticks)
    )
    assert (ticks > busy) == (piece_seconds > 1e-4) and passes.least_in_view == 0
    ahead = dataclasses.replace(PIECES, async_scheduling=True)
    passes = PassModel(SHAPE, passes.hardware, ahead, mixed(64))
    assert float(passes.pass_seconds(point)) == pytest.approx(max(busy, ticks + float(passes.host_seconds)))


@pytest.mark.parametrize(
    ("batches", "overlap", "share", "decoding", "counted"),
    [
        (2, True, 0.5, 32, True),
        (1, True, 0.5, 32, False),
        (2, False, 0.5, 32, False),
        (2, True, 0.0, 32, False),
        (2, True, 0.5, 0, False),
    ],
)
def test_what_goes_to_the_cpu_is_launched_where_another_micro_batch_hides_its_work(
    batches: int, overlap: bool, share: float, decoding: int, counted: bool
) -> None:
    policy = Policy(ALL, NONE, ALL, 64 // batches, batches, cpu_attention=share, overlap=overlap)
    passes, point = model(mixed(decoding), policy), point_of(policy)
    tick = machine().launch_seconds
    staging = machine().launched_seconds("staging")
    plain = float(passes.tick_seconds) + LAYERS * batches * staging
    sent = counted * LAYERS * batches * COUNTED["attended"] / KERNELS_OF_TICK * tick
    assert float(passes.launched(point) - passes.composed(point)) == pytest.approx(plain + sent)
    if counted:
        assert float(passes.in_view(point)) == WAITING_IN_VIEW


def test_pages_of_the_first_layer_come_before_anything_is_beside_them() -> None:
    """As long as those of any other layer; of a cache that is on the GPU, or attended by the CPU, there are none."""
    load = PassLoad.decode(128, 1000)
    policy = Policy(ALL, NONE, ALL, 128, 1)
    passes, point = model(load, policy), point_of(policy)
    first = next(stage for stage in passes.stages if stage.name == FIRST_PAGES)
    layer = passes.stages[0]
    gathered = float(layer.work["h2d"] @ point) / passes.hardware.gather
    assert float(first.seconds["gather beside gpu_compute"] @ point) == pytest.approx(gathered)
    without = sum(
        float(stage.count * max(row @ point for row in stage.seconds.values())) for stage in passes.stages[:-1]
    )
    assert float(passes.busy_seconds(point)) == pytest.approx(without + gathered)
    for cache, share in ((ALL, 0.0), (NONE, 1.0)):
        other = Policy(ALL, cache, ALL, 128, 1, cpu_attention=share)
        assert abs(first.seconds["gather beside gpu_compute"] @ point_of(other)) < 1e-12
    assert all(stage.name != FIRST_PAGES for stage in model(load, dataclasses.replace(policy, overlap=False)).stages)
