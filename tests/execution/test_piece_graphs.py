"""Passes in pieces: which run so, and that they give the same tokens; with stand-ins that run what was recorded, where
there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.execution.graphs import DecodeGraphs
from flexbatch.execution.piece_graphs import PieceGraphs
from flexbatch.policy.decode_graphs import PIECE_BUCKETS, piece_buckets, piece_bytes
from flexbatch.policy.policy import Policy, Split
from tests.execution.test_graphs import Recorder
from tests.tiny_models import make_model, random_prompts

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "percent": (100, 0, 100, 0, 100, 0),
    "gpu_batch_size": 5,
    "num_gpu_batches": 1,
    "gpu_memory": "1GiB",
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"prefill_chunk": 7}),
        ("llama", {"weight_bits": 8, "cache_bits": 4}),
        ("gemma3", {"prefill_chunk": 16}),
        ("opt", {"draft": ("ngram",), "tree": "chain:3"}),
        ("bloom", {}),
        ("falcon-40b", {"prefill_chunk": 5}),
    ],
)
def test_pieces_leave_no_trace_in_the_tokens(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Prompts come while others are decoded, in chunks or whole; trees are verified; layers with a window have pages of
    their own; a longer job moves the rotary tables."""
    make_model(family, tmp_path, max_position_embeddings=2048)
    params = [
        SamplingParams(max_tokens=3 + 2 * (i % 5), temperature=0.7 * (i % 2), seed=i, logprobs=2, ignore_eos=True)
        for i in range(13)
    ]
    jobs = [
        random_prompts([5, 9, 3, 30, 17, 8, 40, 2, 11, 6, 21, 4, 13], seed=1),
        random_prompts([700, 5, 900], seed=3),
    ]
    found: list[list[Any]] = [[], []]
    record = Recorder()
    for pieces in (False, True):
        with LLM(str(tmp_path), **SETTINGS, **more) as llm:
            for job in jobs:
                llm.prepare(job, params[: len(job)])
                assert llm.runner is not None
                executor = llm.runner.executor
                if pieces and executor.pieces is None:
                    executor.graphs = DecodeGraphs(CPU, 16, 2048, record, 0)
                    executor.pieces = PieceGraphs(executor.halves, CPU, record, PIECE_BUCKETS)
                for _ in range(2):
                    done = llm.generate(job, params[: len(job)])
                    found[pieces] += [(c.token_ids, c.logprobs) for c in done]
                llm.runner.check()
            if pieces:
                assert executor.pieces is not None and len(executor.pieces.captured) >= 1
    assert [tokens for tokens, _ in found[True]] == [tokens for tokens, _ in found[False]]
    for (_, one), (_, other) in zip(found[True], found[False], strict=True):
        for ours, theirs in zip(one, other, strict=True):
            # Products of as many rows as a bucket has are rounded differently.
            chances = {token: each.logprob for token, each in theirs.items()}
            assert {token: each.logprob for token, each in ours.items()} == pytest.approx(chances, abs=1e-4)
    assert sum(graph.replays for graph in record.made) > 50, "passes ran in pieces"
    assert record.kept == 0, "the executor lets go of its graphs"


def test_what_does_not_run_in_pieces(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    with LLM(str(tmp_path), **SETTINGS) as llm:
        llm.prepare(random_prompts([20, 20, 20], seed=1), SamplingParams(max_tokens=12))
        assert llm.runner is not None
        executor = llm.runner.executor
        record = Recorder()
        none = PieceGraphs(executor.halves, CPU, record, ())
        few = PieceGraphs(executor.halves, CPU, record, (2,))
        executor.graphs = DecodeGraphs(CPU, 16, 2048, record, 0)
        for pieces in (none, few):
            executor.pieces = pieces
            llm.generate(random_prompts([5, 9, 3], seed=1), SamplingParams(max_tokens=1, ignore_eos=True))
            assert not pieces.captured and not record.made, "prompts of more tokens than any bucket has"
        assert llm.runner.executor is executor
        llm.generate(random_prompts([1], seed=1), SamplingParams(max_tokens=9, ignore_eos=True))
        assert list(few.captured) == [2] and few.seen == {2}
        few.check()


@pytest.mark.parametrize(
    ("sequences", "chunk", "largest"), [(1, 16, 32), (8, 100, 128), (300, 512, 1024), (5000, 512, 1024)]
)
def test_buckets_reach_up_to_the_largest_pass(sequences: int, chunk: int, largest: int) -> None:
    anywhere = Split(1, 0)
    policy = Policy(anywhere, anywhere, anywhere, sequences, 1, prefill_chunk=chunk, prefill_budget=chunk)
    buckets = piece_buckets(policy, experts=False)
    assert buckets == PIECE_BUCKETS[: len(buckets)] and buckets[-1] == largest
    assert piece_buckets(policy, experts=True) == () and piece_bytes(4, (), 1000) == 0
    assert piece_bytes(4, buckets, 1000) > piece_bytes(4, buckets[:-1], 1000) >= 0
