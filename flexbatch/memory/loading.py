"""From a checkpoint's stream of tensors to their tiers: read, converted, and written to files beside each other."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from flexbatch.memory.conversion import Converter
from flexbatch.memory.file_writer import FileWriter
from flexbatch.memory.files import DiskFile, align
from flexbatch.memory.layer_files import open_layer_file
from flexbatch.memory.load_buffers import ByteBudget, LoadBuffers
from flexbatch.memory.load_meter import LoadMeter
from flexbatch.memory.load_threads import THREADS, LoadThreads
from flexbatch.memory.tensor_views import TensorView, view_of
from flexbatch.memory.weight_plan import PlacedTensor
from flexbatch.memory.weights import WeightStore
from flexbatch.models.checkpoint import CheckpointError, Piece, QuantizedPiece
from flexbatch.policy.limits import DISK_THREADS

FILE_BYTES = 1 << 30
"""Of tensors that wait to be written to the offload folder, or are being read from there: at most, and no more than the
budget of host memory leaves beside the weights, or than a sixteenth of these (one tensor in any case)."""
FILE_THREADS = 8
"""That read, write and digest chunks of files, where there are as many cores: SHA-256 takes 0.7 s per GiB."""

Key = tuple[int, str]


class Loader:
    """Writes pieces to their tiers; converted tensors of the disk tier (and quantized ones, with ``cache_quantized``)
    become files that later runs reuse.

    Three things go on at once. The caller's thread reads the pieces, `LoadThreads` convert them, and a `FileWriter`
    writes the tensors that are whole. What waits between them is bounded in bytes. ``check_source`` is called before a
    tensor becomes a file, and raises when its pieces are no longer those of the checkpoint that ``folder`` is named
    after. A ``folder`` that is a future holds no files yet.
    """

    def __init__(
        self,
        store: WeightStore,
        folder: Path | Future[Path] | None,
        cache_quantized: bool,
        check_source: Callable[[], None] = lambda: None,
        threads: int | None = None,
    ) -> None:
        """threads: that convert pieces (None: `THREADS` with a GPU; 0: the caller's)."""
        self.store, self.folder, self.check_source = store, folder, check_source
        tensors = store.plan.all_tensors
        self.placed: dict[Key, PlacedTensor] = {(tensor.spec.layer, tensor.spec.role): tensor for tensor in tensors}
        self.cache_quantized = cache_quantized and folder is not None
        self.building: dict[Key, tuple[Tensor, TensorView]] = {}
        self.rows_written: dict[Key, int] = {}
        self.converter = Converter(store.device, store.dtype)
        self.reused_bytes = self.read_bytes = 0
        """Bytes of the tensors that came from files of earlier runs, as they are stored; those of the others, as they
        are in the checkpoint."""
        cores = len(os.sched_getaffinity(0))
        self.num_threads = (min(THREADS, cores) if store.device.type == "cuda" else 0) if threads is None else threads
        self.num_file_threads = max(DISK_THREADS, min(FILE_THREADS, cores))
        host, whole = store.tiers.cpu, sum(placed.num_bytes for placed in self.placed.values())
        self.budget = ByteBudget(min(FILE_BYTES, whole // 16, max(0, host.budget_bytes - host.total_used_bytes)))
        self.buffers = LoadBuffers(pinned=store.device.type == "cuda")
        self._lock = threading.Lock()

    def filed(self, placed: PlacedTensor) -> bool:
        """Whether this tensor has a file in the offload folder."""
        return placed.tier == "disk" or (self.cache_quantized and placed.quantized)

    def load(self, stream: Callable[[set[Key]], Iterator[Piece | QuantizedPiece]]) -> int:
        """Read what is not there yet; ``stream(skip)`` yields the pieces of all other tensors. Returns the bytes
        that came from the checkpoint."""
        meter = LoadMeter(sum(placed.num_bytes for placed in self.placed.values()))
        pool = ThreadPoolExecutor(self.num_file_threads, thread_name_prefix="flexbatch-chunks")
        with contextlib.closing(meter), contextlib.closing(self.buffers), pool:
            reused = self.reuse(pool, meter)
            if len(reused) < len(self.placed):
                meter.to_file_bytes = sum(
                    placed.num_bytes for key, placed in self.placed.items() if key not in reused and self.filed(placed)
                )
                self.read(stream(reused), pool, meter)
            meter.check()
        self.converter.warn_of_losses(self.placed)
        missing = [
            key
            for key, placed in self.placed.items()
            if key not in reused and self.rows_written.get(key, 0) < placed.spec.shape[0]
        ]
        if missing:
            raise CheckpointError(
                f"incomplete weights: {missing[:5]}{' ...' if len(missing) > 5 else ''} were not delivered in full"
            )
        return self.read_bytes

    # From files

    def reuse(self, pool: ThreadPoolExecutor, meter: LoadMeter) -> set[Key]:
        """Use the files of earlier runs, several at a time; returns the keys that need not be read from the
        checkpoint."""
        folder = self.folder
        if not isinstance(folder, Path):
            return set()
        wanted = [key for key, placed in self.placed.items() if self.filed(placed)]
        threads, found = LoadThreads(self.store.device, DISK_THREADS), set[Key]()

        def reuse_file(key: Key) -> None:
            placed = self.placed[key]
            if self.reuse_file(folder, key, placed, pool):
                threads.wait_for_device()
                found.add(key)
                meter.reused(placed.num_bytes)

        try:
            for key in wanted:
                threads.run(partial(reuse_file, key), 0)
        except BaseException:
            threads.close(dropped=True)
            raise
        threads.close()
        self.reused_bytes = sum(self.placed[key].num_bytes for key in found)
        return found

    def reuse_file(self, folder: Path, key: Key, placed: PlacedTensor, pool: ThreadPoolExecutor) -> bool:
        """Whether an earlier run's file of this tensor was found and used."""
        if placed.tier == "disk":
            file = open_layer_file(folder, placed, pool)
            if file is not None:
                self.store.files[key] = file
            return file is not None
        self.budget.take(align(placed.num_bytes))
        data = self.buffers.take(placed.num_bytes)
        try:
            file = open_layer_file(folder, placed, pool, data)
            if file is None:
                return False
            file.close()
            self.store.views[key].copy_codes(view_of(data, placed, 0, self.store.dtype))
            return True
        finally:
            self.buffers.give(data)
            self.budget.give(align(placed.num_bytes))

    # From the checkpoint

    def read(self, pieces: Iterator[Piece | QuantizedPiece], pool: ThreadPoolExecutor, meter: LoadMeter) -> None:
        """Bring all pieces to their tiers, and the tensors that have files into these."""
        threads = LoadThreads(self.store.device, self.num_threads)
        writer = (
            None if self.folder is None else FileWriter(self.path, self.budget, self.buffers, pool, self.written(meter))
        )
        try:
            for piece in pieces:
                threads.run(partial(self.write, piece, threads, writer, meter), piece.num_bytes)
            threads.close()
            if writer is not None:
                writer.finish()
        except BaseException as error:
            # What was whole before a fault of the checkpoint is of use to the next start; Ctrl-C does not wait for it.
            dropped = not isinstance(error, Exception)
            threads.close(dropped=True)
            if writer is not None:
                writer.close(dropped)
            raise
        if writer is not None:
            writer.close()

    def path(self) -> Path:
        """The folder of the files, once it is known."""
        assert self.folder is not None
        return self.folder.result() if isinstance(self.folder, Future) else self.folder

    def written(self, meter: LoadMeter) -> Callable[[PlacedTensor, DiskFile], None]:
        """What becomes of a file that was written: it stays open where the tensor is placed on disk."""

        def keep(placed: PlacedTensor, file: DiskFile) -> None:
            if placed.tier == "disk":
                self.store.files[placed.spec.layer, placed.spec.role] = file
            else:
                file.close()
            meter.filed(placed.num_bytes)

        return keep

    def write(
        self, piece: Piece | QuantizedPiece, threads: LoadThreads, writer: FileWriter | None, meter: LoadMeter
    ) -> None:
        """Write one piece, and hand over the tensor that is complete with it."""
        key = (piece.layer, piece.role)
        placed = self.placed[key]
        num_rows = placed.spec.shape[0]
        rows = piece.rows or slice(0, num_rows)
        self.converter.write(piece, self.target(key, placed), rows)
        threads.wait_for_device()
        count = rows.stop - rows.start
        with self._lock:
            self.rows_written[key] = self.rows_written.get(key, 0) + count
            self.read_bytes += piece.num_bytes
            complete = self.rows_written[key] >= num_rows
        meter.loaded(placed.num_bytes * count / num_rows, piece.num_bytes)
        if complete and writer is not None and self.filed(placed):
            self.file(key, placed, writer)

    def target(self, key: Key, placed: PlacedTensor) -> TensorView:
        """The view to write into: the tensor on its tier, or a buffer for a tensor that becomes a file."""
        if placed.tier != "disk":
            return self.store.views[key]
        with self._lock:
            if key not in self.building:
                buffer = self.buffer_of(placed)
                self.building[key] = (buffer, view_of(buffer, placed, 0, self.store.dtype))
            return self.building[key][1]

    def buffer_of(self, placed: PlacedTensor) -> Tensor:
        """For the content of a tensor: what no number fills is zero, so that equal tensors are equal files."""
        buffer = self.buffers.take(placed.num_bytes)
        if placed.quantized:
            buffer[math.prod(placed.codes_shape) : placed.codes_bytes] = 0
        return buffer

    def file(self, key: Key, placed: PlacedTensor, writer: FileWriter) -> None:
        """Have a complete tensor written to its file."""
        writer.reserve(placed)
        try:
            if placed.tier == "disk":
                with self._lock:
                    buffer, _ = self.building.pop(key)
            else:
                buffer = self.buffer_of(placed)
                view_of(buffer, placed, 0, self.store.dtype).copy_codes(self.store.views[key])
            self.check_source()
        except BaseException:
            self.budget.give(align(placed.num_bytes))
            raise
        writer.submit(placed, buffer)

    def check(self) -> None:
        """Invariants: no row is delivered twice; only unfinished tensors of the disk tier are held in memory."""
        for key, rows in self.rows_written.items():
            assert rows <= self.placed[key].spec.shape[0], (key, rows)
        for key in self.building:
            assert self.placed[key].tier == "disk" and key not in self.store.files, key
        assert self.budget.used_bytes == 0, self.budget.used_bytes
        self.budget.check()
        self.buffers.check()
