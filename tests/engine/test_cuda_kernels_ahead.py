"""Children of a process that uses a GPU compile what it will launch, and leave its GPU and its memory alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.gpu
def test_children_compile_what_is_launched_and_leave_pinned_memory_alone(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.execution.compiled_on_gpu"]
    environ = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True)
    found = json.loads(told.stdout)
    assert [(each["count"], each["error"]) for each in found["done"]] == [(3, "")]
    assert found["wrong"] == 0 and found["same"] == [True] * 3
    assert found["files"] == 3 and found["new"] == 0, "what was compiled is what was launched"
