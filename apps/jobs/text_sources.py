"""JSON lines, and what they share with CSV. One pass before the job finds the types, the row counts and a digest; the
job then streams them like Parquet.

A row that cannot be read, such as a line that is not JSON, is null in every column, and the column `ROW_ERROR` says
why.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from flexbatch.apps.jobs.columns import ROW_ERROR, Seen, Unfit, check_names, check_text, json_column, refuse_reserved
from flexbatch.apps.jobs.files import COMPRESSED, InputFile, SourceError
from flexbatch.apps.jobs.layout import Unit
from flexbatch.text.files import UTF8_MARK, parse_json, without_mark
from flexbatch.validation.errors import ConfigurationError

CHUNK_BYTES = 4 * 2**20
MAX_LINE = 64 * 2**20
"""The longest line of JSON in bytes, and the longest line and cell of CSV in characters."""
MOST_COLUMNS = 10_000
LINE = "line"
UNREADABLE = (pa.ArrowException, OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file: bytes [start, stop) of its uncompressed text, beginning with line ``first_line`` (from
    0); or one line that is too long.
    """

    path: str
    start: int
    stop: int
    first_line: int
    too_long: bool = False


def chunks_of(
    stream: BinaryIO, path: str, chunk_bytes: int = CHUNK_BYTES, max_line: int = MAX_LINE
) -> Iterator[tuple[Chunk, bytes]]:
    """Cuts a file at line ends, about ``chunk_bytes`` at a time; a longer line is one chunk, and one longer than
    ``max_line`` is a chunk without data.
    """
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
    """(length of a line of which ``length`` bytes are read, what was read behind it)."""
    while data := stream.read(chunk_bytes):
        end = data.find(b"\n") + 1
        if end:
            return length + end, bytearray(data[end:])
        length += len(data)
    return length, bytearray()


class Scanned(io.RawIOBase):
    """The uncompressed bytes of a text file on their way to whoever reads it whole, and their digest.

    Reading raises ConfigurationError for a file that says by its byte order mark that it is not UTF-8.
    """

    def __init__(self, filesystem: pafs.FileSystem, file: InputFile) -> None:
        self._stream, self._name = cast(BinaryIO, filesystem.open_input_stream(file.path)), file.name
        self._digest, self._began = hashlib.sha256(), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        if not self._began:
            without_mark(data, self._name)
            self._began = True
        self._digest.update(data)
        buffer[: len(data)] = data
        return len(data)

    def digest(self) -> str:
        return self._digest.hexdigest()[:16]

    def close(self) -> None:
        self._stream.close()
        super().close()


def record_batch(columns: Sequence[pa.Array], errors: Sequence[str | None], schema: pa.Schema) -> pa.RecordBatch:
    """The rows of a source. Its schema has room for their errors where its first pass has seen one."""
    whole = [*columns, pa.array(errors, pa.string())] if ROW_ERROR in schema.names else list(columns)
    return pa.RecordBatch.from_arrays(whole, schema=schema)


class LinesSource:
    """JSON lines, either parsed into columns or, with ``key``, as one binary column ``line`` (OpenAI batch files).

    Types follow from all the values (see `columns`), or are given by ``types``. ``key`` finds in a line what no other
    line should have: ``repeated`` has
    the place of every line whose key was there before, with the place where it was. Raises ConfigurationError where no
    row can be read.
    """

    def __init__(
        self,
        filesystem: pafs.FileSystem,
        files: Sequence[InputFile],
        types: Mapping[str, pa.DataType] | None = None,
        key: Callable[[bytes], str | None] | None = None,
    ) -> None:
        self._filesystem, self._key, self._types = filesystem, key, dict(types or {})
        self._chunks: list[Chunk] = []
        self._seen: dict[str, Seen] = {}
        self._keys, self._first_error = array("Q"), ""
        self.units: list[Unit] = []
        self.identity: dict[str, Any] = {"format": "openai" if key is not None else "jsonl", "files": {}}
        for file in files:
            self._scan_file(file)
        self.repeated = repeated_places(self._keys)
        self.schema = self._schema(files[0].name)
        self._seen, self._keys = {}, array("Q")

    def _scan_file(self, file: InputFile) -> None:
        rows = 0
        try:
            with contextlib.closing(Scanned(self._filesystem, file)) as stream:
                for chunk, data in chunks_of(cast(BinaryIO, io.BufferedReader(stream, CHUNK_BYTES)), file.path):
                    count = self._scan(chunk, data, file.name)
                    self._chunks.append(chunk)
                    self.units.append(Unit(file.name, count, len(data), file.folder, len(self.units)))
                    rows += count
                digest = stream.digest()
        except UNREADABLE as error:
            raise ConfigurationError(f"{file.name}: cannot be read: {error}") from None
        self.identity["files"][file.name] = f"{rows} rows, sha256 {digest}"

    def _scan(self, chunk: Chunk, data: bytes, name: str) -> int:
        """Number of rows; what they hold is added to what was seen."""
        if self._key is not None:
            lines, errors = self._lines(chunk, data, name)
            for line, error in zip(lines, errors, strict=True):
                self._keys.append(key_hash(None if error else self._key(line), len(self._keys)))
        else:
            values, errors = self._values(chunk, data, name)
            for value in values:
                for column, cell in value.items():
                    if column not in self._seen:
                        self._seen[column] = Seen()
                    if column not in self._types:
                        self._seen[column].add(cell)
            if len(self._seen) > MOST_COLUMNS:
                raise ConfigurationError(
                    f"{name}: its lines have more than {MOST_COLUMNS:,} different keys: are they JSON objects of "
                    "one kind?"
                )
            for column, kind in self._types.items():
                json_column([value.get(column) for value in values], pa.field(column, kind), errors)
        self._first_error = self._first_error or next((error for error in errors if error), "")
        return len(errors)

    def _schema(self, name: str) -> pa.Schema:
        """Raises ConfigurationError where there is no column."""
        errors = [pa.field(ROW_ERROR, pa.string())] if self._first_error else []
        if self._key is not None:
            return pa.schema([pa.field(LINE, pa.binary()), *errors])
        if not self._seen:
            raise ConfigurationError(
                f"no line of the input is a JSON object: {self._first_error}"
                if self._first_error
                else f"{name} has no rows: its columns are unknown"
            )
        refuse_reserved(self._seen, name)
        check_names(self._types, self._seen)
        columns = [
            pa.field(column, self._types[column]) if column in self._types else seen.field(column)
            for column, seen in self._seen.items()
        ]
        return pa.schema([*columns, *errors])

    def _lines(self, chunk: Chunk, data: bytes, name: str) -> tuple[list[bytes], list[str | None]]:
        """The lines that are not blank, and what is wrong with them before they are parsed."""
        if chunk.too_long:
            size = (chunk.stop - chunk.start) / 2**20
            return [b""], [
                f"{name}: line {chunk.first_line + 1} is {size:.0f} MiB long, more than the {MAX_LINE // 2**20} MiB "
                "that are read"
            ]
        lines = [
            line
            for line in (data if chunk.start else data.removeprefix(UTF8_MARK)).split(b"\n")
            if line.strip(b" \t\r")
        ]
        return lines, [None] * len(lines)

    def _values(self, chunk: Chunk, data: bytes, name: str) -> tuple[list[dict[str, Any]], list[str | None]]:
        """The rows as objects, an empty one and the reason for each that is none."""
        if chunk.too_long:
            return [{}], self._lines(chunk, data, name)[1]
        values: list[dict[str, Any]] = []
        errors: list[str | None] = []
        for number, line in enumerate(
            (data if chunk.start else data.removeprefix(UTF8_MARK)).split(b"\n"), chunk.first_line + 1
        ):
            if not line.strip(b" \t\r"):
                continue
            problems: list[str] = []
            values.append(_object(line, problems))
            errors.append(f"{name}: line {number}: {problems[0]}" if problems else None)
            if problems and number == 1 and line.startswith(b"[") and not values[-1]:
                _refuse_list(line, name)
        return values, errors

    def batches(self, unit: int, start: int) -> Iterator[pa.RecordBatch]:
        chunk, where = self._chunks[unit], self.units[unit]
        try:
            data = b""
            if not chunk.too_long:
                with contextlib.closing(self._stream_at(chunk)) as stream:
                    data = stream.read(chunk.stop - chunk.start)
            batch = self._batch(chunk, data, where.file)
        except (*UNREADABLE, ConfigurationError) as error:
            raise SourceError(f"{where.file}: line {chunk.first_line + 1} and on cannot be read: {error}") from error
        if len(batch) != where.rows:
            raise SourceError(
                f"{where.file}: {len(batch)} rows from line {chunk.first_line + 1} on, {where.rows} at the start of "
                "the job: the file changed"
            )
        if start < len(batch):
            yield batch.slice(start)

    def _batch(self, chunk: Chunk, data: bytes, name: str) -> pa.RecordBatch:
        if self._key is not None:
            lines, errors = self._lines(chunk, data, name)
            return record_batch([pa.array(lines, pa.binary())], errors, self.schema)
        values, errors = self._values(chunk, data, name)
        columns = [
            json_column([value.get(kind.name) for value in values], kind, errors)
            for kind in self.schema
            if kind.name != ROW_ERROR
        ]
        return record_batch(columns, errors, self.schema)

    def _stream_at(self, chunk: Chunk) -> BinaryIO:
        if chunk.path.endswith(COMPRESSED):
            stream = cast(BinaryIO, self._filesystem.open_input_stream(chunk.path))
            left = chunk.start
            while left:
                skipped = len(stream.read(min(left, CHUNK_BYTES)))
                if not skipped:
                    raise EOFError("the file is shorter than at the start of the job")
                left -= skipped
            return stream
        file = self._filesystem.open_input_file(chunk.path)
        file.seek(chunk.start)
        return cast(BinaryIO, file)


def _object(line: bytes, problems: list[str]) -> dict[str, Any]:
    """The cells of a line as far as they can be read; what is wrong with the others, or with the line, is added to
    ``problems``.
    """
    try:
        value = parse_json(line, exact=True, constants=True)
    except ValueError as error:
        problems.append(str(error))
        return {}
    if not isinstance(value, dict):
        problems.append(f"not a JSON object but a {type(value).__name__}")
        return {}
    if b"\\u" not in line:  # what is UTF-8 itself holds no half of a surrogate pair
        return value
    for name in list(value):
        try:
            check_text(name, "the name of a column")
            check_text(value[name], name)
        except Unfit as error:
            problems.append(str(error))
            del value[name]
    return value


def _refuse_list(line: bytes, name: str) -> None:
    """A file that is one JSON list, on one line or over several, would be a job of nothing but errors."""
    try:
        whole = parse_json(line)
    except ValueError:
        whole = [{}]
    if any(isinstance(item, dict) for item in whole):
        raise ConfigurationError(
            f"{name} is a JSON list, not JSON lines: write one object a line, e.g. with jq -c '.[]' OLD > NEW"
        )


def key_hash(key: str | None, place: int) -> int:
    """64 bits that stand for a key; one of its own for a line without one."""
    text = f"line {place}" if key is None else f"key {key}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def repeated_places(keys: array[int]) -> dict[int, int]:
    """Place -> first place with the same key, for every place but the first of each."""
    hashes = np.frombuffer(keys, np.uint64) if keys else np.empty(0, np.uint64)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = first[group]
    return {int(place): int(earlier[place]) for place in np.flatnonzero(earlier != np.arange(len(hashes)))}
