"""What goes on beside what: fetches beside sums of several ranks, stages beside each other; and nothing of it alone."""

from __future__ import annotations

from collections import Counter

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.parallel.channel import RankChannel
from flexbatch.parallel.stage_ranks import StageRanks
from flexbatch.parallel.tensor_ranks import TensorRanks
from tests.parallel.meshes import engine, results, start
from tests.tiny_models import random_prompts

SAME = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}


def test_fetches_are_on_their_way_before_the_sums_of_their_tick(tmp_path):
    """A sum waits for other ranks; the link has to have the next layer's slice and cache pages by then."""
    settings = {"percent": (0, 100, 50, 50, 0, 100), "num_gpu_batches": 2}
    layers, prompts = 4, random_prompts([9, 9, 9, 9], seed=3)
    made = engine(
        tmp_path,
        "llama",
        {"num_hidden_layers": layers},
        settings=settings,
        prompts=prompts,
        params=[SAME] * 4,
        events=True,
    )
    (found,) = results(tmp_path, start(tmp_path, 2, [made]))
    fetched, begun, sums, checked = Counter[int](), Counter[tuple](), 0, 0
    for kind, *where in found["events"]:
        if kind == "fetch":
            fetched[where[0]] += 1
        elif kind == "tick":
            layer, micro_batch = where
            assert sums in (0, 2, 3), "the embedding, attention and MLP"
            begun[layer, micro_batch] += 1
            sums = 0
        elif kind == "sum":
            sums += 1
            if layer + 1 < layers:
                # In the passes before all slices of the next layer, and in this one those up to its own.
                assert fetched[layer + 1] > 2 * (begun[layer, micro_batch] - 1) + micro_batch, (layer, micro_batch)
                checked += 1
    assert checked > 100


@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_decode_keeps_every_stage_busy(stages, tmp_path):
    """As many passes are in flight as there are stages, in every turn but those of the fill and of the end."""
    settings = {"num_gpu_batches": 1, "gpu_batch_size": 2}
    prompts = random_prompts([5] * (2 * stages), seed=3)
    made = engine(
        tmp_path,
        "opt",
        {"num_hidden_layers": 2 * stages},
        settings=settings,
        prompts=prompts,
        params=[SAME] * len(prompts),
        stages=stages,
        events=True,
    )
    (found,) = results(tmp_path, start(tmp_path, stages, [made]))
    turns = [number for kind, number in (each for each in found["events"] if each[0] == "in flight")]
    assert len(turns) >= stages * SAME["max_tokens"] - stages
    assert sum(number < stages for number in turns) <= stages, turns
    assert all(number == stages for number in turns[:-stages])


def test_one_process_makes_no_group_and_calls_no_collective(reference, monkeypatch, tmp_path):
    for kind in (RankChannel, TensorRanks, StageRanks):
        monkeypatch.setattr(kind, "__init__", lambda *_: pytest.fail("one process has nobody to talk to"))
    model = reference("llama")
    settings = {"device": "cpu", "hardware": "cpu", "offload_dir": str(tmp_path)}
    with LLM(str(model.folder), gpu_memory="64MiB", cpu_memory="64MiB", **settings) as llm:
        llm.generate(model.prompts, SamplingParams(**SAME))
        executor = llm.runner.executor
        assert executor.ranks is executor.stages is executor.lead is None
        assert llm._model.leader is llm._model.others is None
