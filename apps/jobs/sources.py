"""Where rows come from: Parquet files and data sets of the `datasets` library; see `csv_source`, `json_lines` and
`openai_source` for text.

A source knows its schema, its row groups and its identity before the first row is read, and streams record batches of
one row group at a time.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from flexbatch.apps.jobs.columns import refuse_reserved
from flexbatch.apps.jobs.content import content, wanted_whole
from flexbatch.apps.jobs.files import InputFile, SourceError
from flexbatch.apps.jobs.layout import Part, RowGroup
from flexbatch.apps.jobs.unchanged import Unchanged
from flexbatch.validation.errors import ConfigurationError, reason

BATCH_ROWS = 1024
DATASET_GROUP_ROWS = 1000


class RowSource(Protocol):
    """Where rows come from. ``schema``: columns of the rows; ``row_groups``: what there is to read, in order;
    ``identity``: JSON value that changes when the input changes."""

    schema: pa.Schema
    identity: dict[str, Any]

    @property
    def row_groups(self) -> Sequence[RowGroup]: ...

    def batches(self, row_group: int) -> Iterator[pa.RecordBatch]:
        """Yields the rows of one row group, a batch at a time. Raises SourceError that names the file and the row
        group."""
        ...


def unify(files: Sequence[str], schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Returns one schema for all files; a column that only some files have is null in the others. Raises
    ConfigurationError that names file and types."""
    schema = schemas[0]
    for name, other in zip(files, schemas, strict=True):
        if other.equals(schema):
            continue
        try:
            schema = pa.unify_schemas([schema, other], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ConfigurationError(f"{name}: its columns do not fit those of {files[0]}: {error}") from None
    return schema


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Returns the batch with exactly these columns: missing ones null, others cast. Raises pa.ArrowInvalid where a
    value does not fit."""
    if batch.schema.equals(schema):
        return batch
    names = set(batch.schema.names)
    columns = [
        batch.column(field.name).cast(field.type) if field.name in names else pa.nulls(len(batch), field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


class ParquetSource:
    """Parquet files by row group. Page checksums are verified where the files have them.

    A file's identity is its content (`content`).
    """

    def __init__(self, filesystem: pafs.FileSystem, files: Sequence[InputFile]) -> None:
        self._filesystem, self._files = filesystem, files
        self._whole = wanted_whole(file.size for file in files)
        self._unchanged = Unchanged(filesystem, files, self._is_same)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(self._footer, files))
        for file, (_, schema, _) in zip(files, found, strict=True):
            repeated = {name for name in schema.names if schema.names.count(name) > 1}
            if not schema.names:
                raise ConfigurationError(f"{file.name} has no columns: there is nothing to make a prompt of")
            refuse_reserved(schema.names, file.name)
            if repeated:
                raise ConfigurationError(f"{file.name}: column names repeat: {', '.join(sorted(repeated))}")
        self._open: tuple[str, pa.NativeFile, pq.ParquetFile] | None = None
        self.schema = unify([file.name for file in files], [schema for _, schema, _ in found])
        groups = [
            (file, index, metadata.row_group(index))
            for file, (metadata, _, _) in zip(files, found, strict=True)
            for index in range(metadata.num_row_groups)
        ]
        self.row_groups = [
            RowGroup(file.name, group.num_rows, group.total_byte_size, file.folder, index)
            for file, index, group in groups
        ]
        self._group_files = [file for file, _, _ in groups]
        self._contents = {file.path: identity for file, (_, _, identity) in zip(files, found, strict=True)}
        self.identity = {
            "format": "parquet",
            "files": {
                file.name: {"rows": metadata.num_rows, "bytes": file.size, **identity}
                for file, (metadata, _, identity) in zip(files, found, strict=True)
            },
        }

    def _footer(self, file: InputFile) -> tuple[pq.FileMetaData, pa.Schema, dict[str, str]]:
        try:
            with self._filesystem.open_input_file(file.path) as handle:
                parquet = pq.ParquetFile(handle)
                identity = content(self._filesystem, file, handle, self._whole)
                if "samples" in identity:
                    footer = handle.read_at(file.size, file.size - parquet.metadata.serialized_size - 8)
                    identity["footer"] = f"sha256 {hashlib.sha256(footer).hexdigest()[:32]}"
                return parquet.metadata, parquet.schema_arrow, identity
        except (pa.ArrowException, OSError) as error:
            raise ConfigurationError(f"{file.name}: not a readable Parquet file: {reason(error)}") from None

    def _is_same(self, file: InputFile) -> bool:
        size = self._filesystem.get_file_info(file.path).size
        return self._footer(dataclasses.replace(file, size=size))[2] == self._contents[file.path]

    def _file(self, file: InputFile) -> pq.ParquetFile:
        """Returns the file, opened once for all its row groups: parsing the footer again for each would be quadratic
        in their number."""
        if self._open is None or self._open[0] != file.path:
            self.close()
            handle = self._filesystem.open_input_file(file.path)
            remote = not isinstance(self._filesystem, pafs.LocalFileSystem)
            opened = pq.ParquetFile(handle, pre_buffer=remote, page_checksum_verification=True)
            self._open = (file.path, handle, opened)
            self._unchanged.opened(file)
        return self._open[2]

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out open files: a copy in another process (a Ray actor) opens its files itself."""
        return {**self.__dict__, "_open": None}

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def batches(self, row_group: int) -> Iterator[pa.RecordBatch]:
        where, row, file = self.row_groups[row_group], 0, self._group_files[row_group]
        try:
            for batch in self._file(file).iter_batches(batch_size=BATCH_ROWS, row_groups=[where.group]):
                self._unchanged.read(file)
                row += len(batch)
                yield conform(batch, self.schema)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{where.file}: row group {where.group} cannot be read: {reason(error)}") from error
        if row != where.rows:
            raise SourceError(f"{where.file}: row group {where.group} holds {row} rows, its footer says {where.rows}")


class DatasetSource:
    """A data set of the `datasets` library, by name or saved with ``save_to_disk``; memory-mapped, read a thousand
    rows at a time."""

    def __init__(self, name: str, config: str | None = None, split: str | None = None) -> None:
        import datasets

        try:
            found = (
                datasets.load_from_disk(name)
                if Path(name).is_dir()
                else datasets.load_dataset(name, config, split=split)
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"input {name} is neither a file or folder here nor a data set that `datasets` can load: {error}"
            ) from None
        if isinstance(found, dict):
            if split is None and len(found) > 1:
                raise ConfigurationError(f"data set {name} has the splits {', '.join(found)}: choose one with --split")
            if split is not None and split not in found:
                raise ConfigurationError(f"data set {name} has no split {split!r}, only {', '.join(found)}")
            found = found[split or next(iter(found))]
        self._name, self._dataset = name, found.with_format("arrow")
        self.schema = found.features.arrow_schema.remove_metadata()
        row_bytes = (found.data.nbytes if found.data is not None else 0) // max(len(found), 1)
        self.row_groups = [
            RowGroup(
                name,
                min(DATASET_GROUP_ROWS, len(found) - row),
                min(DATASET_GROUP_ROWS, len(found) - row) * row_bytes,
                group=row // DATASET_GROUP_ROWS,
            )
            for row in range(0, len(found), DATASET_GROUP_ROWS)
        ]
        identity: dict[str, Any] = {"rows": len(found), "fingerprint": found._fingerprint}
        if Path(name).is_dir():
            # A fingerprint is what the folder says of itself; the files there may have been written since.
            identity |= _saved_content(Path(name), [entry["filename"] for entry in found.cache_files])
        self.identity = {"format": "dataset", "files": {name: identity}}

    def batches(self, row_group: int) -> Iterator[pa.RecordBatch]:
        first, rows = row_group * DATASET_GROUP_ROWS, self.row_groups[row_group].rows
        try:
            table = self._dataset[first : first + rows]
            for batch in table.to_batches():
                yield conform(batch, self.schema)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise SourceError(f"{self._name}: rows {first} to {first + rows - 1} cannot be read: {error}") from error


def _saved_content(folder: Path, paths: Sequence[str]) -> dict[str, Any]:
    filesystem = pafs.LocalFileSystem()
    files = [InputFile(path, os.path.relpath(path, folder), os.path.getsize(path)) for path in paths]
    whole, found = wanted_whole(file.size for file in files), {}
    for file in files:
        with filesystem.open_input_file(file.path) as handle:
            found[file.name] = {"bytes": file.size, **content(filesystem, file, handle, whole)}
    return found


def read_parts(source: RowSource, parts: Iterable[Part]) -> Iterator[tuple[Part, pa.Table]]:
    """Yields the input rows of each part. For parts that follow each other in the input, its row groups are read
    once. Raises SourceError."""
    groups = source.row_groups
    starts = list(itertools.accumulate((group.rows for group in groups), initial=0))
    current, row = -1, 0
    stream: Iterator[pa.RecordBatch] = iter(())
    rest: pa.RecordBatch | None = None
    for part in parts:
        end = part.first_row + part.rows
        pieces: list[pa.RecordBatch] = []
        for index in range(bisect.bisect_right(starts, part.first_row) - 1, bisect.bisect_left(starts, end)):
            first = max(part.first_row - starts[index], 0)
            stop = min(end - starts[index], groups[index].rows)
            if index != current or first < row:
                current, row, rest, stream = index, 0, None, source.batches(index)
            while row < stop:
                if rest is None or not len(rest):
                    rest = next(stream, None)
                    if rest is None:
                        raise SourceError(
                            f"{groups[index].file}: the file ends before row {stop} of its row group "
                            f"{groups[index].group}; it changed during the job"
                        )
                skip = max(first - row, 0)
                take = rest.slice(skip, max(stop - row - skip, 0))
                row, rest = row + min(skip, len(rest)) + len(take), rest.slice(skip + len(take))
                if len(take):
                    pieces.append(take)
        yield part, pa.Table.from_batches(pieces, schema=source.schema)
