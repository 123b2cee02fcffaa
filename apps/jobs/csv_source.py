"""CSV: cells are text, as they were written, unless the user gives their column a type."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from flexbatch.apps.jobs.columns import ROW_ERROR, check_names, refuse_reserved, text_column
from flexbatch.apps.jobs.files import InputFile, SourceError
from flexbatch.apps.jobs.layout import RowGroup
from flexbatch.apps.jobs.text_source import CHUNK_BYTES, MAX_LINE, UNREADABLE, DigestingStream, TextDigest, record_batch
from flexbatch.apps.jobs.unchanged import Unchanged
from flexbatch.text.csv_rows import CsvRows, delimiter_of
from flexbatch.text.files import lone_surrogate
from flexbatch.validation.errors import ConfigurationError

BATCH_ROWS = 1024


class CsvSource:
    """CSV (``.tsv``: tabs) in UTF-8 with a header line. ``types`` are those of columns that are not text.

    A row with more or fewer cells than the header, or with one that is not of its type, keeps the cells that fit and
    has an error.
    Raises ConfigurationError for a header without names or with one twice, and for what no row can be told from.
    """

    def __init__(
        self, filesystem: pafs.FileSystem, files: Sequence[InputFile], types: Mapping[str, pa.DataType] | None = None
    ) -> None:
        self._filesystem, self._files = filesystem, list(files)
        self._digests: dict[str, TextDigest] = {}
        self._unchanged = Unchanged(filesystem, files, self._is_same)
        headers: dict[str, None] = {}
        for file in files:
            with self._open(file) as (records, _):
                headers.update(dict.fromkeys(_header(records, file.name)))
        given = dict(types or {})
        check_names(given, headers)
        columns = [pa.field(name, given.get(name, pa.string())) for name in headers]
        self.row_groups: list[RowGroup] = []
        self.identity: dict[str, Any] = {"format": "csv", "files": {}}
        self.schema, wrong = pa.schema([*columns, pa.field(ROW_ERROR, pa.string())]), False
        for file in files:
            rows, errors, digest = self._scan(file)
            wrong = wrong or errors > 0
            self.row_groups.append(RowGroup(file.name, rows, file.size, file.folder))
            self.identity["files"][file.name] = f"{rows} rows, sha256 {digest}"
        if not wrong:
            self.schema = pa.schema(columns)

    @contextlib.contextmanager
    def _open(self, file: InputFile) -> Iterator[tuple[Iterator[tuple[int, list[str]]], DigestingStream]]:
        """Opens a file as rows, its header first. Raises ConfigurationError for a file that is not CSV or cannot be
        read."""
        try:
            with contextlib.closing(DigestingStream(self._filesystem, file)) as stream:
                text = io.TextIOWrapper(
                    io.BufferedReader(stream, CHUNK_BYTES), encoding="utf-8-sig", errors="surrogateescape", newline=""
                )
                yield iter(CsvRows(text, file.name, delimiter_of(file.path), MAX_LINE)), stream
        except UNREADABLE as error:
            raise ConfigurationError(f"{file.name}: cannot be read: {error}") from None

    def _scan(self, file: InputFile) -> tuple[int, int, str]:
        """Returns the rows, the rows with an error, and the digest of the file."""
        rows = errors = 0
        with self._open(file) as (records, stream):
            for batch in self._batches(records, file.name):
                rows += len(batch)
                errors += len(batch) - batch.column(ROW_ERROR).null_count
            self._digests[file.path] = TextDigest.of(stream)
            return rows, errors, stream.digest()

    def _batches(self, records: Iterator[tuple[int, list[str]]], name: str) -> Iterator[pa.RecordBatch]:
        header = _header(records, name)
        while group := list(itertools.islice(records, BATCH_ROWS)):
            errors: list[str | None] = [
                None
                if len(cells) == len(header)
                else f"{name}: line {number} has {len(cells)} cells, the header has {len(header)}"
                for number, cells in group
            ]
            columns = []
            for kind in self.schema:
                if kind.name != ROW_ERROR:
                    index = header.index(kind.name) if kind.name in header else None
                    values = [None if index is None or index >= len(cells) else cells[index] for _, cells in group]
                    columns.append(text_column(values, kind, errors))
            yield record_batch(columns, errors, self.schema)

    def _is_same(self, file: InputFile) -> bool:
        return self._digests[file.path].begins(self._filesystem, file)

    def batches(self, row_group: int) -> Iterator[pa.RecordBatch]:
        row, file = 0, self._files[row_group]
        try:
            with self._open(file) as (records, _):
                self._unchanged.opened(file)
                for batch in self._batches(records, self.row_groups[row_group].file):
                    self._unchanged.read(file)
                    row += len(batch)
                    yield batch
        except ConfigurationError as error:
            raise SourceError(f"{self.row_groups[row_group].file}: row {row} and on cannot be read: {error}") from error


def _header(records: Iterator[tuple[int, list[str]]], name: str) -> list[str]:
    _, header = next(records, (1, []))
    repeated = sorted({column for column in header if header.count(column) > 1})
    if not header:
        raise ConfigurationError(f"{name} is empty: it needs a line with the names of its columns")
    if repeated:
        raise ConfigurationError(f"{name}: column names repeat: {', '.join(repeated)}")
    refuse_reserved(header, name)
    if wrong := [column for column in header if lone_surrogate(column) >= 0]:
        raise ConfigurationError(f"{name}: the name of column {header.index(wrong[0]) + 1} is not UTF-8")
    return header
