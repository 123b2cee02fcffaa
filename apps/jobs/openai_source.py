"""OpenAI batch files as rows: each line is kept unchanged in one binary column, and parsed when its row is prepared."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from flexbatch.apps.jobs.files import InputFile
from flexbatch.apps.jobs.text_source import MAX_LINE, LinesSource
from flexbatch.text.files import parse_json

LINE = "line"


class OpenAISource(LinesSource):
    """The lines of batch files. ``repeated`` maps the index of every line whose ``custom_id`` an earlier line has to
    the index of the first such line."""

    format, empty = "openai", bytes

    def __init__(self, filesystem: pafs.FileSystem, files: Sequence[InputFile], max_line: int = MAX_LINE) -> None:
        self._keys = array("Q")
        super().__init__(filesystem, files, max_line)
        self.repeated = first_of_repeated(self._keys)
        self.schema = pa.schema([pa.field(LINE, pa.binary()), *self.error_columns])
        self._keys = array("Q")

    def observe(self, rows: Sequence[bytes], errors: list[str | None], name: str) -> None:
        for line in rows:
            self._keys.append(key_hash(custom_id_of(line), len(self._keys)))

    def columns(self, rows: Sequence[bytes], errors: list[str | None]) -> list[pa.Array]:
        return [pa.array(rows, pa.binary())]


def custom_id_of(line: bytes) -> str | None:
    """Returns what tells one request of a file from another; None where the line has none."""
    try:
        found = parse_json(line)
    except ValueError:
        return None
    custom_id = found.get("custom_id") if isinstance(found, dict) else None
    return custom_id if isinstance(custom_id, str) else None


def key_hash(key: str | None, index: int) -> int:
    """Returns 64 bits that stand for a key; a line without one gets bits of its own."""
    text = f"line {index}" if key is None else f"key {key}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def first_of_repeated(keys: array[int]) -> dict[int, int]:
    """Maps every index whose key an earlier index has to the first such index."""
    hashes = np.frombuffer(keys, np.uint64) if keys else np.empty(0, np.uint64)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = first[group]
    return {int(index): int(earlier[index]) for index in np.flatnonzero(earlier != np.arange(len(hashes)))}
