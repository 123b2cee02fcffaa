"""Runs in_helm/ in HELM's environment (apps/helm_env.sh), which cannot be the project's own: crfm-helm pins datasets
3.x."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = os.environ.get("FLEXBATCH_HELM_PYTHON")
HELM_PYTHON = Path(NAMED or ROOT / ".venv-helm/bin/python")


@pytest.mark.slow
@pytest.mark.skipif(
    not NAMED and not HELM_PYTHON.is_file(),
    reason="no HELM environment: run apps/helm_env.sh, or set FLEXBATCH_HELM_PYTHON",
)
@pytest.mark.parametrize("file", ["test_client.py", "test_runs.py"])
def test_in_the_environment_of_helm(file):
    command = [
        str(HELM_PYTHON),
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        f"tests/apps_eval/in_helm/{file}",
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, timeout=3600
    )
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-8000:]
