"""When a transfer by several threads fails, none of them is at it any more: its buffer is filled anew, its file closed,
its memory given back."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

from flexbatch.memory.disk_cache import DiskCache
from flexbatch.memory.files import READ_CHUNK_BYTES, DiskFile, OffloadError
from flexbatch.memory.load_threads import LoadThreads
from flexbatch.memory.moving import key_of, read_tensor, write_tensor
from flexbatch.memory.pages import CacheLayout, SequencePages
from flexbatch.memory.read_ahead import read_tensors
from flexbatch.memory.transfer import TransferQueues
from flexbatch.policy.admission import CacheSizes
from tests.memory.rigs import open_tiers

NUM_BYTES = 3 * READ_CHUNK_BYTES
PLACED: Any = SimpleNamespace(num_bytes=NUM_BYTES, offset=0, tier="disk", spec=SimpleNamespace(layer=0, role="up"))


class FailingFile:
    """The first request fails, while another thread is at the second."""

    def __init__(self) -> None:
        self.begun, self.busy = threading.Barrier(2), set[int]()
        self.lock, self.count = threading.Lock(), 0

    def read(self, buffer: torch.Tensor, offset: int) -> None:
        with self.lock:
            number, self.count = self.count, self.count + 1
        if number < 2:
            self.begun.wait(60)
        if number == 0:
            raise OffloadError(5, "the disk is gone")
        self.busy.add(number)
        time.sleep(0.1)
        buffer.zero_()
        self.busy.discard(number)

    write = read


def weights_of_a_pass(file: Any, queues: TransferQueues, folder: Path) -> None:
    read_tensors([(file, PLACED)], torch.empty(NUM_BYTES, dtype=torch.uint8), queues.disk_chunks)


def store_of(file: Any, queues: TransferQueues) -> Any:
    tensors = SimpleNamespace(make_file=lambda key, num_bytes: file)
    return SimpleNamespace(queues=queues, files={key_of(PLACED): file}, tensors=tensors)


def weights_that_move_from_the_disk(file: Any, queues: TransferQueues, folder: Path) -> None:
    read_tensor(store_of(file, queues), PLACED)


def weights_that_move_to_the_disk(file: Any, queues: TransferQueues, folder: Path) -> None:
    write_tensor(store_of(file, queues), PLACED, torch.empty(NUM_BYTES, dtype=torch.uint8))


def pages_of_the_cache(file: Any, queues: TransferQueues, folder: Path) -> None:
    layout = CacheLayout(1, 1, 3, 16, 64, 4, torch.float32)
    with open_tiers(folder) as (tiers, _):
        cache = DiskCache(layout, CacheSizes(0, 0, 8, 0, 1, 16), tiers)
        location = SequencePages("disk", (0, 2, 4), tail_slot=cache.open(12))  # none lies behind another
        own, cache.file = cache.file, file
        try:
            cache.read([(location, 12)], 0, torch.empty(3, layout.page_bytes, dtype=torch.uint8), queues.disk_chunks)
        finally:
            cache.file = own
            cache.close()


@pytest.mark.parametrize(
    "transfer",
    [weights_of_a_pass, weights_that_move_from_the_disk, weights_that_move_to_the_disk, pages_of_the_cache],
    ids=lambda each: each.__name__,
)
def test_no_thread_is_at_a_transfer_that_has_failed(
    tmp_path: Path, transfer: Callable[[DiskFile, TransferQueues, Path], None]
) -> None:
    with open_tiers(tmp_path) as (_, queues):
        file: Any = FailingFile()
        with pytest.raises(OffloadError, match="the disk is gone"):
            transfer(file, queues, tmp_path)
        assert not file.busy


def test_threads_of_a_load_are_waited_for_though_ctrl_c_comes_while_they_are(tmp_path: Path) -> None:
    """Up to Python 3.12 a thread whose joining was interrupted passes for one that has ended."""
    threads, main = LoadThreads(torch.device("cpu"), 1), threading.main_thread().ident
    finishing, interrupted, written = threading.Event(), threading.Event(), threading.Event()
    assert main is not None

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    def write() -> None:
        assert finishing.wait(60)
        time.sleep(0.05)
        while not interrupted.wait(0.02):
            signal.pthread_kill(main, signal.SIGUSR1)
        time.sleep(0.1)
        written.set()

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threads.run(write, 1)
        with pytest.raises(KeyboardInterrupt):
            finishing.set()
            threads.finish()
        threads.close(dropped=True)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert written.is_set()
