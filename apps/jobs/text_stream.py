"""What CSV and JSON lines share: one pass over a file before the job, which takes its digest, and rows with errors.

A row that cannot be read, such as a line that is not JSON, is null in every column, and the column `ROW_ERROR` says
why.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.fs as pafs

from flexbatch.apps.jobs.columns import ROW_ERROR
from flexbatch.apps.jobs.files import InputFile
from flexbatch.text.files import without_mark

CHUNK_BYTES = 4 * 2**20
MAX_LINE = 64 * 2**20
"""The longest line of JSON in bytes, and the longest line and cell of CSV in characters."""
UNREADABLE = (pa.ArrowException, OSError, EOFError, zlib.error)


class DigestingStream(io.RawIOBase):
    """The uncompressed bytes of a text file that is read as a whole, and their digest.

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
    """The rows of a source. Its schema has a column for their errors where its first pass has found one."""
    whole = [*columns, pa.array(errors, pa.string())] if ROW_ERROR in schema.names else list(columns)
    return pa.RecordBatch.from_arrays(whole, schema=schema)
