"""Copies from pageable memory: the same numbers as `Tensor.copy_`, whatever the sizes, forms and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexbatch.memory import staging
from flexbatch.memory.staging import SMALL_BYTES, STAGED_BYTES, Staging
from flexbatch.memory.tiers import HostArena


def sources(folder: Path) -> list[Tensor]:
    """Small, of several parts, of a mapped file from an odd row on, not dense, of another dtype."""
    torch.manual_seed(0)
    whole = torch.randn(2 * STAGED_BYTES // 2 + 12_345).bfloat16()
    whole.view(torch.int16).numpy().tofile(folder / "mapped")
    mapped = torch.from_file(str(folder / "mapped"), size=len(whole), dtype=torch.bfloat16)
    return [
        torch.randn(7, 3).bfloat16(),
        whole,
        mapped[333 : 333 + 1100 * 1024].view(1100, 1024),
        torch.randn(1500, 900).bfloat16().t(),
        torch.randn(1024, 700),
    ]


def copied(device: str, folder: Path) -> None:
    staging = Staging(torch.device("cuda"))
    wanted = sources(folder)

    def copy(source: Tensor) -> None:
        target = torch.full(source.shape, 7.0, dtype=torch.bfloat16, device=device)
        assert staging.copy(target, source) is target
        assert torch.equal(target.cpu(), source.bfloat16())

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(copy, wanted * 4))
    staging.close()


def test_copies_to_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(source.nbytes > SMALL_BYTES for source in sources(tmp_path))
    copied("cpu", tmp_path)
    monkeypatch.setattr(staging, "POPULATE_READ", 12345)  # a system that does not know it
    copied("cpu", tmp_path)


def test_parts_go_by_turns_through_two_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As to a GPU, whose events and pinned memory are stood in for."""
    recorded: list[int] = []

    class Event:
        def record(self) -> None:
            recorded.append(id(self))

        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(staging, "HostArena", lambda num_bytes, pinned: HostArena(num_bytes, pinned=False))
    through = Staging(torch.device("cpu"))
    for source in sources(tmp_path):
        if source.is_contiguous():
            target = torch.full(source.shape, 7.0, dtype=torch.bfloat16)
            through._send(target, source)
            assert torch.equal(target, source.bfloat16())
    assert len(set(recorded)) == 2 < len(recorded)
    assert all(first != second for first, second in pairwise(recorded))
    through.close()


@pytest.mark.gpu
def test_copies_to_a_gpu(tmp_path: Path) -> None:
    copied("cuda", tmp_path)
    staging = Staging(torch.device("cuda"))
    for source in sources(tmp_path):
        there = staging.to_device(source)
        assert there.is_cuda and there.dtype == source.dtype and torch.equal(there.cpu(), source)
    staging.close()
