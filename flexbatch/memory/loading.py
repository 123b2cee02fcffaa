"""From a checkpoint's stream of tensors to their tiers: read, converted, and written to files beside each other."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from flexbatch.kernels.threads import usable_processors
from flexbatch.memory.conversion import Converter, parts_of
from flexbatch.memory.file_writer import FILE_WRITERS, FileWriter
from flexbatch.memory.files import DiskFile, align
from flexbatch.memory.load_buffers import ByteBudget, LoadBuffers
from flexbatch.memory.load_meter import LoadMeter
from flexbatch.memory.load_stages import CONVERT, COPY_OUT, READ, WAIT_END, WAIT_THREADS, LoadStages
from flexbatch.memory.load_targets import LoadTargets
from flexbatch.memory.load_threads import PART_BYTES, STAGED_THREADS, THREADS, LoadThreads
from flexbatch.memory.reused_files import ReusedFiles
from flexbatch.memory.weight_plan import PlacedTensor
from flexbatch.memory.weights import WeightStore
from flexbatch.models.checkpoint import CheckpointError, Piece, QuantizedPiece
from flexbatch.policy.limits import DISK_THREADS
from flexbatch.policy.units import size_text

logger = logging.getLogger("flexbatch")

STAGED: bool = True
"""Whether pieces go to a GPU by way of `Staging`; `python -m benchmark.loading --variants` times both."""
BESIDE_JOB: bool = True
"""Whether files for the next start alone are written beside a job that lies on the GPU."""
FILE_BYTES = 1 << 30
"""Of tensors that wait to be written to the offload folder, or are being read from there: at most, and no more than the
budget of host memory leaves beside the weights, or than a sixteenth of these (one tensor in any case)."""
FILE_THREADS = 8
"""That read, write and digest chunks of files, where there are as many cores: SHA-256 takes 0.7 s per GiB."""

NEXT_START = "files for the next start"
"""In the accounts of host memory: the buffer of files that are written beside a job."""

Key = tuple[int, str]
Stream = Callable[[set[Key]], Iterator[Piece | QuantizedPiece]]


class Loader:
    """Writes pieces to their tiers; converted tensors of the disk tier (and quantized ones, with ``cache_quantized``)
    become files that later runs reuse.

    Three things go on at once. The caller's thread reads the pieces, `LoadThreads` convert them, and a `FileWriter`
    writes the tensors that are whole. What waits between them is bounded in bytes. ``check_source`` is called before a
    tensor becomes a file, and raises when its pieces are no longer those of the checkpoint that ``folder`` is named
    after. A ``folder`` that is a future holds no files yet.

    Files that only the next start reads may be written ``beside_job``: `load` does not wait for them, `close` does, and
    until then no tensor may change its place. No tensor may be on the disk tier then.
    """

    def __init__(
        self,
        store: WeightStore,
        folder: Path | Future[Path] | None,
        cache_quantized: bool,
        check_source: Callable[[], None] = lambda: None,
        threads: int | None = None,
        beside_job: bool = False,
    ) -> None:
        """threads: that convert pieces (None: `THREADS` with a GPU; 0: the caller's)."""
        assert not (beside_job and store.plan.tier_bytes("disk")), "a job needs its files"
        self.store, self.folder, self.check_source = store, folder, check_source
        tensors = store.plan.all_tensors
        self.placed: dict[Key, PlacedTensor] = {(tensor.spec.layer, tensor.spec.role): tensor for tensor in tensors}
        self.cache_quantized = cache_quantized and folder is not None
        self.rows_written: dict[Key, int] = {}
        self.stages = LoadStages()
        self.converter = Converter(store.device, store.dtype, STAGED, self.stages)
        self.reused_bytes = self.read_bytes = 0
        """Bytes of the tensors that came from files of earlier runs, as they are stored; those of the others, as they
        are in the checkpoint."""
        cores = usable_processors()
        most = (STAGED_THREADS if STAGED else THREADS) if store.device.type == "cuda" else 0
        self.num_threads = min(most, cores) if threads is None else threads
        self.num_file_threads = max(DISK_THREADS, min(FILE_THREADS, cores))
        host, whole = store.tiers.cpu, sum(placed.num_bytes for placed in self.placed.values())
        self.budget = ByteBudget(min(FILE_BYTES, whole // 16, max(0, host.budget_bytes - host.total_used_bytes)))
        self.buffers = LoadBuffers(pinned=store.device.type == "cuda")
        self.targets = LoadTargets(store, self.buffers)
        self.beside_job = beside_job
        self.writer: FileWriter | None = None
        self._lock, self._open = threading.Lock(), contextlib.ExitStack()

    def filed(self, placed: PlacedTensor) -> bool:
        """Whether this tensor has a file in the offload folder."""
        return placed.tier == "disk" or (self.cache_quantized and placed.quantized)

    def load(self, stream: Stream) -> int:
        """Read what is not there yet; ``stream(skip)`` yields the pieces of all other tensors. Returns the bytes
        that came from the checkpoint."""
        meter = LoadMeter(sum(placed.num_bytes for placed in self.placed.values()))
        with contextlib.ExitStack() as stack:
            stack.callback(self.buffers.close)
            name = "flexbatch-chunks"
            pool = stack.enter_context(ThreadPoolExecutor(self.num_file_threads, thread_name_prefix=name))
            stack.callback(self.finish_files)
            with contextlib.closing(meter), contextlib.closing(self.converter):
                reused = self.deliver(stream, pool, meter, stack)
                meter.check()
            self.check_whole(reused)
            if self.writer is not None:
                self.writer.tell_of_end()
            self._open = stack.pop_all()
        self.converter.warn_of_losses(self.placed)
        return self.read_bytes

    def deliver(
        self, stream: Stream, pool: ThreadPoolExecutor, meter: LoadMeter, stack: contextlib.ExitStack
    ) -> set[Key]:
        """All tensors to their tiers: those that an earlier start left files of from these, and at the same time the
        others from the checkpoint. Returns the keys of the former."""
        filed = {key: placed for key, placed in self.placed.items() if self.filed(placed)}
        folder, everything = self.folder, set(self.placed)
        if not isinstance(folder, Path) or not filed:
            self.read(stream, everything, pool, meter, stack)
            return set()
        files = ReusedFiles(self.store, folder, filed, pool, self.budget, self.buffers, meter, self.stages)
        kept = set(files.wanted)
        with contextlib.closing(files):
            files.begin()
            self.read(stream, everything - kept, pool, meter, stack)
            found = files.finish()
        self.read(stream, kept - found, pool, meter, stack)  # files that were damaged
        self.reused_bytes = sum(self.placed[key].num_bytes for key in found)
        return found

    def check_whole(self, reused: set[Key]) -> None:
        """Raises CheckpointError where a tensor was not delivered in full."""
        missing = [
            key
            for key, placed in self.placed.items()
            if key not in reused and self.rows_written.get(key, 0) < placed.spec.shape[0]
        ]
        if missing:
            raise CheckpointError(
                f"incomplete weights: {missing[:5]}{' ...' if len(missing) > 5 else ''} were not delivered in full"
            )

    def close(self) -> None:
        """Wait for the files that are written beside the job; Ctrl-C leaves out those that are not begun. Closing again
        does nothing."""
        self._open.close()

    def finish_files(self) -> None:
        writer, self.writer = self.writer, None
        if writer is None:
            return
        if writer.error is None and writer.left_bytes > FILE_BYTES:
            left = size_text(writer.left_bytes)
            logger.info("writing the last %s for the next start to the offload folder; Ctrl-C leaves them out", left)
        try:
            writer.finish()
        except Exception as error:  # the job does not need them
            logger.warning("not all weights are kept for the next start: %s", error)
        except BaseException:
            writer.close(dropped=True)
            raise

    # From the checkpoint

    def read(
        self, stream: Stream, wanted: set[Key], pool: ThreadPoolExecutor, meter: LoadMeter, stack: contextlib.ExitStack
    ) -> None:
        """Bring ``wanted`` tensors from the checkpoint to their tiers, and those that have files into these."""
        if not wanted:
            return
        filed = [align(self.placed[key].num_bytes) for key in wanted if self.filed(self.placed[key])]
        threads, writer = LoadThreads(self.store.device, self.num_threads), self.open_writer(filed, pool, meter, stack)
        try:
            self.convert(stream(set(self.placed) - wanted), wanted, threads, writer, meter)
            threads.finish()
            if writer is not None and not self.beside_job:
                with self.stages.timing(WAIT_END):
                    writer.finish()
        except BaseException as error:
            # What was whole before a fault of the checkpoint is of use to the next start; Ctrl-C does not wait for it.
            dropped = not isinstance(error, Exception)
            threads.close(dropped=True)
            self.writer = None
            if writer is not None:
                writer.close(dropped)
            raise

    def open_writer(
        self, filed: list[int], pool: ThreadPoolExecutor, meter: LoadMeter, stack: contextlib.ExitStack
    ) -> FileWriter | None:
        """For files of so many bytes each; beside a job one for all of them, and its buffers accounted for."""
        if self.folder is None or not filed:
            return None
        if self.writer is not None:
            return self.writer
        files = self.budget, self.buffers, pool
        writer = FileWriter(self.folder, self.store.device, *files, self.written(meter), self.stages)
        if self.beside_job:
            self.buffers.least_bytes = largest = max(filed)
            self.store.tiers.cpu.reserve(NEXT_START, FILE_WRITERS * largest)
            stack.callback(self.store.tiers.cpu.free, NEXT_START)
            self.writer = writer
        else:
            meter.to_file_bytes += sum(filed)
        return writer

    def convert(
        self,
        pieces: Iterator[Piece | QuantizedPiece],
        wanted: set[Key],
        threads: LoadThreads,
        writer: FileWriter | None,
        meter: LoadMeter,
    ) -> None:
        while (piece := self.next_piece(pieces)) is not None:
            if (piece.layer, piece.role) not in wanted:  # adapters come whatever is skipped
                continue
            for part in parts_of(piece, PART_BYTES) if self.num_threads else (piece,):
                work = partial(self.write, part, threads, writer, meter)
                if self.num_threads:
                    with self.stages.timing(WAIT_THREADS):
                        threads.run(work, part.num_bytes)
                else:
                    work()

    def next_piece(self, pieces: Iterator[Piece | QuantizedPiece]) -> Piece | QuantizedPiece | None:
        with self.stages.timing(READ):
            return next(pieces, None)

    def written(self, meter: LoadMeter) -> Callable[[PlacedTensor, DiskFile], None]:
        """What becomes of a file that was written: it stays open where the tensor is placed on disk."""

        def keep(placed: PlacedTensor, file: DiskFile) -> None:
            if placed.tier == "disk":
                self.store.files[placed.spec.layer, placed.spec.role] = file
            else:
                file.close()
            if not self.beside_job:
                meter.filed(align(placed.num_bytes))

        return keep

    def write(
        self, piece: Piece | QuantizedPiece, threads: LoadThreads, writer: FileWriter | None, meter: LoadMeter
    ) -> None:
        """Write one piece, and hand over the tensor that is complete with it."""
        key = (piece.layer, piece.role)
        placed = self.placed[key]
        num_rows = placed.spec.shape[0]
        rows = piece.rows or slice(0, num_rows)
        self.converter.write(piece, self.targets.of(key, placed), rows)
        with self.stages.timing(CONVERT):
            threads.wait_for_device()
        count = rows.stop - rows.start
        with self._lock:
            self.rows_written[key] = self.rows_written.get(key, 0) + count
            self.read_bytes += piece.num_bytes
            complete = self.rows_written[key] >= num_rows
        meter.loaded(placed.num_bytes * count / num_rows, piece.num_bytes)
        if complete and writer is not None and self.filed(placed):
            self.file(key, placed, writer)

    def file(self, key: Key, placed: PlacedTensor, writer: FileWriter) -> None:
        """Have a complete tensor written to its file."""
        if self.beside_job:
            self.check_source()
            writer.submit_placed(placed, partial(self.targets.content_of, key, placed))
            return
        writer.reserve(placed)
        try:
            with self.stages.timing(COPY_OUT):
                buffer = self.targets.content_of(key, placed)
            self.check_source()
        except BaseException:
            self.budget.give(align(placed.num_bytes))
            raise
        writer.submit(placed, buffer)

    def check(self) -> None:
        """Invariants: no row is delivered twice, and what was taken is given back."""
        for key, rows in self.rows_written.items():
            assert rows <= self.placed[key].spec.shape[0], (key, rows)
        self.targets.check()
        assert self.budget.used_bytes == 0, self.budget.used_bytes
        self.budget.check()
        self.buffers.check()
