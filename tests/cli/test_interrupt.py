"""Ctrl-C on processes that work: the first finishes what is in flight and begins nothing else, the second stops now,
and both print the command that goes on."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flexbatch import run
from flexbatch.apps import batch
from flexbatch.validation.errors import HUNG_UP, INTERRUPTED
from tests.processes import Forked

ROWS, BLOCK = 60, 4
SMALL = ["--device", "cpu", "--hardware", "cpu", "--gpu-memory", "64MiB", "--cpu-memory", "64MiB"]
SLOW = [*SMALL, "--gpu-batch-size", "2", "--num-gpu-batches", "2", "--temperature", "0"]
FINISHING = re.compile(
    r"^interrupted: the (\d+) sequences in flight are being finished.*; go on with: (.*)$", re.MULTILINE
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": number, "prompt": f"def f{number}(a, b):"}) for number in range(ROWS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "prompts.jsonl"


def wait_until(reached: Callable[[], bool], process: Forked) -> None:
    end = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.005)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def words_of(prompts: Path, out: Path, model: Path, tokens: int) -> list[str]:
    words = ["--prompts", str(prompts), "--output", str(out), "--model", str(model)]
    return [*words, *SLOW, "--max-tokens", str(tokens), "--ignore-eos"]


def test_a_run_finishes_what_is_in_flight_and_the_printed_command_goes_on(
    prompts: Path, tmp_path: Path, model_folder: Path
) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    process = Forked("flexbatch.run", words_of(prompts, out, model_folder, 20))
    wait_until(lambda: len(lines_of(out)) >= 6, process)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate()
    assert process.returncode == 130 and printed == "" and "Traceback" not in said, said
    finishing = FINISHING.search(said)
    assert finishing is not None and int(finishing[1]) <= BLOCK, said
    there = lines_of(out)
    assert f"{len(there)} of {ROWS} rows are in {out}" in said and len(there) < ROWS
    resume = said.rsplit("interrupted; resume with: ", 1)[1].strip()
    assert resume == finishing[2]
    _, option, module, *words = shlex.split(resume)
    assert (option, module) == ("-m", "flexbatch.run")
    assert Forked(module, words).wait() == 0
    assert run.main(words_of(prompts, whole, model_folder, 20)) == 0
    assert lines_of(out)[: len(there)] == there and out.read_text() == whole.read_text()


def test_nothing_else_begins_after_the_first_signal(prompts: Path, tmp_path: Path, model_folder: Path) -> None:
    """In a block of four at most four rows follow those that were there when the signal came, and what ended in the
    pass meanwhile."""
    out = tmp_path / "out.jsonl"
    process = Forked("flexbatch.run", words_of(prompts, out, model_folder, 60))
    wait_until(lambda: len(lines_of(out)) >= 2, process)
    process.send_signal(signal.SIGSTOP)
    before = len(lines_of(out))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.communicate()
    assert process.returncode == 130 and before <= len(lines_of(out)) <= before + 2 * BLOCK < ROWS


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGINT, signal.SIGINT],
        *(pytest.param([number], marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP)),
    ],
    ids=["twice", "SIGTERM", "SIGHUP"],
)
def test_a_second_signal_stops_a_run_now(prompts: Path, tmp_path: Path, signals: list[int]) -> None:
    """Answers of 200 tokens, so that those in flight would take a while."""
    out = tmp_path / "out.jsonl"
    process = Forked("flexbatch.run", words_of(prompts, out, Path("demo"), 200))
    wait_until(lambda: len(lines_of(out)) >= 1, process)
    for number in signals[:-1]:
        process.send_signal(number)
        wait_until(lambda: "are being finished" in process.said(), process)  # two that come at once are one
    before = len(lines_of(out))
    process.send_signal(signals[-1])
    _, said = process.communicate()
    assert "interrupted; resume with: " in said and "Traceback" not in said, said
    assert process.returncode == (HUNG_UP if signal.SIGHUP in signals else INTERRUPTED)
    assert len(lines_of(out)) <= before + BLOCK and said.count("resume with: ") == 1


def test_without_output_nothing_is_kept_and_the_finished_ones_are_printed(model_folder: Path, prompts: Path) -> None:
    words = words_of(prompts, Path("unused"), model_folder, 60)
    words = [*words[:2], *words[4:], "--json"]
    process = Forked("flexbatch.run", words)
    # Before the first pass nothing is in flight that could be finished.
    wait_until(lambda: "completions; pass " in process.said(), process)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate()
    assert process.returncode == 130 and "nothing is kept without --output FILE" in said, said
    assert "are being finished" in said
    document = json.loads(printed)
    assert 0 < len(document["completions"]) < ROWS
    assert document["report"]["requests"] == len(document["completions"])


def test_a_job_finishes_what_is_in_flight_and_the_printed_command_goes_on(
    prompts: Path, tmp_path: Path, model_folder: Path
) -> None:
    """One part of all rows: it is not finished for the sake of being whole."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = ["--model", str(model_folder), *SLOW, "--max-tokens", "20", "--part-rows", str(ROWS)]
    process = Forked("flexbatch.apps.batch", [str(prompts), str(out), *words])
    journal = out / ".flexbatch"
    wait_until(lambda: sum(path.stat().st_size for path in journal.glob("journal-*.log")) > 2000, process)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate()
    assert process.returncode == 130 and printed == "" and "Traceback" not in said, said
    finishing = FINISHING.search(said)
    assert finishing is not None and int(finishing[1]) <= BLOCK, said
    done = re.search(rf"interrupted: (\d+) of {ROWS} rows are done and kept; resume with: (.*)", said)
    assert done is not None and 0 < int(done[1]) < ROWS // 2 and done[2] == finishing[2], said
    _, _, module, *again = shlex.split(done[2])
    resumed = Forked(module, again)
    _, said = resumed.communicate()
    assert resumed.returncode == 0 and f"resuming: {done[1]} of {ROWS} rows are done" in said, said
    assert batch.main([str(prompts), str(whole), *words]) == 0
    assert pq.read_table(out).equals(pq.read_table(whole))
