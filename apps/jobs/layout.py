"""Which input rows make which output part. Pure: numbers in, numbers out, the same on every machine and after every
restart."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

PART_BYTES = 64 * 2**20
"""Input bytes that one part holds at most: parts in flight stay in memory until their last row is done."""
MIN_PART_ROWS, MAX_PART_ROWS, WANTED_PARTS = 100, 10_000, 64


@dataclass(frozen=True)
class RowGroup:
    """What a source reads at one time: ``rows`` rows of ``file``, ``num_bytes`` uncompressed, in the partition folder
    ``folder`` ("" for none). ``group`` counts the row groups of the file."""

    file: str
    rows: int
    num_bytes: int
    folder: str = ""
    group: int = 0


@dataclass(frozen=True)
class Part:
    """One output file: ``rows`` rows of the input in their order, from row ``first_row`` of the whole input on."""

    number: int
    folder: str
    first_row: int
    rows: int

    def file_name(self, suffix: str) -> str:
        """Returns the name relative to the output folder, e.g. ``year=2024/part-00003.parquet``."""
        name = f"part-{self.number:05d}{suffix}"
        return f"{self.folder}/{name}" if self.folder else name


def default_part_rows(row_groups: Sequence[RowGroup]) -> int:
    """Returns the rows of a part: about 64 parts of 100 to 10,000 rows, so that small jobs commit often and large
    ones write few files, and at most 64 MiB of input."""
    rows = sum(group.rows for group in row_groups)
    row_bytes = sum(group.num_bytes for group in row_groups) / max(rows, 1)
    wanted = min(max(-(-rows // WANTED_PARTS), MIN_PART_ROWS), MAX_PART_ROWS)
    return max(1, min(wanted, int(PART_BYTES / max(row_bytes, 1))))


def plan_parts(row_groups: Sequence[RowGroup], part_rows: int) -> list[Part]:
    """Cuts the rows of all row groups, in order, into parts of ``part_rows`` rows; a part never crosses a partition
    folder.

    An input without any row gives one empty part, so that readers of the output find its schema.
    """
    parts: list[Part] = []
    first = 0
    filled = (group for group in row_groups if group.rows)
    for folder, groups in itertools.groupby(filled, lambda group: group.folder):
        end = first + sum(group.rows for group in groups)
        parts += [
            Part(number, folder, start, min(part_rows, end - start))
            for number, start in enumerate(range(first, end, part_rows), len(parts))
        ]
        first = end
    return parts or [Part(0, row_groups[0].folder if row_groups else "", 0, 0)]


def first_rows(parts: Sequence[Part], limit: int | None) -> Sequence[Part]:
    """The parts that hold the first ``limit`` rows, the last of them cut; None: all."""
    if limit is None:
        return parts
    return [
        dataclasses.replace(part, rows=min(part.rows, limit - part.first_row))
        for part in parts
        if part.first_row < limit or part.number == 0
    ]


def shard_parts(parts: Sequence[Part], shard: int, shards: int) -> list[Part]:
    """Returns the parts of shard ``shard`` of ``shards`` (counted from 0): neighbors, with close to the same number of
    rows, so that each shard reads its own files.

    Every part belongs to exactly one shard. Raises ValueError for a shard outside [0, shards).
    """
    if not 0 <= shard < shards:
        raise ValueError(f"shard {shard} of {shards}: shards count from 0 to {shards - 1}")
    total = sum(part.rows for part in parts)
    mine, before = [], 0
    for part in parts:
        middle = before + part.rows / 2
        if (min(int(middle * shards / total), shards - 1) if total else 0) == shard:
            mine.append(part)
        before += part.rows
    return mine
