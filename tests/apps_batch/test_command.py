from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flexbatch.apps import batch
from flexbatch.apps.jobs.progress import Counts, JobProgress
from flexbatch.apps.jobs.shard_assignment import ShardAssignment, divide_host, find_assignment
from flexbatch.cli.command import resume_command
from flexbatch.config import EngineConfig
from flexbatch.memory.host_memory import host_memory_bytes
from flexbatch.validation.errors import ConfigurationError
from tests.apps_batch.helpers import ROOT, command, parts_of, read_output, run_here, start, wait_for, write_input


def test_help_imports_no_torch() -> None:
    script = """
import sys
from flexbatch.apps.batch import main
try:
    main(["--help-all"])
except SystemExit:
    print("torch" in sys.modules, "pyarrow" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.stderr.strip() == "False False"
        and "--prompt-template" in done.stdout
        and "--gpu-batch-size" in done.stdout
    )


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("in",),
        ("in", "out", "--no-such-flag"),
        ("in", "out", "--max-tok", "3"),
        ("in", "out", "--max-tokens", "many"),
    ],
)
def test_wrong_usage_is_exit_code_two(words: tuple[str, ...]) -> None:
    process = start(*words)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 2 and out == "" and err


def test_stdout_stays_empty(tmp_path: Path) -> None:
    process = start(write_input(tmp_path / "in.parquet", ["a", None]), tmp_path / "out")
    out, err = process.communicate(timeout=20)
    assert process.returncode == 3 and out == "" and "2/2 rows" in err


def test_settings_come_from_flags_then_environment_then_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_input(tmp_path / "in.parquet", ["a"])
    (tmp_path / "c.yaml").write_text("max_tokens: 6\noutput_prefix: y_\ngenerated_tokens: true\n")
    monkeypatch.setenv("FLEXBATCH_OUTPUT_PREFIX", "e_")
    assert run_here(source, tmp_path / "out", "--config", tmp_path / "c.yaml", "--max-tokens", 3) == 0
    table = read_output(tmp_path / "out")
    assert "e_generated_tokens" in table.schema.names and table["e_num_generated_tokens"][0].as_py() <= 3


def test_the_resume_command_does_not_discard() -> None:
    assert (
        resume_command(["python", "-m", "flexbatch.apps.batch", "in put", "out", "--overwrite"])
        == "python -m flexbatch.apps.batch 'in put' out"
    )


def test_ranks_divide_shards_and_hosts() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert find_assignment(None, {}) == ShardAssignment() and find_assignment((1, 3), {}) == ShardAssignment(1, 3)
    share = find_assignment(None, torchrun)
    assert share == ShardAssignment(5, 8, 1, 4)
    assert find_assignment((1, 3), torchrun) == ShardAssignment(13, 24, 1, 4)
    config = divide_host(
        EngineConfig(cpu_memory="64GiB", gpu_memory="20GiB"), share, 2, Path("/cache"), host_memory_bytes()
    )
    assert (config.cpu_memory, config.gpu_memory, config.device, config.offload_dir) == (
        16 * 2**30,
        10 * 2**30,
        "cuda:1",
        "/cache/rank-1",
    )
    config = divide_host(EngineConfig(offload_dir="/mine"), share, 0, Path("/cache"), host_memory_bytes())
    assert config.offload_dir == "/mine/rank-1" and config.device == "auto"
    assert (
        isinstance(config.cpu_memory, int)
        and 0 < 4 * (config.cpu_memory + int(config.gpu_memory or 0)) <= host_memory_bytes() * 1.2
    )
    assert divide_host(EngineConfig(), ShardAssignment(5, 8), 0, Path("/cache"), host_memory_bytes()) == EngineConfig()
    for wrong in ({"RANK": "8"}, {"RANK": "x"}):
        with pytest.raises(ConfigurationError, match="RANK="):
            find_assignment(None, {**torchrun, **wrong})


def test_progress_says_a_line_now_and_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = JobProgress(Counts(100, 40), metrics_file=str(tmp_path / "m.prom"), interval_s=0.05)
    progress.counts.rows_done, progress.counts.generated_tokens_total = 70, 600
    wait_for((tmp_path / "m.prom").exists)
    progress.close()
    err = capsys.readouterr().err
    assert "flexbatch: 70/100 rows (70.0 %)" in err and "out tokens/s" in err and " left, 0 errors" in err


def test_a_terminal_gets_one_bar(tmp_path: Path) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    progress = JobProgress(Counts(10), stream=screen, interval_s=0.05)
    progress.counts.rows_done = 10
    progress.say("a message")
    progress.close()
    assert "10/10" in screen.getvalue() and "a message" in screen.getvalue() and "errors" in screen.getvalue()


@pytest.mark.parametrize("words", [(), ("--overwrite",), ("--shard", "1/2")], ids=["plain", "overwrite", "shard"])
def test_a_folder_of_somebody_else_is_left_as_it_is(tmp_path: Path, words: tuple[str, ...], capsys) -> None:
    source = write_input(tmp_path / "in.parquet", ["a"])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.txt").write_text("")
    assert run_here(source, tmp_path / "home", *words) == 2
    assert "already holds mine.txt and no job" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["mine.txt"]


def test_names_that_are_not_utf8_are_refused_by_name(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    write_input(tmp_path / "in" / "a.parquet", ["a"])
    try:
        Path(os.fsdecode(bytes(tmp_path / "in") + b"/b\xff.parquet")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    for location in (tmp_path / "in", tmp_path / "in" / "*.parquet"):
        assert run_here(location, tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert "the name of a file in" in said and "Traceback" not in said


def test_settings_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    read, asked = batch.read_settings, []
    monkeypatch.setattr(batch, "read_settings", lambda *arguments: asked.append(1) or read(*arguments))
    settings = tmp_path / "job.yaml"
    settings.write_text("overwrite: true\n")
    source = write_input(tmp_path / "in.parquet", ["a"])
    assert run_here(source, tmp_path / "out", "--config", settings) == 0 and asked == [1]
    settings.write_text("overwrites: true\n")
    assert run_here(source, tmp_path / "out", "--config", settings) == 2 and asked == [1, 1]
    assert "unknown setting 'overwrites'" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flag", "file", "variable", "flag and file"])
def test_the_command_that_goes_on_discards_nothing(how: str, tmp_path: Path) -> None:
    """Wherever it was said that the first start discards what is there."""
    settings = tmp_path / "job.yaml"
    settings.write_text("part_rows: 10\nwindow_rows: 4\n" + "overwrite: true\n" * ("file" in how))
    words = [write_input(tmp_path / "in.parquet", [f"p{row}" for row in range(40)]), tmp_path / "out"]
    words += ["--config", settings, *["--overwrite"] * ("flag" in how)]
    environ = {**os.environ, **({"FLEXBATCH_OVERWRITE": "true"} if how == "variable" else {})}
    first = command(*words, block=4, fail_after=200)
    done = subprocess.run(first, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    kept = {path: path.stat().st_ino for path in parts_of(tmp_path / "out")}
    assert kept
    resume = shlex.split(done.stderr.rsplit("resume with: ", 1)[1])
    resume[resume.index("tests.apps_batch.driver") + 1] = "{}"
    done = subprocess.run(resume, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "resuming" in done.stderr, done.stderr
    assert {path: path.stat().st_ino for path in kept} == kept
    assert read_output(tmp_path / "out")["id"].to_pylist() == list(range(40))
