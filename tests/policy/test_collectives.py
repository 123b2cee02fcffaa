"""What several ranks give each other, by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flexbatch.policy.affine import point_of
from flexbatch.policy.collectives import TELLING, head_launch_seconds, logits_seconds, telling_seconds
from flexbatch.policy.cost import PassModel
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.limits import LOGITS_CHUNK_BYTES
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import public_shape

SHAPE, MACHINE = public_shape("llama-3-8b"), dataclasses.replace(load_hardware("h200"), interconnect=3e11)
TWO = dataclasses.replace(MACHINE, tensor_ranks=2)
GPU = Split(1, 0)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("measured", [0.0, 3e-3])
def test_other_ranks_are_told_of_every_pass(stages, ranks, measured):
    hardware = dataclasses.replace(MACHINE, tensor_ranks=ranks, tell_seconds=measured, pass_seconds=1e-3)
    shape = dataclasses.replace(SHAPE, stages=stages)
    told = 0.0 if stages * ranks == 1 else measured or TELLING * 1e-3
    assert telling_seconds(shape, hardware) == pytest.approx(told)
    policy, load = Policy(GPU, GPU, GPU, 8, 2), PassLoad.decode(16, 100)
    model = PassModel(shape, hardware, policy, load)
    alone = PassModel(SHAPE, dataclasses.replace(hardware, tensor_ranks=1), policy, load)
    assert float(model.host_seconds - alone.host_seconds) == pytest.approx(told)


@pytest.mark.parametrize("rows", [1, 64, 509])
def test_logits_go_to_rank_0_and_their_head_is_in_no_graph(rows):
    """Half of the columns of each row cross once and all are read and written; a tick is launched for every chunk."""
    whole = 4 * rows * SHAPE.vocab_size
    found = float(logits_seconds(SHAPE, TWO, np.asarray(rows)))
    assert found == pytest.approx(whole / 2 / 3e11 + 2 * whole / TWO.gpu_bandwidth)
    chunks = -(-rows // (LOGITS_CHUNK_BYTES // (4 * SHAPE.vocab_size)))
    assert float(head_launch_seconds(SHAPE, TWO, np.asarray(rows))) == pytest.approx(chunks * TWO.launch_seconds)
    for cost in (logits_seconds, head_launch_seconds):
        assert float(cost(SHAPE, MACHINE, np.asarray(rows))) == 0.0
    policy, load = Policy(GPU, GPU, GPU, rows, 1), PassLoad.decode(rows, 100)
    of_two, of_one = (PassModel(SHAPE, hardware, policy, load) for hardware in (TWO, MACHINE))
    launched = [
        float(model.launched(point_of(policy)) - model.composed(point_of(policy))) for model in (of_two, of_one)
    ]
    assert launched == pytest.approx([chunks * TWO.launch_seconds, 0.0])
    heads = [next(each for each in model.recorded_stages if each.name == "head") for model in (of_two, of_one)]
    # What fills up the graph has logits, too.
    assert heads[0].seconds["gpu_compute"][0] - heads[1].seconds["gpu_compute"][0] >= 0.999 * found
