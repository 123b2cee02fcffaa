"""CSV and JSON lines. One pass before the job finds the types, the row counts and a digest; the job then streams them like Parquet."""

from __future__ import annotations

import contextlib
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.json as pajson

from flexbatch.apps.jobs.files import COMPRESSED, InputFile, SourceError
from flexbatch.apps.jobs.layout import Unit
from flexbatch.apps.jobs.sources import conform, unify
from flexbatch.config import ConfigurationError

CHUNK_BYTES = 4 * 2**20
CSV_BLOCK_BYTES = 16 * 2**20
"""The longest CSV row that can be read."""
LINE = "line"


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file: bytes [start, stop) of its uncompressed text, beginning with line ``first_line`` (from 0)."""

    path: str
    start: int
    stop: int
    first_line: int


def chunks_of(stream: BinaryIO, path: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[Chunk, bytes]]:
    """Cuts a file at line ends, about ``chunk_bytes`` at a time; a longer line is one chunk."""
    start, line, pending = 0, 0, b""
    while True:
        data = stream.read(chunk_bytes)
        pending += data
        end = len(pending) if not data else pending.rfind(b"\n") + 1
        if end:
            chunk = Chunk(path, start, start + end, line)
            yield chunk, pending[:end]
            start, line, pending = start + end, line + pending.count(b"\n", 0, end), pending[end:]
        if not data:
            return


def _open(filesystem: pafs.FileSystem, path: str) -> BinaryIO:
    return cast(BinaryIO, filesystem.open_input_stream(path))


class LinesSource:
    """JSON lines, either parsed into columns or, with ``raw``, as one string column ``line`` (OpenAI batch files).

    Strings that look like times stay strings. Raises ConfigurationError that names file and line for what is not JSON.
    """

    def __init__(self, filesystem: pafs.FileSystem, files: Sequence[InputFile], raw: bool = False) -> None:
        self._filesystem, self._raw = filesystem, raw
        self._chunks: list[Chunk] = []
        self.units: list[Unit] = []
        self.identity: dict[str, Any] = {"format": "openai" if raw else "jsonl", "files": {}}
        schemas: list[pa.Schema] = []
        names: list[str] = []
        for file in files:
            digest, rows = hashlib.sha256(), 0
            try:
                with contextlib.closing(_open(filesystem, file.path)) as stream:
                    for chunk, data in chunks_of(stream, file.path):
                        digest.update(data)
                        table = self._parse(data, chunk, file.name, None)
                        schemas.append(table.schema)
                        names.append(file.name)
                        self._chunks.append(chunk)
                        self.units.append(Unit(file.name, len(table), len(data), file.folder, len(self.units)))
                        rows += len(table)
            except (OSError, zlib.error) as error:
                raise ConfigurationError(f"{file.name}: cannot be read: {error}") from None
            self.identity["files"][file.name] = f"{rows} rows, sha256 {digest.hexdigest()[:16]}"
        self.schema = pa.schema([(LINE, pa.string())]) if raw else unify(names, schemas) if schemas else pa.schema([])
        if not self.schema.names:
            raise ConfigurationError(f"{files[0].name} has no rows: its columns are unknown")

    def _parse(self, data: bytes, chunk: Chunk, name: str, schema: pa.Schema | None) -> pa.Table:
        if self._raw:
            lines = [line for line in data.decode("utf-8", "replace").split("\n") if line.strip()]
            return pa.table({LINE: pa.array(lines, pa.string())})
        if not data.strip():
            return pa.table({})
        read = pajson.ReadOptions(block_size=len(data) + 1)
        try:
            table = pajson.read_json(io.BytesIO(data), read, pajson.ParseOptions(explicit_schema=schema))
        except pa.ArrowInvalid as error:
            raise ConfigurationError(f"{name}: lines {chunk.first_line + 1} and on: {error}") from None
        wanted = pa.schema([(field.name, _without_times(field.type)) for field in table.schema])
        return table if schema is not None or wanted.equals(table.schema) else self._parse(data, chunk, name, wanted)

    def batches(self, unit: int, start: int) -> Iterator[pa.RecordBatch]:
        chunk, where = self._chunks[unit], self.units[unit]
        try:
            with contextlib.closing(self._stream_at(chunk)) as stream:
                data = stream.read(chunk.stop - chunk.start)
            table = self._parse(data, chunk, where.file, self.schema)
        except (OSError, ConfigurationError) as error:
            raise SourceError(f"{where.file}: line {chunk.first_line + 1} and on cannot be read: {error}") from error
        if len(table) != where.rows:
            raise SourceError(f"{where.file}: {len(table)} rows from line {chunk.first_line + 1} on, {where.rows} at the start of the job: the file changed")
        for batch in table.slice(start).combine_chunks().to_batches():
            yield conform(batch, self.schema)

    def _stream_at(self, chunk: Chunk) -> BinaryIO:
        if chunk.path.endswith(COMPRESSED):
            stream = _open(self._filesystem, chunk.path)
            left = chunk.start
            while left:
                left -= len(stream.read(min(left, CHUNK_BYTES)))
            return stream
        file = self._filesystem.open_input_file(chunk.path)
        file.seek(chunk.start)
        return cast(BinaryIO, file)


def _without_times(kind: pa.DataType) -> pa.DataType:
    """The type with strings for the times that the JSON reader guesses."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_times(field.type)) for field in kind])
    return kind


class CsvSource:
    """CSV (``.tsv``: tabs) in UTF-8 with a header line. A column is int64, float64, bool or string: the first that fits all its values."""

    def __init__(self, filesystem: pafs.FileSystem, files: Sequence[InputFile]) -> None:
        self._filesystem, self._paths = filesystem, [file.path for file in files]
        self.units: list[Unit] = []
        self.identity: dict[str, Any] = {"format": "csv", "files": {}}
        schemas = []
        for file in files:
            schema, rows, digest = self._scan(file)
            schemas.append(schema)
            self.units.append(Unit(file.name, rows, file.size, file.folder))
            self.identity["files"][file.name] = f"{rows} rows, sha256 {digest}"
        self.schema = unify([file.name for file in files], schemas)

    def _scan(self, file: InputFile) -> tuple[pa.Schema, int, str]:
        try:
            with contextlib.closing(_open(self._filesystem, file.path)) as stream:
                digest = hashlib.sha256()
                while data := stream.read(CHUNK_BYTES):
                    digest.update(data)
            rows, types, names = 0, dict[str, pa.DataType](), list[str]()
            for batch in self._read(file.path, None):
                rows += len(batch)
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    types[name] = _fitting(column, types.get(name, pa.null()))
                names = batch.schema.names
        except (pa.ArrowException, OSError) as error:
            raise ConfigurationError(f"{file.name}: not a readable CSV file: {error}") from None
        return pa.schema([(name, types[name]) for name in names]), rows, digest.hexdigest()[:16]

    def _read(self, path: str, schema: pa.Schema | None) -> Iterator[pa.RecordBatch]:
        """All batches, an empty first one where there are no rows; with every column a string when there is no schema yet."""
        parse = pacsv.ParseOptions(newlines_in_values=True, delimiter="\t" if ".tsv" in path.lower() else ",")
        read = pacsv.ReadOptions(block_size=CSV_BLOCK_BYTES)
        if schema is None:
            with contextlib.closing(_open(self._filesystem, path)) as stream:
                header = pacsv.open_csv(stream, read, parse).schema
            schema = pa.schema([(name, pa.string()) for name in header.names])
        convert = pacsv.ConvertOptions(
            column_types=schema, null_values=[""], strings_can_be_null=False, true_values=["true", "True"], false_values=["false", "False"]
        )
        with contextlib.closing(_open(self._filesystem, path)) as stream:
            reader = pacsv.open_csv(stream, read, parse, convert)
            yield pa.RecordBatch.from_pylist([], schema=reader.schema)
            yield from reader

    def batches(self, unit: int, start: int) -> Iterator[pa.RecordBatch]:
        row = 0
        try:
            for batch in self._read(self._paths[unit], self.schema):
                skip = min(max(start - row, 0), len(batch))
                row += len(batch)
                if skip < len(batch):
                    yield conform(batch.slice(skip), self.schema)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{self.units[unit].file}: row {row} and on cannot be read: {error}") from error


def _fitting(column: pa.Array, kind: pa.DataType) -> pa.DataType:
    """The first of null, int64, float64, bool and string, from ``kind`` on, that holds every value of a string column; empty means null."""
    kinds = (pa.null(), pa.int64(), pa.float64(), pa.bool_())
    values = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    for candidate in kinds[kinds.index(kind) :] if kind in kinds else ():
        if candidate == pa.null():
            if values.null_count == len(values):
                return candidate
            continue
        if candidate == pa.bool_():
            if pc.all(pc.is_in(values, pa.array(["true", "false", "True", "False", None]))).as_py() is not False:
                return candidate
            continue
        with contextlib.suppress(pa.ArrowInvalid):
            values.cast(candidate)
            return candidate
    return pa.string()
