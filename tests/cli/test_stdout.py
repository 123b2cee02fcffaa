"""stdout is data, whatever a library prints there; and a reader that goes away ends a command quietly."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from flexbatch.__main__ import COMMANDS
from flexbatch.policy.stdout import READER_GONE, data_apart

ROOT = Path(__file__).parents[2]
NOISE = Path(__file__).parent / "noise"
SMALL = ["--device", "cpu", "--hardware", "cpu", "--gpu-memory", "256MiB", "--cpu-memory", "64MiB"]
PRICED = ["-m", "flexbatch", "plan", "opt-125m", "--gpu", "cpu", "--gpu-batch-size", "4", "--num-gpu-batches", "1"]
PRICED += ["--percent", "100", "0", "100", "0", "100", "0", "--cpu-attention", "0", "--prefill-chunk", "64"]
PRICED += ["--num-prompts", "7"]


def python(*words: str, noisy: bool = False, **options) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*([str(NOISE)] if noisy else []), str(ROOT)])
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, text=True, **piped)


def write_table(folder: Path) -> Path:
    folder.mkdir()
    for name in ("train", "valid", "test"):
        (folder / f"{name}.csv").write_text("name,city\nAda,London\nAlan,Wilmslow\n")
    return folder


def noisy_run(words: Sequence[str]) -> str:
    """What a command leaves on stdout with noisy libraries, after a look at stderr: the noise has to be somewhere."""
    done = python(*words, noisy=True)
    assert done.returncode == 0, done.stderr
    assert "NOISE" not in done.stdout, done.stdout
    for kind in (
        "print importing",
        "write",
        "descriptor",
        "printf",
        "child",
        "print leaving",
        "__stdout__",
        "stdout of the start",
    ):
        assert f"NOISE {kind}" in done.stderr, kind
    return done.stdout


def test_a_plan_is_one_json_document_with_noisy_libraries() -> None:
    assert json.loads(noisy_run([*PRICED, "--json"]))["model"] == "opt-125m"


@pytest.mark.slow
def test_completions_are_one_json_document_with_noisy_libraries() -> None:
    document = json.loads(
        noisy_run(["-m", "flexbatch", "run", *SMALL, "--num-prompts", "1", "--max-tokens", "2", "--json"])
    )
    assert len(document["completions"]) == 1 and document["report"]["requests"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [["-m", "flexbatch"], ["-c", "import sys; from flexbatch.__main__ import main; sys.exit(main())"]],
    ids=["module", "script"],
)
def test_every_command_keeps_noise_from_its_data(start: list[str], tmp_path: Path) -> None:
    run = noisy_run([*start, "run", *SMALL, "--num-prompts", "2", "--max-tokens", "2"])
    assert run.startswith("----- prompt 0") and run.count("-----\n") == 2
    assert (
        noisy_run([*start, "run", *SMALL, "--num-prompts", "2", "--max-tokens", "2", "--output", "/dev/stdout"]).count(
            "\n"
        )
        == 2
    )
    assert json.loads(noisy_run([*start, "run", *SMALL, "--dry-run", "--json"]))["model"]
    words = ["complete", *SMALL, "--max-tokens", "2", "--json", "def a():", "def b():"]
    assert sorted(json.loads(line)["index"] for line in noisy_run([*start, *words]).splitlines()) == [0, 1]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "def a():"}\n')
    assert noisy_run([*start, "batch", str(rows), str(tmp_path / "out"), *SMALL, "--max-tokens", "2"]) == ""
    words = [
        "wrangle",
        str(write_table(tmp_path / "table")),
        "--task",
        "data_imputation",
        "--column",
        "city",
        "--shots",
        "1",
    ]
    assert json.loads(noisy_run([*start, *words, "--limit", "1", *SMALL]))["failed_prompts"] == 0


@pytest.mark.slow
def test_the_harness_prints_its_lists_and_nothing_else() -> None:
    pytest.importorskip("lm_eval")
    listed = noisy_run(["-m", "flexbatch", "lm-eval", "ls", "tags"])
    assert "|" in listed


def test_c_and_python_are_kept_apart_in_a_program_that_calls_a_command(capfd: pytest.CaptureFixture[str]) -> None:
    """`main` called from Python: stdout is as before, afterward."""
    print("before")
    with data_apart() as data:
        print("noise")
        os.write(1, b"noise\n")
        subprocess.run(["echo", "noise"], check=True)
        print("data", file=data)
    print("after")
    captured = capfd.readouterr()
    assert captured.out.split() == ["before", "data", "after"] and captured.err.split() == ["noise"] * 3


def test_nothing_that_a_command_module_imports_at_once_is_a_library() -> None:
    """What a library prints while it is imported is kept apart only from where the command has begun."""
    code = "import sys, importlib\nknown = set(sys.modules)\nfor name in {names!r}: importlib.import_module(name)\n"
    code += (
        "print(sorted({{name.split('.')[0] for name in set(sys.modules) - known}} - sys.stdlib_module_names - "
        "{{'flexbatch'}}))"
    )
    names = [load().__module__ for load, _ in COMMANDS.values()]
    names += ["flexbatch.__main__"]
    done = python("-c", code.format(names=names))
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == []


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "flexbatch", "-h"],
        ["-m", "flexbatch", "--version"],
        ["-m", "flexbatch", "run", "--help"],
        [*PRICED, "--json"],
    ],
)
def test_a_reader_that_has_gone_is_no_traceback(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = python(*words, stdout=writer)
    os.close(writer)
    # argparse ignores that a long help cannot be written.
    assert done.returncode in ((0, READER_GONE) if "--help" in words else (READER_GONE,)) and done.stderr == ""


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    """More than a pipe holds, of which the first lines are read."""
    code = (
        "import sys\nfrom flexbatch.cli.command import run_command\nfrom flexbatch.policy.stdout import run_process\n"
    )
    code += (
        "sys.exit(run_process(lambda: run_command(lambda data: [print('x' * 99, file=data) for _ in "
        "range(99999)] and 0)))"
    )
    shell = f'"{sys.executable}" -c "{code}" | head -n 2'
    done = subprocess.run(
        ["bash", "-c", f"{shell}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == READER_GONE and done.stdout.count(b"\n") == 2 and done.stderr == b""


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), (">&- 2>&- <&-", 0), (">/dev/full", 4)]
)
def test_streams_that_are_closed_or_full(redirection: str, code: int, tmp_path: Path) -> None:
    """No file gets the number of a closed stream, and with it what libraries print; data that cannot be written is
    told by the exit code."""
    out = tmp_path / "out"
    program = f"""
import os, sys
from flexbatch.cli.command import run_command
from flexbatch.policy.stdout import run_process
def command(data):
    with open({str(out)!r}, "w") as file:
        os.write(1, b"noise"); print("noise"); print("data", file=data); file.write("kept")
    print("told", file=sys.stderr)
sys.exit(run_process(lambda: run_command(command)))
"""
    (tmp_path / "program.py").write_text(program)
    shell = f'"{sys.executable}" "{tmp_path}/program.py" {redirection}'
    done = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == code, done
    assert out.read_text() == "kept"
    assert "Traceback" not in done.stderr and "noise" not in done.stdout


@pytest.mark.parametrize(("number", "begin"), [("SIGINT", ", torch"), ("SIGINT", ""), ("SIGTERM", "")])
def test_a_signal_while_the_interpreter_ends_is_no_traceback(number: str, begin: str) -> None:
    """The second Ctrl-C of a run whose last sequences have just ended; torch takes its libraries down there."""
    program = f"""
import atexit, os, signal, sys{begin}
from flexbatch.cli.command import run_command
from flexbatch.policy.stdout import run_process
atexit.register(lambda: os.kill(os.getpid(), signal.{number}))
sys.exit(run_process(lambda: run_command(lambda data: print("data", file=data) or 3)))
"""
    done = python("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (3, "data\n", "")


def test_ctrl_c_while_modules_are_imported_is_no_traceback() -> None:
    code = (
        "import os, signal, sys\nfrom flexbatch.policy.stdout import run_process\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background\n"
        "sys.exit(run_process(lambda: os.kill(os.getpid(), signal.SIGINT)))"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_half_a_surrogate_pair_is_written_as_json_writes_it() -> None:
    code = (
        "from flexbatch.policy.stdout import run_process\nimport json\nrun_process(lambda: "
        "print(json.dumps('a\\ud800b', ensure_ascii=False)))"
    )
    done = python("-c", code)
    assert done.returncode == 0 and json.loads(done.stdout) == "a\ud800b", done.stderr
