"""Passes that several ranks record with the sums between them: all record and replay the same ones."""

from __future__ import annotations

import json

import pytest

from tests.parallel.driver import generated
from tests.parallel.meshes import GREEDY, engine, results, start
from tests.tiny_models import random_prompts

RESIDENT = {"percent": (100, 0, 100, 0, 100, 0), "num_gpu_batches": 1, "gpu_batch_size": 6}
PROMPTS = random_prompts([5, 9, 3, 30, 17, 8], seed=1)
LONGER = random_prompts([5, 250, 3], seed=3)
"""The tables of positions grow, which graphs must not read where they were."""


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_record_the_same_passes(size, tmp_path):
    """Blocks that shrink, more sizes than graphs are kept, and experts; a rank that recorded a pass of its own would
    run its sums once more than the others, which then wait for ever or add up another layer's."""
    params = [{**GREEDY, "max_tokens": 4 + 3 * i} for i in range(6)]
    longer = {"max_position_embeddings": 4096}
    made = [
        engine(
            tmp_path,
            "llama",
            longer,
            settings=RESIDENT,
            prompts=PROMPTS,
            params=params,
            again=[PROMPTS, LONGER],
            graphs=1,
        ),
        engine(tmp_path, "olmoe", settings=RESIDENT, prompts=PROMPTS, params=params, again=[PROMPTS] * 3, graphs=2),
    ]
    ranks = start(tmp_path, size, made)
    wanted = [generated(each) for each in json.loads(json.dumps(made))]
    for each, one, several in zip(made, wanted, results(tmp_path, ranks), strict=True):
        assert several["answers"] == json.loads(json.dumps(one["answers"])), each
        assert several["recorded"] >= 2 and several["replays"] > 10, each


def test_ranks_record_the_same_pieces(tmp_path):
    """Prompts come while others are decoded: passes of many sizes, and of several buckets."""
    params = [{**GREEDY, "max_tokens": 4 + 3 * (i % 4)} for i in range(2 * len(PROMPTS))]
    prompts, settings = PROMPTS + random_prompts([11, 4, 23, 6, 2, 19], seed=2), RESIDENT | {"prefill_chunk": 7}
    made = [
        engine(
            tmp_path,
            family,
            {"max_position_embeddings": 4096},
            settings=settings,
            prompts=prompts,
            params=params,
            again=[prompts, LONGER],
            graphs=1,
            pieces=[8, 16, 64],
        )
        for family in ("llama", "opt")
    ]
    ranks = start(tmp_path, 2, made)
    wanted = [generated(each) for each in json.loads(json.dumps(made))]
    for each, one, several in zip(made, wanted, results(tmp_path, ranks), strict=True):
        assert several["answers"] == json.loads(json.dumps(one["answers"])), each
        assert several["in_pieces"] > 10, each
