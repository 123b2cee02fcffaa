"""A process that is killed while it writes files for the next start beside its job: that one trusts whole files alone,
and reads the other tensors from the checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flexbatch.memory.loading import Loader
from flexbatch.memory.weights import WeightStore
from flexbatch.models.specs import Piece
from tests.memory.beside_driver import ARCH, plan
from tests.memory.rigs import open_tiers, pieces
from tests.processes import Forked

Key = tuple[int, str]


def whole_files(folder: Path) -> dict[str, bytes]:
    """Files with their final names, that is."""
    found = (path for path in folder.rglob("*.bin") if not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def torn_files(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp"))


def next_start(folder: Path) -> tuple[set[Key], int, list[torch.Tensor]]:
    """Which tensors it read from the checkpoint, how many it reused, and its weights as they are stored."""
    read: set[Key] = set()

    def source(skip: set[Key]) -> Iterator[Piece]:
        for piece in pieces(ARCH):
            if (piece.layer, piece.role) not in skip:
                read.add((piece.layer, piece.role))
                yield piece

    with open_tiers(folder) as (tiers, queues):
        store = WeightStore(plan(), tiers, queues, torch.float32)
        loader = Loader(store, folder / "model", cache_quantized=True)
        loader.load(source)
        loader.check()
        views = [view for _, view in sorted(store.views.items(), key=str)]
        stored = [part.clone() for v in views for part in (v.dense, v.codes, v.parameters) if part is not None]
        quantized = sum(tensor.quantized for tensor in store.plan.all_tensors)
        reused = quantized - sum(placed.quantized for key, placed in loader.placed.items() if key in read)
        store.close()
    return read, reused, stored


@pytest.mark.parametrize("num_whole", [0, 2, 7])
def test_a_kill_beside_the_job_leaves_nothing_that_is_believed_whole(tmp_path: Path, num_whole: int) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    _, _, expected = next_start(undisturbed)
    wanted = whole_files(undisturbed / "model")
    process, deadline = Forked("tests.memory.beside_driver", [str(killed)]), time.monotonic() + 60
    while len(whole_files(killed)) < num_whole or not torn_files(killed) or "ready" not in process.said():
        assert process.poll() is None and time.monotonic() < deadline, process.said()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    found = whole_files(killed / "model")
    assert num_whole <= len(found) < len(wanted) and torn_files(killed)
    assert all(wanted[name] == content for name, content in found.items())
    read, reused, stored = next_start(killed)
    assert reused == len(found), "whole files are used, and no other"
    assert all(torch.equal(*pair) for pair in zip(stored, expected, strict=True))
    assert whole_files(killed / "model") == wanted and not torn_files(killed)
    assert len(read) == len(plan().all_tensors) - len(found)
