"""Passes in pieces: which run so, and that they give the same tokens; with stand-ins that run what was recorded, where
there is no GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexbatch import LLM, SamplingParams
from flexbatch.execution.executor import Executor
from flexbatch.execution.graphs import DecodeGraphs
from flexbatch.execution.piece_graphs import PieceGraphs
from flexbatch.kernels import native_quant
from flexbatch.models.routing import RoutingCounts
from flexbatch.policy.decode_graphs import RECORDING_PASSES
from flexbatch.policy.piece_graphs import BUCKETS
from tests.execution import test_graphs
from tests.execution.recorded_ops import OpsRecorder
from tests.execution.test_graphs import FakeGraph, Recorder
from tests.tiny_models import make_model, random_prompts

CPU = torch.device("cpu")
SETTINGS = test_graphs.SETTINGS | {"gpu_batch_size": 5}
LENGTHS = [5, 9, 3, 30, 17, 8, 40, 2, 11, 6, 21, 4, 13]


class ExpertsRecorder(Recorder):
    """On the CPU experts are computed by a loop of Python over those that are hit: it is run again."""

    routing: RoutingCounts

    def __call__(self, work: Callable[[], Tensor]) -> tuple[FakeGraph, Tensor]:
        def counting() -> Tensor:
            with self.routing.of_pieces():
                return work()

        return super().__call__(counting)


def run_in_pieces(executor: Executor, record: Any, buckets: tuple[int, ...] = BUCKETS) -> PieceGraphs:
    """As on a GPU, where the planner has found room for pieces and for no decode graph."""
    executor.graphs = DecodeGraphs(CPU, 16, 2048, record, 0)
    executor.pieces = PieceGraphs(executor.halves, CPU, record, buckets)
    executor.pieces.recording_passes = 2
    return executor.pieces


def params_of(count: int) -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=3 + 2 * (i % 5), temperature=0.7 * (i % 2), seed=i, logprobs=2, ignore_eos=True)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"prefill_chunk": 7}),
        ("llama", {"weight_bits": 8, "cache_bits": 4}),
        ("llama", {"weight_bits": 4, "draft": ("ngram",)}),
        ("gemma2", {"prefill_chunk": 16}),
        ("gemma3", {"prefill_chunk": 16}),
        ("opt", {"draft": ("ngram",), "tree": "chain:3"}),
        ("opt-postnorm", {}),
        ("qwen3", {"prefill_chunk": 16}),
        ("bloom", {}),
        ("falcon-40b", {"prefill_chunk": 5}),
        ("qwen3_moe", {"prefill_chunk": 16}),
        ("deepseek_v2", {"prefill_chunk": 16}),
    ],
)
def test_pieces_leave_no_trace_in_the_tokens(
    family: str, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts come while others are decoded, in chunks or whole; trees are verified; layers with a window have pages of
    their own; a longer job moves the rotary tables; experts are told of real tokens only."""
    monkeypatch.setattr(native_quant, "usable", lambda *_: False)  # what is not torch's is not recorded
    make_model(family, tmp_path, max_position_embeddings=2048)
    jobs = [random_prompts(LENGTHS, seed=1), random_prompts([150, 5, 300], seed=3)]
    found: list[list[Any]] = [[], []]
    routed: list[Any] = []
    record: Any = ExpertsRecorder() if family in ("qwen3_moe", "deepseek_v2") else OpsRecorder()
    for pieces in (False, True):
        with LLM(str(tmp_path), **SETTINGS, **more) as llm:
            for job in jobs:
                llm.prepare(job, params_of(len(job)))
                assert llm.runner is not None
                executor = llm.runner.executor
                if pieces and executor.pieces is None:
                    record.routing = executor.routing
                    run_in_pieces(executor, record)
                for _ in range(2):
                    done = llm.generate(job, params_of(len(job)))
                    found[pieces] += [(c.token_ids, c.logprobs) for c in done]
                llm.runner.check()
                gc.collect()
            if pieces:
                assert executor.pieces is not None and executor.pieces.captured and executor.pieces.passes > 8
            routed.append(None if executor.routing is None else executor.routing.total.clone())
    assert [tokens for tokens, _ in found[True]] == [tokens for tokens, _ in found[False]]
    for (_, one), (_, other) in zip(found[True], found[False], strict=True):
        for ours, theirs in zip(one, other, strict=True):
            # Products of as many rows as a bucket has are rounded differently.
            chances = {token: each.logprob for token, each in theirs.items()}
            assert {token: each.logprob for token, each in ours.items()} == pytest.approx(chances, abs=1e-4)
    assert routed[0] is None or torch.equal(*routed)
    assert sum(graph.replays for graph in record.made) > 50, "passes ran in pieces"
    assert record.kept == 0, "the executor lets go of its graphs"


def test_what_does_not_run_in_pieces(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    with LLM(str(tmp_path), **SETTINGS) as llm:
        llm.prepare(random_prompts([20, 20, 20], seed=1), SamplingParams(max_tokens=12))
        assert llm.runner is not None
        executor, record = llm.runner.executor, Recorder()
        for buckets in ((), (2,)):
            few = run_in_pieces(executor, record, buckets)
            llm.generate(random_prompts([5, 9, 3], seed=1), SamplingParams(max_tokens=1, ignore_eos=True))
            assert not few.captured and not record.made, "prompts of more tokens than any bucket has"
        assert llm.runner.executor is executor
        llm.generate(random_prompts([1], seed=1), SamplingParams(max_tokens=9, ignore_eos=True))
        assert list(few.captured) == [(2, False)] and few.came.keys() == {(2, False)}
        few.check()


def test_a_bucket_is_recorded_once_launching_it_has_cost_as_much(tmp_path: Path) -> None:
    """Jobs of one pass with prompts each, as a handful of prompts is."""
    make_model("llama", tmp_path)
    with LLM(str(tmp_path), **SETTINGS) as llm:
        llm.prepare(random_prompts([20] * 3, seed=0), SamplingParams(max_tokens=2))
        assert llm.runner is not None
        pieces = run_in_pieces(llm.runner.executor, Recorder(), (32,))
        pieces.recording_passes = RECORDING_PASSES
        for job in range(1, RECORDING_PASSES + 2):
            llm.generate(random_prompts([9, 8, 7], seed=job), SamplingParams(max_tokens=1, ignore_eos=True))
            assert pieces.passes == max(0, job - RECORDING_PASSES + 1)
            pieces.check()


def test_a_recording_that_breaks_off_leaves_no_graph(tmp_path: Path) -> None:
    """The driver has no memory for the third graph, say: the error comes out, and the next pass records anew."""
    make_model("llama", tmp_path)
    record, prompts = OpsRecorder(), random_prompts(LENGTHS, seed=1)

    def failing(work: Any) -> Any:
        if len(record.made) == 2:
            raise torch.OutOfMemoryError("no memory")
        return record(work)

    with LLM(str(tmp_path), **SETTINGS) as llm:
        wanted = [each.token_ids for each in llm.generate(prompts, params_of(len(prompts)))]
        assert llm.runner is not None
        pieces = run_in_pieces(llm.runner.executor, failing)
        with pytest.raises(torch.OutOfMemoryError):
            llm.generate(prompts, params_of(len(prompts)))
        assert len(record.made) == 2 and record.kept == 0 and not pieces.captured
        llm.prepare(prompts, params_of(len(prompts)))
        pieces = run_in_pieces(llm.runner.executor, record)
        assert [each.token_ids for each in llm.generate(prompts, params_of(len(prompts)))] == wanted
        assert pieces.passes
