"""The session in which a job was started ends: SIGHUP, more than once, and stderr that is gone. Real signals and real
terminals."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexbatch.cli import interrupt
from flexbatch.cli.hangup import HangUp, hung_up
from flexbatch.cli.interrupt import Interrupts
from flexbatch.validation.errors import HUNG_UP
from tests.apps_batch.fake import FakeLLM
from tests.apps_batch.helpers import (
    ROOT,
    benchmark_prompts,
    command,
    journal_bytes,
    read_output,
    run_here,
    start,
    wait_for,
    write_input,
)

ROWS = 200
SLOW = {"block": 4, "step_s": 0.02}


def inputs(tmp_path: Path) -> tuple[object, ...]:
    """Of the command."""
    return write_input(tmp_path / "in.parquet", benchmark_prompts(ROWS)), tmp_path / "out", "--part-rows", ROWS


def begun(tmp_path: Path, **options: Any) -> subprocess.Popen:
    """A job that has kept some rows and has a while to go."""
    words = command(*inputs(tmp_path), **SLOW)
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    end = time.monotonic() + 60
    while journal_bytes(tmp_path / "out") < 1000:
        assert process.poll() is None and time.monotonic() < end, process.poll()
        time.sleep(0.01)
    return process


def go_on(tmp_path: Path) -> int:
    """The same command again, in this process; returns how many rows were done."""
    fake = FakeLLM()
    assert run_here(tmp_path / "in.parquet", tmp_path / "out", "--part-rows", ROWS, fake=fake) == 0
    assert read_output(tmp_path / "out")["id"].to_pylist() == list(range(ROWS))
    return ROWS - fake.prompts_seen


def on_terminal(follower: int) -> Callable[[], None]:
    """In a new session, whose terminal it becomes."""

    def attach() -> None:
        os.setsid()
        fcntl.ioctl(follower, termios.TIOCSCTTY, 0)

    return attach


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    """The kernel sends the signal, and every write to the terminal fails."""
    leader, follower = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), follower)
    process = begun(tmp_path, preexec_fn=on_terminal(follower), **streams)
    os.close(follower)
    kept = journal_bytes(tmp_path / "out")
    os.close(leader)
    assert process.wait(60) == HUNG_UP
    assert journal_bytes(tmp_path / "out") >= kept and 0 < go_on(tmp_path) < ROWS


END_OF_A_SESSION = (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP)
"""From the kernel, from the shell, and from systemd."""


def test_the_signals_alone(tmp_path: Path) -> None:
    process = start(*inputs(tmp_path), **SLOW)
    wait_for(lambda: journal_bytes(tmp_path / "out") > 1000, process)
    for number in END_OF_A_SESSION:
        process.send_signal(number)
        time.sleep(0.01)
    _, said = process.communicate(60)
    assert process.returncode == HUNG_UP and "interrupted; resume with: " in said and "Traceback" not in said, said
    assert 0 < go_on(tmp_path) < ROWS


@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["closed", "reader gone"])
def test_the_signals_without_stderr(tmp_path: Path, stderr: str) -> None:
    options = {"preexec_fn": lambda: os.close(2)} if stderr == "closed" else {"stderr": subprocess.PIPE}
    process = begun(tmp_path, **options)
    if process.stderr is not None:
        process.stderr.close()
    for number in END_OF_A_SESSION:
        process.send_signal(number)
        time.sleep(0.01)
    assert process.wait(60) == HUNG_UP
    assert 0 < go_on(tmp_path) < ROWS


def test_a_job_goes_on_under_nohup(tmp_path: Path) -> None:
    process = start(*inputs(tmp_path), block=16, step_s=0.005, nohup=True)
    wait_for(lambda: journal_bytes(tmp_path / "out") > 1000, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert read_output(tmp_path / "out")["id"].to_pylist() == list(range(ROWS))


class Left(Exception):
    """In place of the end of the process."""


@pytest.mark.parametrize(
    ("numbers", "leaves"),
    [
        ("HUP HUP HUP", False),
        ("HUP TERM HUP", False),
        ("HUP HUP TERM HUP", False),
        ("TERM HUP", False),
        ("TERM HUP TERM", False),
        ("HUP TERM TERM", True),
        ("HUP INT", True),
        ("TERM TERM", True),
        ("INT TERM", True),
    ],
)
def test_what_stops_a_job_that_stops_already(numbers: str, leaves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal of a person or a supervisor, not those that the end of one session brings."""

    def leave(code: int) -> None:
        raise Left

    monkeypatch.setattr(interrupt.os, "_exit", leave)
    before, handler = signal.getsignal(signal.SIGHUP), HangUp()
    signal.signal(signal.SIGHUP, handler)
    try:
        interrupts = Interrupts()
        with interrupts.installed():
            first, *others = (getattr(signal, f"SIG{name}") for name in numbers.split())
            with pytest.raises(KeyboardInterrupt):
                interrupts.handle(first, None)
            left = False
            for number in others:
                try:
                    interrupts.handle(number, None)
                except Left:
                    left = True
        assert left == leaves
        assert hung_up() == ("HUP" in numbers) and signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("numbers", "times"), [("HUP HUP", 1), ("HUP TERM", 1), ("TERM HUP", 1), ("TERM HUP HUP", 1), ("TERM TERM", 2)]
)
def test_what_breaks_off_a_command_that_puts_things_in_order(numbers: str, times: int) -> None:
    """Not what the end of one session brings, in whatever order."""
    handler, broken_off = HangUp(), 0
    for name in numbers.split():
        try:
            handler(getattr(signal, f"SIG{name}"), None)
        except KeyboardInterrupt:
            broken_off += 1
    assert broken_off == times and handler.came == ("HUP" in numbers)
