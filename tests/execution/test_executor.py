"""The executor over links that are late: it waits for what a tick needs, whatever the order in which things arrive,
and survives what fails."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.execution.attention import CacheAttention, PendingTick
from flexbatch.execution.executor import Executor
from flexbatch.execution.tick_halves import TickHalves
from flexbatch.kernels import ops
from flexbatch.memory.files import DiskFile
from flexbatch.memory.handles import FutureHandle, Handle
from flexbatch.memory.transfer import ThreadQueue
from flexbatch.memory.weights import WeightStore
from flexbatch.planner.usage import UsageTracer
from flexbatch.trace import RecordingTracer, Tracer
from tests.memory.rigs import dawdle
from tests.tiny_models import make_model, random_prompts

LENGTHS = [1, 5, 40, 17, 33, 2, 24]
PARAMS = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
MIXED = {"percent": (30, 30, 20, 40, 30, 30), "cpu_attention": 0.5}
DISK = {"percent": (0, 0, 0, 0, 0, 0)}
HOST = {"percent": (0, 100, 0, 100, 0, 100), "cpu_attention": 1.0, "prefill_chunk": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    make_model("llama", made)
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """Everything on the gpu tier, every prompt alone."""
    with engine(folder, None, percent=(100, 0, 100, 0, 100, 0), gpu_batch_size=1, num_gpu_batches=1) as llm:
        return tokens(llm)


def engine(folder: Path, offload_dir: Path | None, **settings: Any) -> LLM:
    sizes = {
        "gpu_batch_size": 2,
        "num_gpu_batches": 3,
        "prefill_chunk": 7,
        "gpu_memory": "256MiB",
        "cpu_memory": "256MiB",
    }
    return LLM(
        str(folder), device="cpu", hardware="cpu", offload_dir=offload_dir and str(offload_dir), **{**sizes, **settings}
    )


def tokens(llm: LLM) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate(random_prompts(LENGTHS), PARAMS)]


def check(llm: LLM) -> None:
    llm.weights.check()
    llm.tiers.check()
    llm.queues.check()
    if llm.runner is not None:
        llm.runner.check()
        llm.runner.cache.check([])
        assert not llm.runner.activations.stored and not llm.runner.host_buffers.owners


@pytest.mark.parametrize(
    ("settings", "overlap"),
    [
        pytest.param(MIXED, True, id="mixed"),
        pytest.param(DISK, True, id="disk"),
        pytest.param(HOST, False, id="host-in-turn"),
        pytest.param(MIXED, False, id="mixed-in-turn", marks=pytest.mark.slow),
        pytest.param(DISK, False, id="disk-in-turn", marks=pytest.mark.slow),
        pytest.param(HOST, True, id="host", marks=pytest.mark.slow),
    ],
)
def test_late_links_change_no_token(
    folder: Path, expected: list[list[int]], tmp_path: Path, settings: dict[str, Any], overlap: bool
) -> None:
    with engine(folder, tmp_path, overlap=overlap, **settings) as llm:
        dawdle(llm.queues, seed=5, most=0.02)
        assert tokens(llm) == expected
        check(llm)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_cpu_attention_waits_for_the_rows_of_a_prompt_that_was_read_on_the_device(
    folder: Path, expected: list[list[int]]
) -> None:
    """Chunks over 32 tokens are attended in staging; the pass after that finds their rows on the CPU, or waits."""
    settings = {"percent": (100, 0, 0, 100, 100, 0), "cpu_attention": 1.0, "prefill_chunk": 64}
    with engine(folder, None, overlap=True, **settings) as llm:
        traced = llm.queues.d2h.traced  # type: ignore[union-attr]

        def late(*arguments: Any) -> Any:
            time.sleep(0.1)
            return traced(*arguments)

        llm.queues.d2h.traced = late  # type: ignore[method-assign, union-attr]
        assert tokens(llm) == expected
        check(llm)


def test_the_link_does_not_wait_for_a_half_that_is_put_off(
    folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CPU attention the last half of a layer runs in the next one; a third slab takes the layer after that
    meanwhile, and is not empty between two passes, either."""
    events: list[tuple[str, int]] = []
    fetch, release = WeightStore.fetch, WeightStore.release

    def fetched(self: WeightStore, layer: int, *arguments: Any) -> None:
        if layer not in self.leases:
            events.append(("fetch", layer))
        fetch(self, layer, *arguments)
        self.check()

    def released(self: WeightStore, layer: int, done: Handle) -> None:
        events.append(("release", layer))
        release(self, layer, done)

    monkeypatch.setattr(WeightStore, "fetch", fetched)
    monkeypatch.setattr(WeightStore, "release", released)
    before = {}
    for attended in (0.0, 1.0):
        events.clear()
        with engine(folder, None, **{**HOST, "cpu_attention": attended}) as llm:
            assert len(llm.weights.slabs) == llm.policy.num_weight_slabs == 2 + (attended > 0)
            assert tokens(llm) == expected
            check(llm)
        order = [layer for what, layer in events if what == "fetch"]
        assert order == [index % 4 for index in range(len(order))], "layers are fetched in the order of their use"
        # How many more layers were fetched than released whenever one is released.
        ahead, leased = [], 0
        for what, _ in events:
            leased += 1 if what == "fetch" else -1
            ahead += [leased] if what == "release" else []
        before[attended] = Counter(ahead).most_common(1)[0][0]
    assert before == {0.0: 1, 1.0: 2}


@pytest.mark.parametrize(
    ("settings", "placement"),
    [
        pytest.param(MIXED, "read", id="mixed-read"),
        pytest.param(DISK, "write", id="disk-write"),
        pytest.param(MIXED, "write", id="mixed-write", marks=pytest.mark.slow),
        pytest.param(DISK, "read", id="disk-read", marks=pytest.mark.slow),
    ],
)
def test_a_failed_transfer_ends_its_job_and_no_other(
    folder: Path,
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    placement: str,
) -> None:
    """The error of a background thread is raised in the job that needed the transfer; the next job starts afresh,
    and closing raises nothing."""
    work = getattr(DiskFile, placement)
    with engine(folder, tmp_path, overlap=True, **settings) as llm:
        assert llm.weights is not None, "they are loaded before anything fails"
        for after in (3, 40):
            calls = Counter[str]()

            def fail(self: DiskFile, *arguments: Any, calls: Counter[str] = calls, after: int = after) -> None:
                calls["made"] += 1
                if calls["made"] >= after:
                    raise OSError(5, "Input/output error")
                work(self, *arguments)

            monkeypatch.setattr(DiskFile, placement, fail)
            with pytest.raises(OSError, match="Input/output error"):
                tokens(llm)
            check(llm)
        monkeypatch.setattr(DiskFile, placement, fail)
        with pytest.raises(OSError, match="Input/output error"):
            tokens(llm)
        monkeypatch.setattr(DiskFile, placement, work)
        assert tokens(llm) == expected
        check(llm)


def test_a_write_that_fails_behind_the_last_pass_is_not_forgotten(
    folder: Path, expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No attention waits for it any more, but the next job begins with the same prompts and must not find pages that
    never arrived."""
    write, calls = DiskFile.write, Counter[str]()
    first = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    prompts = random_prompts(LENGTHS)

    def count(self: DiskFile, *arguments: Any) -> None:
        calls["made"] += 1
        if calls["made"] == calls["last"]:
            raise OSError(5, "Input/output error")
        write(self, *arguments)

    monkeypatch.setattr(DiskFile, "write", count)
    settings = {"percent": (100, 0, 0, 0, 100, 0), "gpu_batch_size": 7, "num_gpu_batches": 1, "prefill_chunk": 64}
    with engine(folder, tmp_path, overlap=True, **settings) as llm:
        llm.generate(prompts, first)
        calls["last"], calls["made"] = calls["made"], 0
    with engine(folder, tmp_path, overlap=True, **settings) as llm:
        with pytest.raises(OSError, match="Input/output error"):
            llm.generate(prompts, first)
        assert calls["made"] == calls["last"]
        assert tokens(llm) == expected


def test_a_stream_that_is_left_early_leaves_nothing_behind(
    folder: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    with engine(folder, tmp_path, overlap=True, **MIXED) as llm:
        items = ((i, prompt, PARAMS) for i, prompt in enumerate(random_prompts(LENGTHS)))
        stream = llm.stream(items)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        check(llm)
        assert not llm.weights.leases
        assert tokens(llm) == expected


def test_without_overlap_nothing_runs_beside_a_tick(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every tick all lanes are idle: what `--overlap false` is for."""
    settled = Executor.synchronize
    seen = []

    def synchronize(self: Executor) -> None:
        settled(self)
        assert self.queues is not None
        seen.append(all(queue.num_ended == queue.num_submitted for queue in self.queues.all_queues))

    monkeypatch.setattr(Executor, "synchronize", synchronize)
    with engine(folder, tmp_path, overlap=False, **MIXED) as llm:
        dawdle(llm.queues, seed=6, most=0.01)
        tokens(llm)
    assert len(seen) > 50 and all(seen)


def test_logits_come_in_blocks_that_fit(
    folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexbatch.execution.block_sizes.LOGITS_CHUNK_BYTES", 1)
    with engine(folder, None, percent=(100, 0, 100, 0, 100, 0)) as llm:
        assert tokens(llm) == expected


def test_a_trace_has_a_span_for_every_tick(folder: Path, tmp_path: Path) -> None:
    with engine(folder, tmp_path, overlap=True, trace=True, **DISK) as llm:
        tokens(llm)
        assert isinstance(llm.tracer, RecordingTracer)
        ticks = [span.name for span in llm.tracer.spans() if span.resource == "tick"]
        passes = llm.statistics.passes
        assert {name.split(" ")[1] for name in ticks} == {"0", "1", "2", "3"}
        assert len(ticks) % 4 == 0 and passes * 4 <= len(ticks) <= passes * 12
        assert {"disk_read", "disk_write", "compute"} <= set(llm.tracer.summary())
        assert torch.is_inference_mode_enabled() is False


@pytest.mark.parametrize("placement", ["weights", "cache", "both"])
def test_no_time_of_computing_holds_the_waiting_for_a_link(
    placement: str, folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the profile is corrected by, and plans made anew: that the GPU computes while it waits would slow it."""
    computing, waited = [0], []
    span, wait = Tracer.compute_span, FutureHandle.wait

    @contextlib.contextmanager
    def compute_span(self: Tracer, *name: str) -> Iterator[None]:
        with span(self, *name):
            computing[0] += 1
            yield
            computing[0] -= 1

    def noted(self: FutureHandle) -> None:
        waited.append(computing[0])
        wait(self)

    for each in (Tracer, RecordingTracer, UsageTracer):
        monkeypatch.setattr(each, "compute_span", compute_span)
    monkeypatch.setattr(FutureHandle, "wait", noted)
    percent = {"weights": (0, 100, 100, 0), "cache": (100, 0, 0, 100), "both": (0, 100, 0, 100)}[placement]
    with engine(folder, None, percent=(*percent, 100, 0), cpu_attention=0.5, overlap=True) as llm:
        assert tokens(llm) == expected
    assert len(waited) > 50 and not any(waited)


@pytest.mark.parametrize(("micro_batches", "attended"), [(1, 1.0), (1, 0.5), (2, 1.0)])
def test_with_one_micro_batch_the_thread_that_waits_attends(
    micro_batches: int, attended: float, folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several it launches the others meanwhile, and beside pages in staging what is attended there."""
    by_main, alone = list[bool](), list[bool]()
    traced, begin_pass, start = ThreadQueue.traced, TickHalves.begin_pass, CacheAttention.start_cpu_attention
    micro_batches_of_pass = 0

    def counted(self: TickHalves, tokens: list[int]) -> None:
        nonlocal micro_batches_of_pass
        micro_batches_of_pass = len(tokens)
        begin_pass(self, tokens)

    def started(self: CacheAttention, pending: PendingTick, *given: Any) -> None:
        alone.append(micro_batches_of_pass == 1 and pending.inputs.staged is None)
        start(self, pending, *given)

    def noted(self: ThreadQueue, *job: Any) -> Any:
        if self.resource == "cpu_attention":
            by_main.append(threading.current_thread() is threading.main_thread())
        return traced(self, *job)

    monkeypatch.setattr(TickHalves, "begin_pass", counted)
    monkeypatch.setattr(CacheAttention, "start_cpu_attention", started)
    monkeypatch.setattr(ThreadQueue, "traced", noted)
    block = {"num_gpu_batches": micro_batches, "gpu_batch_size": 7 // micro_batches + 1}
    placed = {"percent": (50, 50, 0, 100, 100, 0), **block}
    with engine(folder, None, cpu_attention=attended, overlap=True, **placed) as llm:
        assert tokens(llm) == expected
        check(llm)
    assert len(by_main) == len(alone) > 20 and sum(by_main) == sum(alone)
    assert any(alone) or micro_batches == 2 or attended < 1


def test_cpu_attention_appends_and_attends_with_as_many_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teams of two sizes end a thread and start another with every call."""
    asked: list[tuple[str, int]] = []

    def noting(name: str) -> None:
        before = getattr(ops, name)

        def noted(*tensors: Any, threads: int = 0, **options: Any) -> Any:
            asked.append((name, threads))
            return before(*tensors, threads=threads, **options)

        monkeypatch.setattr(ops, name, noted)

    with engine(folder, None, **HOST) as llm:
        llm.prepare(random_prompts(LENGTHS), PARAMS)
        assert llm.runner is not None
        llm.runner.executor.halves.attention.cpu_threads = 3
        for name in ("append_rows", "paged_attention"):
            noting(name)
        tokens(llm)
    found = Counter(asked)
    assert found["append_rows", 3] == found["paged_attention", 3] > 0
