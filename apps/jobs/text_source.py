"""Files of text. One pass before the job finds the row counts and a digest; the job then streams them like Parquet.
Lines are read in chunks of whole lines; CSV finds its rows in another way (`csv_source`).

A row that cannot be read, such as a line that is not JSON, is null in every column, and the column `ROW_ERROR` says
why.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, cast

import pyarrow as pa
import pyarrow.fs as pafs

from flexbatch.apps.jobs.columns import ROW_ERROR
from flexbatch.apps.jobs.files import COMPRESSED, InputFile, SourceError
from flexbatch.apps.jobs.layout import RowGroup
from flexbatch.apps.jobs.unchanged import Unchanged
from flexbatch.text.files import UTF8_MARK, without_mark
from flexbatch.validation.errors import ConfigurationError

CHUNK_BYTES = 4 * 2**20
MAX_LINE = 64 * 2**20
"""The longest line of JSON in bytes, and the longest line and cell of CSV in characters."""
UNREADABLE = (pa.ArrowException, OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file: bytes [start, stop) of its uncompressed text, beginning with line ``first_line`` (from
    0); or one line that is too long."""

    path: str
    start: int
    stop: int
    first_line: int
    too_long: bool = False


def chunks_of(
    stream: BinaryIO, path: str, chunk_bytes: int = CHUNK_BYTES, max_line: int = MAX_LINE
) -> Iterator[tuple[Chunk, bytes]]:
    """Cuts a file at line ends, about ``chunk_bytes`` at a time; a longer line is one chunk, and one longer than
    ``max_line`` is a chunk without data."""
    start, line, pending = 0, 0, bytearray()
    while True:
        data = stream.read(chunk_bytes)
        last = data.rfind(b"\n")
        end = len(pending) if not data else 0 if last < 0 else len(pending) + last + 1
        pending += data
        if end:
            yield Chunk(path, start, start + end, line), bytes(pending[:end])
            start, line = start + end, line + pending.count(b"\n", 0, end)
            del pending[:end]
        if not data:
            return
        if len(pending) > max_line:
            length, pending = _skip_line(stream, len(pending), chunk_bytes)
            yield Chunk(path, start, start + length, line, too_long=True), b""
            start, line = start + length, line + 1


def _skip_line(stream: BinaryIO, length: int, chunk_bytes: int) -> tuple[int, bytearray]:
    """Returns (length of a line of which ``length`` bytes are read, what was read after it)."""
    while data := stream.read(chunk_bytes):
        end = data.find(b"\n") + 1
        if end:
            return length + end, bytearray(data[end:])
        length += len(data)
    return length, bytearray()


class DigestingStream(io.RawIOBase):
    """The uncompressed bytes of a text file that is read as a whole, and their digest.

    Reading raises ConfigurationError for a file that says by its byte order mark that it is not UTF-8.
    """

    def __init__(self, filesystem: pafs.FileSystem, file: InputFile) -> None:
        self._stream, self._name = cast(BinaryIO, filesystem.open_input_stream(file.path)), file.name
        self._digest, self._began, self.num_bytes = hashlib.sha256(), False, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        if not self._began:
            without_mark(data, self._name)
            self._began = True
        self._digest.update(data)
        self.num_bytes += len(data)
        buffer[: len(data)] = data
        return len(data)

    def digest(self) -> str:
        return self._digest.hexdigest()[:16]

    def close(self) -> None:
        self._stream.close()
        super().close()


@dataclass(frozen=True)
class TextDigest:
    """What a text file held in the pass before the job."""

    num_bytes: int
    digest: str

    @classmethod
    def of(cls, stream: DigestingStream) -> TextDigest:
        """Of what was read of the stream."""
        return cls(stream.num_bytes, stream.digest())

    def begins(self, filesystem: pafs.FileSystem, file: InputFile) -> bool:
        """Returns whether the file begins with the same text. Raises ConfigurationError, OSError."""
        try:
            with contextlib.closing(DigestingStream(filesystem, file)) as stream:
                while stream.num_bytes < self.num_bytes:
                    if not stream.read(min(self.num_bytes - stream.num_bytes, CHUNK_BYTES)):
                        return False
                return TextDigest.of(stream) == self
        except (pa.ArrowException, EOFError, zlib.error):
            return False


def record_batch(columns: Sequence[pa.Array], errors: Sequence[str | None], schema: pa.Schema) -> pa.RecordBatch:
    """Returns rows of a source as a batch. Its schema has a column for their errors where the pass before the job
    has found one."""
    whole = [*columns, pa.array(errors, pa.string())] if ROW_ERROR in schema.names else list(columns)
    return pa.RecordBatch.from_arrays(whole, schema=schema)


class PackedText:
    """One compressed file at a time, open where it was read last: unpacked from its beginning for every chunk, a file
    of 4 GB of text, a thousand chunks, would be unpacked 500 times."""

    def __init__(self, filesystem: pafs.FileSystem, unchanged: Unchanged) -> None:
        self._filesystem, self._unchanged = filesystem, unchanged
        self._stream: BinaryIO | None = None
        self._path, self._at = "", 0

    def read(self, chunk: Chunk, file: InputFile) -> bytes:
        """Returns the text of a chunk. Raises SourceError, OSError, and EOFError for a file that has become shorter."""
        if self._stream is None or self._path != chunk.path or self._at > chunk.start:
            self.close()
            self._stream = cast(BinaryIO, self._filesystem.open_input_stream(chunk.path))
            self._path, self._at = chunk.path, 0
            self._unchanged.opened(file)
        try:
            while self._at < chunk.start:
                self._take(min(chunk.start - self._at, CHUNK_BYTES))
            data = self._take(chunk.stop - chunk.start)
            self._unchanged.read(file)
            return data
        except BaseException:
            self.close()
            raise

    def _take(self, num_bytes: int) -> bytes:
        assert self._stream is not None
        data = self._stream.read(num_bytes)
        if not data:
            raise EOFError("the file is shorter than at the start of the job")
        self._at += len(data)
        return data

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class LinesSource(abc.ABC):
    """A source with one row for every line that is not blank. A subclass defines how a line is parsed, what the pass
    before the job learns of the rows, and the columns that they make. Raises ConfigurationError where no row can be
    read."""

    format: ClassVar[str]
    empty: ClassVar[type]
    """Makes the row of a line that is too long to be read."""
    schema: pa.Schema

    def __init__(self, filesystem: pafs.FileSystem, files: Sequence[InputFile], max_line: int = MAX_LINE) -> None:
        """max_line: bytes. What is longer is never held, and its row is an error."""
        self._filesystem, self._max_line = filesystem, max_line
        self._packed: PackedText | None = None
        self._by_path = {file.path: file for file in files}
        self._digests: dict[str, TextDigest] = {}
        self._unchanged = Unchanged(filesystem, files, self._is_same)
        self._chunks: list[Chunk] = []
        self._first_error = ""
        self.row_groups: list[RowGroup] = []
        self.identity: dict[str, Any] = {"format": self.format, "files": {}}
        for file in files:
            self._scan_file(file)
        self.error_columns = [pa.field(ROW_ERROR, pa.string())] if self._first_error else []

    def parse(self, line: bytes, number: int, name: str) -> tuple[Any, str | None]:
        """Returns the row of line ``number`` (from 1) of the file ``name``, by default the line itself, and what is
        wrong with it."""
        return line, None

    @abc.abstractmethod
    def observe(self, rows: Sequence[Any], errors: list[str | None], name: str) -> None:
        """Takes note of the rows of a chunk in the pass before the job, and adds what else is wrong to ``errors``."""

    @abc.abstractmethod
    def columns(self, rows: Sequence[Any], errors: list[str | None]) -> list[pa.Array]:
        """Returns the rows of a chunk as the columns of the schema, without the errors."""

    def _scan_file(self, file: InputFile) -> None:
        count = 0
        try:
            with contextlib.closing(DigestingStream(self._filesystem, file)) as stream:
                buffered = cast(BinaryIO, io.BufferedReader(stream, CHUNK_BYTES))
                for chunk, data in chunks_of(buffered, file.path, max_line=self._max_line):
                    rows, errors = self._rows(chunk, data, file.name)
                    self.observe(rows, errors, file.name)
                    self._first_error = self._first_error or next((error for error in errors if error), "")
                    self._chunks.append(chunk)
                    self.row_groups.append(RowGroup(file.name, len(rows), len(data), file.folder, len(self.row_groups)))
                    count += len(rows)
                digest = stream.digest()
                self._digests[file.path] = TextDigest.of(stream)
        except UNREADABLE as error:
            cause = error if isinstance(error, OSError) else None
            raise ConfigurationError(f"{file.name}: cannot be read: {error}") from cause
        self.identity["files"][file.name] = f"{count} rows, sha256 {digest}"

    def _rows(self, chunk: Chunk, data: bytes, name: str) -> tuple[list[Any], list[str | None]]:
        """Returns the rows of the lines that are not blank, and what is wrong with each."""
        if chunk.too_long:
            size = (chunk.stop - chunk.start) / 2**20
            return [self.empty()], [
                f"{name}: line {chunk.first_line + 1} is {size:.4g} MiB long, more than the "
                f"{self._max_line / 2**20:.4g} MiB that are read"
            ]
        lines = (data if chunk.start else data.removeprefix(UTF8_MARK)).split(b"\n")
        parsed = [
            self.parse(line, number, name)
            for number, line in enumerate(lines, chunk.first_line + 1)
            if line.strip(b" \t\r")
        ]
        return [row for row, _ in parsed], [error for _, error in parsed]

    def batches(self, row_group: int) -> Iterator[pa.RecordBatch]:
        chunk, where = self._chunks[row_group], self.row_groups[row_group]
        try:
            data = b"" if chunk.too_long else self._read(chunk)
            rows, errors = self._rows(chunk, data, where.file)
            batch = record_batch(self.columns(rows, errors), errors, self.schema)
        except (*UNREADABLE, ConfigurationError) as error:
            raise SourceError(f"{where.file}: line {chunk.first_line + 1} and on cannot be read: {error}") from error
        if len(batch) != where.rows:
            raise SourceError(
                f"{where.file}: {len(batch)} rows from line {chunk.first_line + 1} on, {where.rows} at the start of "
                "the job: the file changed"
            )
        yield batch

    def _read(self, chunk: Chunk) -> bytes:
        file = self._by_path[chunk.path]
        if chunk.path.endswith(COMPRESSED):
            self._packed = self._packed or PackedText(self._filesystem, self._unchanged)
            return self._packed.read(chunk, file)
        with contextlib.closing(self._filesystem.open_input_file(chunk.path)) as opened:
            data = opened.read_at(chunk.stop - chunk.start, chunk.start)
        self._unchanged.opened(file)
        return data

    def _is_same(self, file: InputFile) -> bool:
        """What was added to it since is no part of the job."""
        return self._digests[file.path].begins(self._filesystem, file)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out an open file: a copy in another process (a Ray actor) opens its own."""
        return {**self.__dict__, "_packed": None}
