"""A child is told apart from what this process has, or lacks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest

from flexbatch.execution.forked import Forked

CLOSED = """
import os, sys
from flexbatch.execution.forked import Forked
told = os.fdopen(os.dup(2), "w")
for number in range(int(sys.argv[1])):
    os.close(number)
child = Forked(lambda say: say({"count": 7}))
print(child.said(60), file=told, flush=True)
child.close()
"""


@pytest.mark.parametrize("closed", [1, 2, 3])
def test_a_child_answers_a_process_without_stdin_and_stdout(closed):
    """Its pipe has the number of one of these then, which the child gives to nothing else."""
    ran = subprocess.run([sys.executable, "-c", CLOSED, str(closed)], capture_output=True, text=True, check=False)
    assert ran.stderr.splitlines() == ["{'count': 7}"], ran.stderr


def test_where_no_thread_can_be_started_none_is_forked(monkeypatch):
    """A limit of processes, of a user's or a container's, counts threads: Python says so by a RuntimeError."""

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="can't start new thread"):
        Forked(lambda say: None)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_collects_what_is_its_own_where_its_parent_imports():
    """Which goes on without collections."""
    gc.disable()
    try:
        child = Forked(lambda say: say({"collects": gc.isenabled(), "frozen": gc.get_freeze_count() > 1000}))
        assert child.said(60) == {"collects": True, "frozen": True}
        child.close()
    finally:
        gc.enable()
