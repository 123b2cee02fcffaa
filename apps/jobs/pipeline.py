"""Runs a job: reading, making and tokenizing prompts, generating, and writing overlap, each in its own thread.

``reader -> tables -> preparer -> sorted rows -> engine (the calling thread) -> outcomes -> writer``, through bounded
channels, so memory does not grow with the input. Nothing waits for the end of a row group or a part: the engine's block
is refilled as long as there are rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.channel import Canceled, Channel
from flexbatch.apps.jobs.commits import Commit
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.plan import BatchJob
from flexbatch.apps.jobs.progress import Counts
from flexbatch.apps.jobs.prompts import RowError
from flexbatch.apps.jobs.results import RowRecord
from flexbatch.apps.jobs.rows import Encode, RowRequest
from flexbatch.apps.jobs.sort_buffer import order_rows
from flexbatch.apps.jobs.sources import read_parts
from flexbatch.apps.jobs.store import OutputStore
from flexbatch.cli.interrupt import Interrupts
from flexbatch.request import Completion, SamplingParams

SYNC_S = 5.0
"""Journal records reach the disk within this time, whether another row comes or not, plus the time in which a part is
written; until then a machine that loses power may lose them, a process that dies may not."""
OUTCOMES_WAITING = 4096


class OutputError(OSError):
    """The output cannot be written any more: the disk is full, or a network file system is gone."""


class TooManyErrors(RuntimeError):
    """More rows failed than --max-errors allows."""


@dataclass
class OpenPart:
    """A part with rows to do. ``records`` fills up in any order; ``left`` counts its gaps and belongs to the writer."""

    part: Part
    table: pa.Table
    records: list[RowRecord]
    left: int


Outcome = tuple[OpenPart, RowRequest | None, Sequence[Completion] | None]
"""What the writer gets: a row with the completions of its prompts, or with an error of its own. Without a row it only
commits the part."""


class RowCompletions:
    """The completions of rows whose prompts end in any order, until a row has all of its own."""

    def __init__(self) -> None:
        self._found: dict[int, dict[int, tuple[RowRequest, Completion]]] = {}

    def add(self, request: RowRequest, completion: Completion) -> tuple[RowRequest, list[Completion]] | None:
        """Returns the row and its completions, with the last of them."""
        found = self._found.setdefault(request.index, {})
        found[request.number] = request, completion
        if len(found) < request.prompts:
            return None
        requests, completions = zip(*(found[number] for number in range(request.prompts)), strict=True)
        del self._found[request.index]
        return dataclasses.replace(requests[0], others=requests[1:]), list(completions)


@dataclass
class Pipeline:
    """One run of a job over ``parts`` (any iterable, drawn one at a time in the order of the input).

    ``finished`` holds the records of earlier runs per part. ``max_errors`` counts the whole shard. `run` returns
    when everything is committed or, after the first Ctrl-C, when the sequences in flight have ended.
    """

    job: BatchJob
    parts: Iterable[Part]
    finished: dict[int, dict[int, RowRecord]]
    store: OutputStore
    encode: Encode
    counts: Counts
    interrupts: Interrupts
    max_errors: int | None = None
    on_commit: Callable[[Part], None] | None = None
    _tables: Channel[tuple[Part, pa.Table]] = field(default_factory=lambda: Channel(2))
    _sorted: Channel[list[RowRequest]] = field(default_factory=lambda: Channel(2))
    _outcomes: Channel[Outcome] = field(default_factory=lambda: Channel(OUTCOMES_WAITING))
    _failure: BaseException | None = None
    _sync_due: float | None = None
    _open: dict[int, OpenPart] = field(default_factory=dict)
    _ends: list[threading.Event] = field(default_factory=list)

    def run(self, engine: Any) -> None:
        """Runs the job. Raises SourceError (input gone or damaged; what was in flight is finished first),
        OutputError, TakenOver, TooManyErrors, KeyboardInterrupt, and what the engine raises. In every case the
        finished rows are in the journal and the whole parts are committed."""
        in_flight: dict[int, RowRequest] = {}
        rows = RowCompletions()
        # Twice: whatever breaks off the first end, such as the last interrupt, must not leave the writer behind. Its
        # store is closed next, and rows that wait for it would be lost.
        with self._ending(), self._ending():
            self._start()
            with contextlib.suppress(Canceled):
                for key, completion in engine.stream(self._items(in_flight)):
                    whole = rows.add(in_flight.pop(key), completion)
                    if whole is not None:
                        self._outcomes.put((self._open[whole[0].part], *whole))
        if self._failure is not None:
            raise self._failure

    def _start(self) -> None:
        def work(target: Callable[[], None], ended: threading.Event) -> None:
            try:
                target()
            finally:
                ended.set()

        for target in (self._read, self._prepare, self._write):
            ended = threading.Event()
            threading.Thread(target=work, args=(target, ended), name=target.__name__.strip("_"), daemon=True).start()
            self._ends.append(ended)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """After the body nothing more is read, and everything that has an outcome is written."""
        try:
            yield
        finally:
            self._tables.cancel()
            self._sorted.cancel()
            self._outcomes.close()
            # Not `Thread.join`: up to Python 3.12 one that was interrupted takes the thread for ended.
            for ended in self._ends:
                ended.wait()

    @property
    def unfinished(self) -> list[Commit]:
        """What is finished of the parts that were begun and are not committed."""
        rows = {number: [row for row in part.records if row is not None] for number, part in self._open.items()}
        return [Commit.of(number, records, self.job.output) for number, records in rows.items() if records]

    def _read(self) -> None:
        def wanted() -> Iterator[Part]:
            for part in self.parts:
                if self.interrupts.draining.is_set():
                    return
                yield part

        self._produce(self._tables, read_parts(self.job.source, wanted()))

    @staticmethod
    def _produce(channel: Channel[Any], values: Iterator[Any]) -> None:
        try:
            for value in values:
                channel.put(value)
        except Canceled:
            channel.close()
        except BaseException as error:
            channel.close(error)
        else:
            channel.close()

    def _prepare(self) -> None:
        self._produce(self._sorted, self._sort_buffers())
        self._tables.cancel()

    def _sort_buffers(self) -> Iterator[list[RowRequest]]:
        """Yields the encoded rows, as many at a time as are ordered among each other."""
        buffer: list[RowRequest] = []
        failure: BaseException | None = None
        try:
            for part, table in self._tables:
                for row in self._encoded(part, table):
                    buffer.append(row)
                    if len(buffer) >= self.job.config.window_rows:
                        yield self._ordered(buffer)
                        buffer = []
        except Exception as error:
            failure = error
        if buffer:
            yield self._ordered(buffer)
        if failure is not None:
            raise failure

    def _encoded(self, part: Part, table: pa.Table) -> Iterator[RowRequest]:
        """Yields the encoded requests of the rows of a part that are left to do. Rows with an error go straight to the
        writer."""
        finished = self.finished.pop(part.number, {})
        open_part = OpenPart(part, table, [finished.get(row) for row in range(part.rows)], part.rows - len(finished))
        self._open[part.number] = open_part
        if not open_part.left:
            self._outcomes.put((open_part, None, None))
        for row in self.job.reader.rows(table, part, finished.__contains__):
            if not row.error:
                try:
                    # All of them before the first is handed on: a row has answers to all of its prompts, or an error.
                    yield from [self.encode(request) for request in row.requests]
                    continue
                except RowError as error:
                    row = dataclasses.replace(row, error=str(error))
            self._outcomes.put((open_part, row, None))

    @staticmethod
    def _ordered(rows: list[RowRequest]) -> list[RowRequest]:
        order = order_rows([row.token_ids for row in rows], [row.params.max_tokens or 0 for row in rows])
        return [rows[index] for index in order]

    def _items(
        self, in_flight: dict[int, RowRequest]
    ) -> Iterator[tuple[int, Sequence[int], SamplingParams, str, str | None]]:
        """Yields what the engine draws, with the folder of each row as its source, and its adapter. An input that fails
        ends like an input that is over, so that the sequences in flight are finished."""
        others = itertools.count(-1, -1)
        try:
            for rows in self._sorted:
                for row in rows:
                    if self.interrupts.draining.is_set() or self._failure is not None:
                        return
                    key = next(others) if row.number else row.index
                    in_flight[key] = row
                    yield key, row.token_ids, row.params, self._open[row.part].part.folder, row.lora
        except Exception as error:
            self._failure = self._failure or error

    def _write(self) -> None:
        try:
            for outcome in self._outcomes.until(lambda: self._sync_due):
                if outcome is not None:
                    self._finish(*outcome[0])
                    self._sync_due = self._sync_due or time.monotonic() + SYNC_S
                if self._sync_due is not None and time.monotonic() >= self._sync_due:
                    self.store.sync()
                    self._sync_due = None
            self.store.journal.sync()
        except BaseException as error:
            self._failure = (
                OutputError(error.errno, error.strerror, error.filename or str(self.store.folder))
                if isinstance(error, OSError)
                else error
            )
            self._outcomes.cancel()
            self._sorted.cancel()

    def _finish(self, open_part: OpenPart, row: RowRequest | None, completions: Sequence[Completion] | None) -> None:
        """Records a finished row in the journal, and commits the part whose last row it is."""
        output = self.job.output
        if row is not None:
            record = output.failure(row, row.error) if completions is None else output.record(row, completions)
            self.store.journal.append(open_part.part.number, row.offset, record)
            open_part.records[row.offset] = record
            open_part.left -= 1
            self.counts.rows_not_run += completions is None
            self.counts.add(1, bool(output.error_of(record)), *output.tokens_of(record))
        if open_part.left == 0:
            self.store.commit(open_part.part, open_part.table, open_part.records, output)
            del self._open[open_part.part.number]
            self.counts.parts_committed += 1
            if self.on_commit is not None:
                self.on_commit(open_part.part)
        if row is not None and self.max_errors is not None and self.counts.row_errors > self.max_errors:
            raise TooManyErrors(
                f"{self.counts.row_errors} rows failed, more than the {self.max_errors} that --max-errors allows; "
                f"row {row.index}: {output.error_of(open_part.records[row.offset])}"
            )
