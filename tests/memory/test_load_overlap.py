"""What goes on at the same time in a load, and what happens once: each test waits for two things to meet."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexbatch.memory import conversion, layer_files, load_stages, reused_files
from flexbatch.memory.conversion import Converter
from flexbatch.memory.file_writer import FILE_WRITERS
from flexbatch.memory.load_buffers import LoadBuffers
from flexbatch.memory.load_stages import LoadStages
from flexbatch.memory.loading import Loader
from flexbatch.memory.weight_plan import PlacedTensor, plan_weights
from flexbatch.memory.weights import WeightStore
from flexbatch.models.specs import Piece
from flexbatch.policy.policy import Split
from tests.memory.rigs import open_tiers, pieces
from tests.memory.test_loading import ARCH, DISK, MIXED_IN_MEMORY, loaded, same_weights


def test_several_files_are_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that syncing one does not leave the disk idle."""
    write, together, met = layer_files.write_atomically, threading.Barrier(FILE_WRITERS, timeout=20), list[int]()

    def meeting(path: Path, tensors, num_bytes: int, pool: ThreadPoolExecutor) -> None:
        if not met:
            together.wait()
            met.append(1)
        write(path, tensors, num_bytes, pool)

    monkeypatch.setattr(layer_files, "write_atomically", meeting)
    with open_tiers(tmp_path) as (tiers, queues):
        store = WeightStore(plan_weights(ARCH, DISK, 8, 8, 4), tiers, queues, torch.float32)
        loader = Loader(store, tmp_path, cache_quantized=True)
        loader.budget.most_bytes = 1 << 20  # so that several wait
        loader.load(lambda skip: pieces(ARCH))
        assert met and same_weights(store, 8) and loader.stages.seconds[load_stages.FILE] > 0
        store.close()


def test_what_has_no_file_is_read_beside_what_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(tmp_path, MIXED_IN_MEMORY, 8) as (store, _):
        quantized = {(t.spec.layer, t.spec.role) for t in store.plan.all_tensors if t.quantized}
    from_checkpoint, open_file = threading.Event(), reused_files.open_layer_file

    def late(*arguments):
        assert from_checkpoint.wait(20), "files came first"
        return open_file(*arguments)

    def stream(skip: set[tuple[int, str]]) -> Iterator[Piece]:
        assert skip == quantized
        for piece in pieces(ARCH):  # and what is to be skipped, as adapters come
            from_checkpoint.set()
            yield piece

    monkeypatch.setattr(reused_files, "open_layer_file", late)
    with loaded(tmp_path, MIXED_IN_MEMORY, 8, stream=stream, threads=2) as (store, _):
        assert same_weights(store, 8)


def test_damaged_files_are_read_from_the_checkpoint_after_the_others(tmp_path: Path) -> None:
    with loaded(tmp_path, MIXED_IN_MEMORY, 8):
        pass
    damaged = sorted(tmp_path.rglob("*down.weight*.bin"))[0]
    content = bytearray(damaged.read_bytes())
    content[5] ^= 1
    damaged.write_bytes(content)
    asked: list[set[tuple[int, str]]] = []

    def stream(skip: set[tuple[int, str]]) -> Iterator[Piece]:
        asked.append(skip)
        yield from pieces(ARCH)

    for threads in (0, 3):
        damaged.write_bytes(content)
        asked.clear()
        with loaded(tmp_path, MIXED_IN_MEMORY, 8, stream=stream, threads=threads) as (store, _):
            assert same_weights(store, 8)
            assert len(asked) == 2 and asked[1] == set(store.views) - {(0, "down.weight")}
        content[5] ^= 1
        assert damaged.read_bytes() == content, "written again"
        content[5] ^= 1


def test_kernels_that_quantize_are_compiled_in_one_thread_for_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = [
        tensor
        for bits in (4, 8)
        for tensor in plan_weights(ARCH, Split(1, 0), bits, 8, 4).all_tensors
        if tensor.quantized
    ]
    zeros, compiled, at_work = torch.zeros, list[tuple[int, int, int]](), threading.Lock()

    def quantized(chunk: Tensor, tensor: PlacedTensor) -> tuple[Tensor, Tensor]:
        assert at_work.acquire(blocking=False), "two threads compile at once"
        time.sleep(0.01)
        compiled.append((chunk.shape[1], tensor.bits, tensor.group))
        at_work.release()
        return chunk, chunk

    monkeypatch.setattr(conversion, "quantized", quantized)
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    converter = Converter(torch.device("cuda"), torch.float32)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(converter.prepare, placed * 5))
    assert sorted(compiled) == sorted({(t.spec.shape[1], t.bits, t.group) for t in placed})
    assert converter.stages.seconds.keys() == {load_stages.COMPILE}


def test_buffers_are_as_long_as_the_largest_where_few_are_in_use() -> None:
    buffers = LoadBuffers(pinned=False)
    buffers.least_bytes = 3 * 4096
    first = buffers.take(5000)
    assert len(first) == 8192 and buffers.used_bytes == 3 * 4096
    buffers.give(first)
    second = buffers.take(9000)
    assert second.data_ptr() == first.data_ptr() and not second[9000:].any()
    buffers.give(second)
    buffers.check()
    buffers.close()


def test_seconds_of_stages_add_up_over_threads() -> None:
    now = [0.0]
    stages = LoadStages(lambda: now[0])
    for step in (1.0, 2.5):
        with stages.timing(load_stages.READ):
            now[0] += step
    with pytest.raises(OSError), stages.timing(load_stages.FILE):
        now[0] += 4
        raise OSError
    assert stages.seconds == {"read": 3.5, "file": 4.0}
