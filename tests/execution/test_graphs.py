"""Which CUDA graph a decode pass runs in, and which graphs are kept; with stand-ins that run what was recorded,
where there is no GPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbatch import LLM, Completion, SamplingParams
from flexbatch.execution.graphs import DecodeGraphs, Key, smallest_covering
from flexbatch.execution.inputs import AttentionGroup, MicroBatchInputs
from flexbatch.execution.sampling import NOT_FINITE, most_likely
from flexbatch.policy.decode_graphs import MAX_GRAPHS, RECORDING_PASSES, bucket_of, recorded_sequences
from flexbatch.policy.limits import MAX_GRAPH_SEQUENCES
from tests.tiny_models import make_model, random_prompts

keys = st.tuples(
    st.integers(1, MAX_GRAPH_SEQUENCES).map(bucket_of), st.sampled_from([512, 1024, 2048]), st.booleans(), st.booleans()
)
SETTINGS: dict[str, Any] = {
    "percent": (100, 0, 100, 0, 100, 0),
    "gpu_batch_size": 6,
    "num_gpu_batches": 1,
    "gpu_memory": "1GiB",
    "device": "cpu",
}
"""A block that would be a GPU's whole."""


@given(st.integers(1, MAX_GRAPH_SEQUENCES))
def test_a_bucket_has_room_and_wastes_less_than_half_or_32_places(count: int) -> None:
    assert count <= bucket_of(count) < max(2 * count, count + 32)


@given(st.lists(keys), keys)
def test_the_smallest_graph_with_room(captured: list[Key], key: Key) -> None:
    found = smallest_covering(captured, key)
    alike = [other for other in captured if other[3] == key[3]]
    fitting = [other for other in alike if other[0] >= key[0] and other[1] >= key[1] and other[2] >= key[2]]
    assert (found is None) == (not fitting)
    if found is not None:
        assert found in fitting and all(found[0] <= other[0] for other in fitting)
        assert key not in captured or found == key


class FakeGraph:
    """Runs what was recorded, on the tensors that it was recorded with."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self.work, self.hidden, self.replays, self.gone = work, work(), 0, False

    def replay(self) -> None:
        assert not self.gone, "a graph is replayed after it was evicted"
        self.hidden.copy_(self.work())
        self.replays += 1

    def reset(self) -> None:
        assert not self.gone, "a graph is evicted twice"
        self.gone = True


class Recorder:
    def __init__(self) -> None:
        self.made: list[FakeGraph] = []

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[FakeGraph, torch.Tensor]:
        self.made.append(FakeGraph(work))
        return self.made[-1], self.made[-1].hidden

    @property
    def kept(self) -> int:
        return sum(not graph.gone for graph in self.made)


def decode_inputs(count: int, context: int, page_tokens: int) -> MicroBatchInputs:
    numbers = torch.randint(0, 1000, (count,))
    pages = torch.randint(0, 50, (count, -(-context // page_tokens)), dtype=torch.int32)
    group = AttentionGroup(
        0,
        count,
        pages,
        torch.arange(count + 1, dtype=torch.int32),
        torch.full((count,), context, dtype=torch.int32),
        numbers + 5,
        None,
        1,
        context,
    )
    return MicroBatchInputs(
        (),
        numbers,
        numbers,
        numbers + 1,
        numbers + 1,
        group,
        None,
        None,
        tuple((None, i) for i in range(count)),
        torch.arange(count),
    )  # type: ignore[misc]


def hidden_of(inputs: MicroBatchInputs) -> torch.Tensor:
    assert inputs.gpu is not None
    return torch.stack([inputs.token_ids, inputs.positions, inputs.gpu.slots, inputs.gpu.page_table[:, 0]], 1).float()


@pytest.mark.parametrize("most", [1, 3, 8])
def test_the_graph_that_was_not_used_for_longest_goes(most: int) -> None:
    rng, record = random.Random(most), Recorder()
    graphs = DecodeGraphs(torch.device("cpu"), 16, 8192, record, most)
    used: list[Key] = []
    for _ in range(400):
        inputs = decode_inputs(rng.choice([1, 2, 3, 7, 40, 90]), rng.choice([5, 500, 700, 3000]), 16)
        before = list(graphs.captured)
        found = graphs.run(inputs, hidden_of)
        if found is not None:
            assert torch.equal(found, hidden_of(inputs)), "a graph gives what the pass itself gives"
            newest = next(reversed(graphs.captured))
            used = [key for key in used if key in graphs.captured and key != newest] + [newest]
            assert used == list(graphs.captured)
        gone = [key for key in before if key not in graphs.captured]
        assert gone == before[: len(gone)], "the oldest goes first"
        graphs.check()
        assert record.kept == len(graphs.captured) <= most
    assert len(record.made) > most
    graphs.clear()
    assert record.kept == 0 and not graphs.captured


def test_the_end_of_a_job_is_not_recorded_though_the_job_comes_again() -> None:
    """500 sequences that leave by 39 pay for one graph, whose places the last passes leave empty."""
    record = Recorder()
    graphs = DecodeGraphs(torch.device("cpu"), 16, 8192, record)
    for _ in range(3):
        for count in [500] * 20 + list(range(461, 0, -39)):
            graphs.run(decode_inputs(count, 30, 16), hidden_of)
            graphs.check()
    assert [key[0] for key in graphs.captured] == [512] and len(record.made) == 1


@pytest.mark.parametrize(("count", "passes"), [(256, 2 * RECORDING_PASSES), (384, 4 * RECORDING_PASSES)])
def test_a_block_that_stays_smaller_gets_a_graph_of_its_own(count: int, passes: int) -> None:
    """As soon as the empty places of a larger graph have cost as much as recording one."""
    graphs = DecodeGraphs(torch.device("cpu"), 16, 8192, Recorder())
    for size in [512] * 2 + [count] * passes:
        graphs.run(decode_inputs(size, 30, 16), hidden_of)
    assert [key[0] for key in graphs.captured] == [512]
    graphs.run(decode_inputs(count, 30, 16), hidden_of)
    assert [key[0] for key in graphs.captured] == [512, count]


@pytest.mark.parametrize("seed", range(10))
def test_a_plan_counts_the_graphs_that_passes_run_in(seed: int) -> None:
    """Blocks that fill and drain, over and over: in the same graphs of other sizes, pass by pass."""
    chance, recorder = random.Random(seed), Recorder()
    graphs = DecodeGraphs(torch.device("cpu"), 16, 512, recorder, most=99)
    counts = [chance.randint(1, 200)]
    while len(counts) < 300:
        counts.append(max(1, min(200, counts[-1] + chance.choice((0, 0, 0, 1, -1, -9, -60, 90)))))
    ran = []
    for count in counts:
        before = {graph: graph.replays for graph in recorder.made}
        result = graphs.run(decode_inputs(count, 20, 16), hidden_of)
        used = [graph for graph in recorder.made if graph.replays > before.get(graph, 0)]
        assert (result is None) == (not used)
        ran.append(len(used[0].hidden) if used else bucket_of(count))
    told = recorded_sequences(np.array(counts), np.ones(len(counts), dtype=bool))
    assert told.tolist() == ran and len({*ran}) > 1


def test_no_graphs_where_the_budget_has_no_room() -> None:
    graphs = DecodeGraphs(torch.device("cpu"), 16, 8192, Recorder(), 0)
    assert [graphs.run(decode_inputs(4, 30, 16), hidden_of) for _ in range(3)] == [None] * 3 and not graphs.captured


@pytest.mark.parametrize(("most", "family"), [(1, "llama"), (2, "gemma3"), (MAX_GRAPHS, "llama")])
def test_graphs_come_and_go_without_a_trace_in_the_tokens(most: int, family: str, tmp_path: Path) -> None:
    """Blocks that shrink, a second job that is longer: its rotary tables are elsewhere, and no graph may read the
    old ones. Layers with a window have pages of their own."""
    make_model(family, tmp_path, max_position_embeddings=4096)
    params = [SamplingParams(max_tokens=4 + 3 * i, temperature=0, ignore_eos=True) for i in range(6)]
    jobs = [
        random_prompts([5, 9, 3, 30, 17, 8], seed=1),
        random_prompts([5, 9, 3, 30, 17, 8], seed=2),
        random_prompts([5, 900, 3], seed=3),
    ]
    with LLM(str(tmp_path), **SETTINGS) as llm:
        plain = [[c.token_ids for c in llm.generate(job, params[: len(job)])] for job in jobs]
    record = Recorder()
    with LLM(str(tmp_path), **SETTINGS) as llm:
        for job, wanted in zip(jobs, plain, strict=True):
            llm.prepare(job, params[: len(job)])
            assert llm.runner is not None
            if llm.runner.executor.graphs is None:
                ring = llm.runner.cache.ring
                llm.runner.executor.graphs = DecodeGraphs(torch.device("cpu"), 16, 4096, record, most, ring=ring)
            assert [c.token_ids for c in llm.generate(job, params[: len(job)])] == wanted
            llm.runner.check()
            assert record.kept <= most
        assert (llm.runner.cache.ring > 0) == (family == "gemma3")
        assert sum(graph.replays for graph in record.made) > 10
    assert record.kept == 0


def job_of(kind: str) -> list[SamplingParams]:
    """Six answers of different lengths, all greedy but what ``kind`` says of the fourth."""
    others: dict[str, dict[str, Any]] = {
        "greedy": {},
        "sampled": {"temperature": 0.9, "seed": 3},
        "penalized": {"repetition_penalty": 1.3},
        "scored": {"logprobs": 2},
    }
    plain: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    return [SamplingParams(max_tokens=24 + 3 * i, **plain | (others[kind] if i == 3 else {})) for i in range(6)]


def ranked(completion: Completion) -> list[list[int]]:
    """Tokens whose log-probabilities are given, without them: rows that fill a graph up change how sums are rounded."""
    return [list(entry) for entry in completion.logprobs or ()]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "penalized", "scored"])
def test_graphs_draw_the_tokens_of_greedy_passes(kind: str, ahead: bool, tmp_path: Path) -> None:
    """The same completions as without graphs. Passes of greedy sequences alone have no logits outside of a graph, nor
    has the rest of a job once the one with something else has left."""
    make_model("llama", tmp_path)
    settings = SETTINGS | {"async_scheduling": ahead}
    job, params, record = random_prompts([5, 9, 3, 30, 17, 8], seed=1), job_of(kind), Recorder()
    with LLM(str(tmp_path), **settings) as llm:
        plain = [(c.token_ids, ranked(c)) for c in llm.generate(job, params)]
        executor = llm.runner.executor
        executor.graphs = DecodeGraphs(torch.device("cpu"), 16, 4096, record)
        drawn, drawn_chunk = [], type(executor).replayed

        def replayed(self: Any, inputs: MicroBatchInputs, result: torch.Tensor, greedy: bool) -> Any:
            drawn.append(result.ndim == 1)
            return drawn_chunk(self, inputs, result, greedy)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(executor), "replayed", replayed)
            for _ in range(2):
                assert [(c.token_ids, ranked(c)) for c in llm.generate(job, params)] == plain
        llm.runner.check()
    assert len(drawn) > 20 and all(drawn[-3:])
    assert all(drawn) == (kind == "greedy")


def test_a_graph_says_where_there_is_no_token() -> None:
    """Of a row without finite logits, as sampling does."""
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, torch.nan, 1.0], [torch.inf, 0.0, 0.0], [-torch.inf, 0.0, -1.0]])
    assert most_likely(logits).tolist() == [1, NOT_FINITE, NOT_FINITE, 1]
