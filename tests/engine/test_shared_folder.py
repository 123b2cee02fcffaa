"""Several engines on one offload folder at once, in containers and in threads: all work, each with its own weights and
cache, and nothing is left.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from tests.engine import shared_folder
from tests.processes import Forked
from tests.tiny_models import make_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two of equal shape, their folders and tokens."""
    root = tmp_path_factory.mktemp("pair")
    for name, seed in (("one", 1), ("two", 2)):
        make_model("llama", root / name, seed=seed)
    found = {str(root / name): shared_folder.tokens(str(root / name), str(root / "alone")) for name in ("one", "two")}
    assert len(set(map(str, found.values()))) == 2
    return found


def own_files(folder: Path) -> list[str]:
    """Of an offload folder: everything but converted tensors and records of digests."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if path.suffix not in (".bin", ".json") or path.name.startswith(".")]


@pytest.mark.parametrize("starts", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_two_containers_share_a_volume(starts, models, tmp_path):
    """Both are process 1, each in its own namespace; of one model, and of two."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode
    ):
        pytest.skip("making a namespace of processes needs root")
    out, err = Forked("tests.engine.shared_folder", [str(tmp_path), str(starts), *sorted(models)]).communicate()
    pairs = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    assert len(pairs) == starts, err[-3000:]
    failed = [codes for _, codes, _ in pairs if any(codes)]
    assert not failed, (len(failed), failed[0], err[-3000:])
    assert all(found == [models[name] for name in names] for names, _, found in pairs), (
        "somebody read what is not its own"
    )
    assert own_files(tmp_path / "offload") == []


@pytest.mark.parametrize("attempts", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_threads_share_a_folder(attempts, models, tmp_path):
    """With one process id between them."""
    for attempt in range(attempts):
        barrier = Barrier(4)
        names = sorted(models) * 2

        def start(name: str, folder: Path = tmp_path / str(attempt), barrier: Barrier = barrier) -> list[list[int]]:
            barrier.wait()
            return shared_folder.tokens(name, str(folder))

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(start, names)) == [models[name] for name in names]
        assert own_files(tmp_path / str(attempt)) == []
