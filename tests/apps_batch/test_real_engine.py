"""The command with the demo model on the CPU."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from flexbatch.apps.batch import main
from flexbatch.apps.jobs.records import HEADER
from flexbatch.kernels.threads import one_thread
from tests.apps_batch.helpers import (
    benchmark_prompts,
    journal_bytes,
    kill_at,
    parts_of,
    read_output,
    wait_for,
    write_input,
)
from tests.apps_batch.helpers import start as start_driver
from tests.peft_folders import linear_modules, write_adapter
from tests.processes import Forked

DEMO = ("--model", "demo", "--device", "cpu")
SMALL_BLOCK = ("--gpu-batch-size", 8, "--num-gpu-batches", 2)


def start(*words: object, count_file: Path, **settings: object) -> Forked:
    return start_driver(*words, *DEMO, *SMALL_BLOCK, real=True, count_file=str(count_file), **settings)


def run_demo(*words: object) -> int:
    """In this process, which has loaded torch and transformers already: 3 seconds instead of 10."""
    return main([*map(str, words), *DEMO])


def finished(process: Forked, code: int = 0) -> None:
    out, err = process.communicate(timeout=1500)
    assert process.returncode == code and out == "", err


def kill_and_resume(
    tmp_path: Path,
    rows: int,
    kills: int,
    *flags: object,
    signals: Sequence[int] = (signal.SIGKILL,),
    lost: int = 96,
    **settings: object,
) -> None:
    """lost: tokens of the sequences in flight that all kills together may cost a small job."""
    source, out = (
        write_input(tmp_path / "in.parquet", benchmark_prompts(rows, 120), row_group_size=97),
        tmp_path / "out",
    )
    with one_thread():
        assert run_demo(source, tmp_path / "whole", *flags, *SMALL_BLOCK) == 0
    size = (tmp_path / "whole" / ".flexbatch" / "commits-0-of-1.log").stat().st_size
    chance, committed = random.Random(3), out / ".flexbatch" / "commits-0-of-1.log"

    def moments() -> Iterator[Callable[[], bool]]:
        for kill in range(kills):
            rate, before = size * (kill + chance.random()) / (kills + 1), journal_bytes(out)
            yield (
                lambda rate=rate, before=before: (
                    committed.exists() and committed.stat().st_size > rate and journal_bytes(out) != before
                )
            )

    kill_at(moments(), lambda: start(source, out, *flags, count_file=tmp_path / "tokens", **settings), 600, signals)
    finished(start(source, out, *flags, count_file=tmp_path / "tokens", **settings))
    whole = read_output(tmp_path / "whole")
    assert read_output(out).equals(whole)
    assert [path.read_bytes() for path in parts_of(out)] == [path.read_bytes() for path in parts_of(tmp_path / "whole")]
    once, tokens = pc.sum(whole["num_generated_tokens"]).as_py(), (tmp_path / "tokens").stat().st_size
    print(f"{rows} rows, {kills} kills: {tokens} tokens generated, {once} in one run")
    assert once <= tokens <= 1.15 * once + lost * (rows < 1000)


def test_a_sampled_job_that_was_killed_equals_an_undisturbed_one(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 40, 1, "--max-tokens", 4, "--part-rows", 8, "--window-rows", 16)


def test_a_job_is_killed_while_sequences_step_aside(tmp_path: Path) -> None:
    """Rows of processes in which any sequence steps aside at any pass, killed and resumed, are those of one in which
    none does."""
    flags = ("--max-tokens", 12, "--part-rows", 8, "--window-rows", 16)
    kill_and_resume(tmp_path, 40, 2, *flags, put_aside=str(tmp_path / "aside"))
    assert (tmp_path / "aside").stat().st_size > 6, "before every second pass, of which a kill leaves out some"


KILLED_WHERE: dict[str, tuple[object, ...]] = {
    "gpu": ("--percent", 100, 0, 100, 0, 100, 0),
    "cpu": ("--percent", 100, 0, 0, 100, 100, 0, "--cpu-attention", 0.5),
    "disk": ("--percent", 100, 0, 0, 0, 100, 0),
    "all tiers": ("--percent", 50, 30, 40, 30, 50, 20),
    "4 bits": ("--percent", 100, 0, 40, 60, 100, 0, "--cache-bits", 4),
    "drafts": ("--percent", 100, 0, 50, 50, 100, 0, "--draft", "ngram", "--tree", "chain:3"),
    "adapter": ("--percent", 100, 0, 50, 50, 100, 0),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """Of the demo model."""
    from transformers import AutoModelForCausalLM

    from flexbatch.models import resolve

    model = AutoModelForCausalLM.from_pretrained(str(resolve.resolve("demo")))
    folder = tmp_path_factory.mktemp("adapter") / "random"
    write_adapter(folder, model, linear_modules(model), strength=0.5)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("where", list(KILLED_WHERE))
def test_jobs_are_killed_while_sequences_step_aside_on_every_tier(where: str, tmp_path: Path, request) -> None:
    """By SIGKILL, SIGTERM and SIGINT in turn, in tiers that are overbooked: the answers seen before were short."""
    flags = [*KILLED_WHERE[where], "--max-tokens", 24, "--part-rows", 8, "--window-rows", 24]
    if where == "adapter":
        folder = request.getfixturevalue("adapter")
        flags += ["--lora", f"one={folder}", "--lora-default", "one"]
    flags += ["--offload-dir", tmp_path / "offload"]
    aside, signals = tmp_path / "aside", (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    kill_and_resume(tmp_path, 64, 3, *flags, signals=signals, lost=3 * 16 * 24, put_aside=str(aside), taught=3)
    assert aside.stat().st_size > 20


@pytest.mark.slow
def test_five_thousand_rows_killed_twenty_times(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 5000, 20, "--max-tokens", 8)


@pytest.mark.slow
def test_a_ray_job_with_three_engines_survives_the_death_of_one(tmp_path: Path) -> None:
    """Real actors with the demo model, one killed, against one process. A third of a CPU each: with whole ones Ray
    would wait for ever on two CPUs."""
    pytest.importorskip("ray")
    source, out, flags = (
        write_input(tmp_path / "in.parquet", benchmark_prompts(600, 120)),
        tmp_path / "out",
        ("--part-rows", "20", "--max-tokens", "16"),
    )
    finished(start(source, tmp_path / "whole", *flags, count_file=tmp_path / "once"))
    process = start(
        source, out, *flags, "--ray", "--ray-actors", "3", "--ray-cpus", "0.3", count_file=tmp_path / "tokens"
    )
    wait_for(lambda: len(busy_workers(out)) == 3, process, 300)
    actors = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "ray::Worker" in " ".join(child.cmdline())
    ]
    assert len(actors) == 3, process.communicate()
    actors[1].kill()
    committed = len(parts_of(out))
    finished(process)
    assert committed < 27 and len(list((out / ".flexbatch").glob("commits-worker-*.log"))) == 4, (
        "the fourth is the killed actor, started again"
    )
    assert read_output(out).equals(read_output(tmp_path / "whole"))
    once, tokens = ((tmp_path / name).stat().st_size for name in ("once", "tokens"))
    print(f"3 actors, 1 killed after {committed} of 30 parts: {tokens} tokens generated, {once} in one process")
    assert once <= tokens <= once + 16 * 16, "a death costs what one block of 16 sequences had in flight"
    assert not list((out / ".flexbatch").glob("journal-*"))


def busy_workers(out: Path) -> list[Path]:
    """Logs of the actors of a Ray job that have committed a part."""
    return [log for log in (out / ".flexbatch").glob("commits-worker-*.log") if log.stat().st_size > HEADER.size]


def test_the_job_gives_what_the_engine_gives(tmp_path: Path) -> None:
    from flexbatch import LLM, SamplingParams

    prompts = ["def add(a, b):", "import os\n", "x" * 9000, "class A:"]
    source = write_input(tmp_path / "in.parquet", prompts)
    flags = ("--temperature", 0, "--max-tokens", 5, "--logprobs", 2, "--generated-tokens", *SMALL_BLOCK)
    assert run_demo(source, tmp_path / "out", *flags) == 3
    rows = read_output(tmp_path / "out").to_pylist()
    assert "2048" in rows[2]["error"] and rows[2]["generated_text"] is None
    with LLM("demo", device="cpu", gpu_batch_size=8, num_gpu_batches=2) as llm:
        good = [0, 1, 3]
        completions = llm.generate([prompts[i] for i in good], SamplingParams(temperature=0, max_tokens=5))
    for position, completion in zip(good, completions, strict=True):
        row = rows[position]
        assert (row["generated_text"], row["generated_tokens"]) == (completion.text, completion.token_ids)
        assert row["logprobs"][0][0]["rank"] == 1 and row["logprobs"][0][0]["token_id"] == row["generated_tokens"][0]


def test_odd_prompts_through_the_real_tokenizer_and_engine(tmp_path: Path) -> None:
    """Null, empty, 100,000 words, emoji, a null byte, bytes that are no text: an error of the row, or its text,
    alone as among the others."""
    prompts = [
        b"fine",
        None,
        b"",
        b"word " * 100_000,
        "\U0001f600 \U0001f468\u200d\U0001f469".encode(),
        b"a\x00b",
        b"\xff\xfe",
        b"also fine",
    ]
    flags = ("--max-tokens", 4, "--part-rows", 3, *SMALL_BLOCK)
    rows: dict[int, dict] = {}
    for name, chosen in (("all", list(range(8))), ("good", [0, 4, 5, 7])):
        pq.write_table(
            pa.table({"id": chosen, "prompt": pa.array([prompts[i] for i in chosen], pa.binary()), "seed": chosen}),
            tmp_path / f"{name}.parquet",
        )
        out = tmp_path / name
        assert run_demo(tmp_path / f"{name}.parquet", out, *flags, "--seed-column", "seed") == (
            3 if name == "all" else 0
        )
        found = {row["id"]: row for row in read_output(out).to_pylist()}
        assert all(rows.get(number, row) == row for number, row in found.items())
        rows.update(found)
    told = {1: "is null", 2: "is empty", 3: "200000 tokens", 6: "is not UTF-8"}
    assert {number for number, row in rows.items() if row["error"]} == told.keys()
    assert all(message in rows[number]["error"] for number, message in told.items())


@pytest.mark.slow
def test_two_shards_with_real_engines_killed_and_resumed_independently(tmp_path: Path) -> None:
    source, out, flags = (
        write_input(tmp_path / "in.parquet", benchmark_prompts(600, 120)),
        tmp_path / "out",
        ("--part-rows", "20", "--max-tokens", "16"),
    )
    finished(start(source, tmp_path / "whole", *flags, count_file=tmp_path / "once"))
    for turn, shards in enumerate([(0, 1), (1, 0)]):
        processes = [
            start(source, out, *flags, "--shard", f"{shard}/2", count_file=tmp_path / "tokens") for shard in shards
        ]
        goal = 5 * (turn + 1)
        wait_for(lambda goal=goal: len(parts_of(out)) >= goal, processes[0], 300)
        processes[0].kill()
        processes[0].communicate()
        wait_for(lambda goal=goal: len(parts_of(out)) >= goal + 3, processes[1], 300)
        processes[1].kill()
        processes[1].communicate()
    committed = len(parts_of(out))
    for process in [
        start(source, out, *flags, "--shard", f"{shard}/2", count_file=tmp_path / "tokens") for shard in (0, 1)
    ]:
        finished(process)
    assert committed < 30 and read_output(out).equals(read_output(tmp_path / "whole"))
    once, tokens = ((tmp_path / name).stat().st_size for name in ("once", "tokens"))
    print(
        f"2 shards, each killed twice, {committed} of 30 parts before the last start: {tokens} tokens generated, "
        f"{once} in one process"
    )
    assert once <= tokens <= once + 4 * 16 * 16, "a death costs what one block of 16 sequences had in flight"


def test_a_rare_long_prompt_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It comes long after the block was sized; what came before and comes after is as it would be without it."""
    from flexbatch import LLM, SamplingParams

    prompts = [f"x_{i} = {i}" for i in range(40)]
    prompts[29] = "\n".join(f"value_{i} = {i}" for i in range(120))
    source, flags = (
        write_input(tmp_path / "in.parquet", prompts),
        ("--temperature", 0, "--max-tokens", 4, "--window-rows", 4, "--part-rows", 10),
    )
    assert run_demo(source, tmp_path / "out", *flags, "--gpu-batch-size", 2, "--num-gpu-batches", 1) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "made a larger block" in printed.err
    with LLM("demo", device="cpu", gpu_batch_size=2, num_gpu_batches=1) as llm:
        expected = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4))
    table = read_output(tmp_path / "out")
    assert (
        table["generated_text"].to_pylist() == [completion.text for completion in expected]
        and table["num_input_tokens"][29].as_py() > 400
    )


@pytest.mark.slow
def test_the_job_is_as_fast_as_generate_in_memory(tmp_path: Path) -> None:
    """Both runs use one engine in this process, in turns, so that the machine's other work touches both."""
    from flexbatch import LLM, SamplingParams
    from flexbatch.apps.batch import model_identity

    prompts = benchmark_prompts(1500, 150)
    source = write_input(tmp_path / "in.parquet", prompts, row_group_size=200)

    class Shared:
        def __init__(self, llm: LLM) -> None:
            self.stream, self.tokenizer, self.arch = llm.stream, llm.tokenizer, llm.arch

        def __enter__(self) -> Shared:
            return self

        def __exit__(self, *exc: object) -> None:
            return None

    with LLM("demo", device="cpu", gpu_batch_size=32, num_gpu_batches=2) as llm:

        def in_memory(turn: int) -> None:
            llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16))

        def as_job(turn: int) -> None:
            words = [
                str(source),
                str(tmp_path / f"out{turn}"),
                "--temperature",
                "0",
                "--max-tokens",
                "16",
                "--device",
                "cpu",
            ]
            assert main(words, open_engine=lambda config, seen: Shared(llm), identity=model_identity) == 0

        def measured(run: Callable[[int], None], turn: int) -> np.ndarray:
            """CPU seconds, wall seconds, passes."""
            before = np.array([time.process_time(), time.perf_counter(), llm.statistics.passes])
            run(turn)
            return np.array([time.process_time(), time.perf_counter(), llm.statistics.passes]) - before

        in_memory(-1)
        ratios = []
        for turn in range(4):
            found = {run: measured(run, turn) for run in ((in_memory, as_job), (as_job, in_memory))[turn % 2]}
            ratios.append(found[as_job] / found[in_memory])
    print("job / generate: CPU seconds, wall seconds, passes:", *(np.round(ratio, 3).tolist() for ratio in ratios))
    assert len(pq.read_table(tmp_path / "out0")) == 1500 and parts_of(tmp_path / "out0")
    cpu, _, passes = np.array(ratios).T
    assert passes.max() < 1.05 and np.median(cpu) < 1.05, ratios
