"""How OpenMP's threads wait: decided before torch is loaded, unless the user has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexbatch.kernels.threads import SHORT_WAIT, WAITING, be_a_good_neighbor, processor_share, usable_processors
from tests.test_size import PRODUCT, files

ROOT = Path(__file__).parents[2]


def displayed(environ: dict[str, str], code: str) -> dict[str, str]:
    """What OpenMP itself says of its settings when torch has loaded it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    variables = {**clean, "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "verbose", **environ}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line.split("=", 1) for line in done.stderr.splitlines() if "=" in line]
    return {name.strip().removeprefix("[host] "): value.strip().strip("'") for name, value in lines}


@pytest.mark.parametrize(
    ("environ", "name", "value"),
    [
        ({}, "GOMP_SPINCOUNT", SHORT_WAIT["GOMP_SPINCOUNT"]),
        pytest.param({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY", "ACTIVE", marks=pytest.mark.slow),
        pytest.param({"GOMP_SPINCOUNT": "5"}, "GOMP_SPINCOUNT", "5", marks=pytest.mark.slow),
    ],
)
def test_threads_sleep_soon_unless_the_user_says_otherwise(environ: dict[str, str], name: str, value: str) -> None:
    found = displayed(environ, "from flexbatch import SamplingParams\nimport torch\ntorch.ones(5) + 1")
    if name not in found:
        pytest.skip("this torch brings an OpenMP that does not tell its settings")
    assert found[name] == value


@pytest.mark.parametrize("name", WAITING)
def test_what_the_user_has_set_stays(name: str, tmp_path: Path) -> None:
    environ = {name: "own"}
    be_a_good_neighbor(environ, tmp_path)
    assert environ == {name: "own"}


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "5\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_processors(
    files: dict[str, str], share: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert processor_share(tmp_path) == share
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    environ: dict[str, str] = {}
    be_a_good_neighbor(environ, tmp_path)
    assert environ.get("OMP_NUM_THREADS") == (None if share is None else "2" if share == 1.5 else "1")
    assert usable_processors(tmp_path) == (8 if share is None else int(environ["OMP_NUM_THREADS"]))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environ = {name: "7"}
        be_a_good_neighbor(environ, tmp_path)
        assert environ == {name: "7", **SHORT_WAIT}


def test_threads_are_counted_by_what_this_process_may_keep_busy() -> None:
    """Of the machine's own processors a profile tells, and compares its load with them; nothing else does."""
    product = [folder for folder in PRODUCT if folder != "benchmark"]
    texts = {file: file.read_text(encoding="utf-8") for file in files(*product)}
    assert {file.parent.name for file, text in texts.items() if "cpu_count()" in text} == {"calibrate"}
    assert [file.name for file, text in texts.items() if "len(os.sched_getaffinity" in text] == ["threads.py"]
