"""Rows of ``--output``: in order as they finish, kept when a run ends early, and gone on with by the same command
alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexbatch.cli.progress import Progress
from flexbatch.cli.result_file import ResultFile
from flexbatch.validation.errors import ConfigurationError

PROMPTS = ["def add(a, b):", "x", "import os\n", "größer 🙂", "while True: pass", "for", "return 1", "class A:"]
FACTS = {"model": "m", "max_tokens": 6}


def prompt_file(folder: Path, prompts: list[str] = PROMPTS, suffix: str = "") -> str:
    rows = [{"id": number, "prompt": prompt} for number, prompt in enumerate(prompts)]
    (folder / f"prompts{suffix}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / f"prompts{suffix}.jsonl")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def interrupted(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command and ends it as Ctrl-C does after so many completions."""

    def start(completions: int, *words: str) -> int:
        finished = Progress.finished

        def interrupt(progress: Progress, completion) -> None:
            finished(progress, completion)
            if progress.done > completions:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "finished", interrupt)
            return command("--gpu-batch-size", "2", "--num-gpu-batches", "1", *words)

    return start


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1", "--n", "2", "--seed", "3")], ids=["greedy", "samples"])
def test_the_same_command_goes_on_and_gives_what_an_undisturbed_run_gives(
    command, interrupted, sampling, tmp_path: Path, capsys
) -> None:
    words = ["--prompts", prompt_file(tmp_path), *sampling]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert command(*words, "--output", str(whole)) == 0
    for completions in (4, 2):
        before = len(rows_of(out)) if out.exists() else 0
        assert interrupted(completions, *words, "--output", str(out)) == 130
        there = rows_of(out)
        assert before < len(there) < len(PROMPTS) and there == rows_of(whole)[: len(there)]
        assert (tmp_path / "out.jsonl.resume").exists()
        said = capsys.readouterr().err
        assert f"{len(there)} of {len(PROMPTS)} rows are in {out}" in said and "resume with: " in said
    with out.open("a") as file:
        file.write('{"prompt": "a torn li')  # as kill -9 leaves it
    assert command(*words, "--output", str(out)) == 0
    assert out.read_text() == whole.read_text()
    assert not (tmp_path / "out.jsonl.resume").exists()
    assert [row["id"] for row in rows_of(out)] == list(range(len(PROMPTS)))


OF_ANOTHER_RUN = [
    (["--max-tokens", "5"], "max_tokens was 6, and is 5"),
    (["--temperature", "0.5"], "temperature was 0.0, and is 0.5"),
    (["--seed", "9"], "seed was 0, and is 9"),
    (["--cache-bits", "8"], "cache_bits was 16, and is 8"),
    (["--num-prompts", "5"], "prompts was"),
    (["--prompts", "OTHER"], "prompts was"),
    (["--model", "demo"], "model was"),
    (["--stop", "zzz"], "stop was [], and is"),
]


def test_rows_of_another_run_are_refused_by_name(command, interrupted, tmp_path: Path, capsys) -> None:
    out, other = tmp_path / "out.jsonl", prompt_file(tmp_path, [*PROMPTS[:-1], "another"], "-other")
    assert interrupted(3, "--prompts", prompt_file(tmp_path), "--output", str(out)) == 130
    kept = out.read_text()
    capsys.readouterr()
    for words, told in OF_ANOTHER_RUN:
        words = [other if word == "OTHER" else word for word in words]
        assert command("--prompts", prompt_file(tmp_path), "--output", str(out), *words) == 2
        said = capsys.readouterr().err
        assert told in said and "out.jsonl.resume" in said and "loaded" not in said
        assert out.read_text() == kept


def test_rows_of_other_sampling_rules_are_refused(command, interrupted, tmp_path: Path, monkeypatch, capsys) -> None:
    words = ["--prompts", prompt_file(tmp_path), "--output", str(tmp_path / "out.jsonl")]
    assert interrupted(3, *words) == 130
    monkeypatch.setattr("flexbatch.cli.run_work.SAMPLING_RULES", 10**6)
    assert command(*words) == 2
    assert "sampling_rules was " in capsys.readouterr().err


def test_what_may_change_changes(command, interrupted, tmp_path: Path) -> None:
    """Places, budgets and blocks: who runs out of memory asks for less and goes on."""
    words = ["--prompts", prompt_file(tmp_path), "--output", str(tmp_path / "out.jsonl")]
    assert interrupted(3, *words) == 130
    assert (
        command(
            *words, "--gpu-batch-size", "1", "--percent", "50", "50", "50", "50", "100", "0", "--gpu-memory", "32MiB"
        )
        == 0
    )
    assert len(rows_of(tmp_path / "out.jsonl")) == len(PROMPTS)


def test_another_model_in_the_same_folder_is_refused(
    command, interrupted, tmp_path: Path, capsys, model_folder: Path
) -> None:
    words = ["--prompts", prompt_file(tmp_path), "--output", str(tmp_path / "out.jsonl")]
    assert interrupted(3, *words) == 130
    settings = model_folder / "generation_config.json"
    before = settings.read_text()
    try:
        settings.write_text(before.replace("{", '{"eos_token_id": 5,', 1))
        assert command(*words) == 2
        assert "model was" in capsys.readouterr().err
    finally:
        settings.write_text(before)


def test_a_finished_file_is_replaced_and_a_failure_leaves_it_alone(command, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")
    assert command("--prompts", prompt_file(tmp_path), "--output", str(out), "--gpu-memory", "20KiB") == 4
    assert out.read_text() == "old\n" and not (tmp_path / "out.jsonl.resume").exists()
    assert command("--prompts", prompt_file(tmp_path), "--output", str(out)) == 0
    assert len(rows_of(out)) == len(PROMPTS) and not (tmp_path / "out.jsonl.resume").exists()


@pytest.mark.parametrize("placement", ["nowhere/out.jsonl", ".", "file/out.jsonl", "locked.jsonl"])
def test_where_nothing_can_be_written_is_told_before_anything_is_read(
    command, placement: str, tmp_path: Path, capsys
) -> None:
    (tmp_path / "file").write_text("")
    held = ResultFile(tmp_path / "locked.jsonl")
    with held:
        assert command("--prompts", "/nowhere.jsonl", "--output", str(tmp_path / placement)) == 2
        said = capsys.readouterr().err
        assert ("cannot be written" in said or "another run" in said) and "/nowhere.jsonl" not in said
    assert not list(tmp_path.glob("*.resume"))


def test_pipes_and_devices_get_their_rows(command, tmp_path: Path, capsys) -> None:
    words = ["--prompts", prompt_file(tmp_path), "--num-prompts", "3"]
    assert command(*words, "--output", "/dev/null") == 0
    assert command(*words, "--output", "/dev/stdout") == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == [0, 1, 2]
    reader_end, fifo = tmp_path / "rows", tmp_path / "pipe"
    os.mkfifo(fifo)
    reader = subprocess.Popen(["bash", "-c", f"cat {fifo} > {reader_end}"])
    assert command(*words, "--output", str(fifo)) == 0
    reader.wait(timeout=60)
    assert len(rows_of(reader_end)) == 3


def test_printed_completions_are_there_when_a_run_is_interrupted(interrupted, tmp_path: Path, capsys) -> None:
    assert interrupted(3, "--prompts", prompt_file(tmp_path)) == 130
    out = capsys.readouterr().out
    assert out.count("----- prompt") >= 2 and out.index("prompt 0") < out.index("prompt 1")


@pytest.mark.parametrize("link", ["same", "symbolic", "hard"])
def test_rows_are_not_written_over_the_prompts(command, tmp_path: Path, capsys, link: str) -> None:
    prompts, out = Path(prompt_file(tmp_path)), tmp_path / "out.jsonl"
    before = prompts.read_text()
    if link != "same":
        out.symlink_to(prompts) if link == "symbolic" else out.hardlink_to(prompts)
    assert command("--prompts", str(prompts), "--output", str(prompts if link == "same" else out)) == 2
    assert "is the file of --prompts, which it would replace" in capsys.readouterr().err
    assert prompts.read_text() == before and not list(tmp_path.glob("*.resume"))


def test_half_a_surrogate_pair_is_refused_in_a_prompt_and_carried_in_a_field(command, tmp_path: Path, capsys) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    path.write_text('"fine"\n{"prompt": "x\\ud83d"}\n')
    assert command("--prompts", str(path), "--output", str(out)) == 2
    assert "prompt 1: holds half of a surrogate pair, \\ud83d, at character 1" in capsys.readouterr().err
    path.write_text('{"id": "\\ud83d", "price": 1.10, "prompt": "x"}\n')
    assert command("--prompts", str(path), "--output", str(out)) == 0
    assert '"id": "\\ud83d", "price": 1.10' in out.read_text()
    for words in (["--output", "/dev/stdout"], ["--json"]):
        capsys.readouterr()
        assert command("--prompts", str(path), *words) == 0
        assert '"id": "\\ud83d", "price": 1.10' in capsys.readouterr().out


# The file alone


def row(number: int) -> dict:
    return {"prompt": PROMPTS[number], "text": f"answer {number} größer"}


def test_rows_in_any_order_and_ends_at_any_time_give_the_same_file(tmp_path: Path) -> None:
    chance = random.Random(0)
    for trial in range(60):
        path = tmp_path / f"{trial}.jsonl"
        starts = 0
        while not path.exists() or path.with_name(f"{path.name}.resume").exists():
            starts += 1
            assert starts < 40
            try:
                with ResultFile(path) as out:
                    first = out.begin(FACTS, PROMPTS)
                    placements = list(range(first, len(PROMPTS)))
                    chance.shuffle(placements)
                    for placement in placements:
                        if chance.random() < 0.2:
                            raise KeyboardInterrupt
                        out.add(placement, row(placement))
                        out.check()
            except KeyboardInterrupt:
                if path.exists() and chance.random() < 0.7:
                    content = path.read_bytes()
                    path.write_bytes(
                        content + json.dumps(row(out.written)).encode()[: chance.randrange(20)]
                        if out.written < len(PROMPTS)
                        else content
                    )
        assert rows_of(path) == [row(number) for number in range(len(PROMPTS))]


@pytest.mark.parametrize("change", ["reorder", "edit", "more", "garbage", "state"])
def test_a_file_that_was_changed_is_not_gone_on_with(tmp_path: Path, change: str) -> None:
    path, state = tmp_path / "a.jsonl", tmp_path / "a.jsonl.resume"
    with pytest.raises(KeyboardInterrupt), ResultFile(path) as out:
        out.begin(FACTS, PROMPTS)
        for number in range(3):
            out.add(number, row(number))
        raise KeyboardInterrupt
    lines = path.read_bytes().splitlines(keepends=True)
    changed = {
        "reorder": [lines[1], lines[0]],
        "edit": [lines[0], b'{"text": 1}\n'],
        "more": [*lines, *lines, *lines],
        "garbage": [lines[0], b"x\n", lines[2]],
    }
    path.write_bytes(b"".join(changed.get(change, lines)))
    if change == "state":
        state.write_bytes(state.read_bytes()[:-3])
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=r"remove .*a\.jsonl\.resume"), ResultFile(path) as out:
        out.begin(FACTS, PROMPTS)
    assert path.read_bytes() == before
    state.unlink()
    with ResultFile(path) as out:
        assert out.begin(FACTS, PROMPTS) == 0
        for number in range(len(PROMPTS)):
            out.add(number, row(number))
    assert rows_of(path) == [row(number) for number in range(len(PROMPTS))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_ended_keeps_its_rows(model_folder: Path, tmp_path: Path, kind: signal.Signals) -> None:
    out = tmp_path / "out.jsonl"
    words = [
        sys.executable,
        "-m",
        "flexbatch.run",
        "--model",
        str(model_folder),
        "--device",
        "cpu",
        "--hardware",
        "cpu",
        "--max-tokens",
        "60",
    ]
    words += [
        "--prompts",
        prompt_file(tmp_path, [f"{number}: {PROMPTS[number % 8]}" for number in range(300)]),
        "--ignore-eos",
    ]
    words += [
        "--gpu-batch-size",
        "2",
        "--num-gpu-batches",
        "1",
        "--gpu-memory",
        "64MiB",
        "--cpu-memory",
        "64MiB",
        "--output",
    ]
    process = subprocess.Popen([*words, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(kind)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 130), said
    there = out.read_bytes().count(b"\n")
    assert 5 <= there < 300
    again = subprocess.run([*words, str(out)], capture_output=True, text=True)
    assert again.returncode == 0 and f"{there} of 300 rows are in" in again.stderr
    undisturbed = subprocess.run([*words, str(tmp_path / "whole.jsonl")], capture_output=True, text=True)
    assert undisturbed.returncode == 0 and out.read_text() == (tmp_path / "whole.jsonl").read_text()
