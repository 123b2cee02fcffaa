"""Which input rows make which output part. Pure: numbers in, numbers out, the same on every machine and after every
restart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PART_BYTES = 64 * 2**20
"""Input bytes that one part holds at most: parts in flight stay in memory until their last row is done."""
MIN_PART_ROWS, MAX_PART_ROWS, WANTED_PARTS = 100, 10_000, 64


@dataclass(frozen=True)
class Unit:
    """What a source reads at one time, a row group: ``rows`` rows of ``file``, ``nbytes`` uncompressed, in partition
    folder ``folder`` ("" for none)."""

    file: str
    rows: int
    nbytes: int
    folder: str = ""
    group: int = 0


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of the unit with this index."""

    unit: int
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """One output file: a contiguous range of input rows, in input order."""

    number: int
    folder: str
    first_row: int
    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    def file_name(self, suffix: str) -> str:
        """Relative to the output folder, e.g. ``year=2024/part-00003.parquet``."""
        name = f"part-{self.number:05d}{suffix}"
        return f"{self.folder}/{name}" if self.folder else name


def default_part_rows(units: Sequence[Unit]) -> int:
    """Rows of a part: about 64 parts of 100 to 10,000 rows, so that small jobs commit often and large ones leave few
    files, and 64 MiB of input at most."""
    rows = sum(unit.rows for unit in units)
    row_bytes = sum(unit.nbytes for unit in units) / max(rows, 1)
    wanted = min(max(-(-rows // WANTED_PARTS), MIN_PART_ROWS), MAX_PART_ROWS)
    return max(1, min(wanted, int(PART_BYTES / max(row_bytes, 1))))


def plan_parts(units: Sequence[Unit], part_rows: int) -> list[Part]:
    """Cuts the rows of all units, in order, into parts of ``part_rows`` rows; a part never crosses a partition folder.

    An input without any row gives one empty part, so that readers of the output find its schema.
    """
    parts: list[Part] = []
    spans: list[Span] = []
    folder, room, first_row, row = units[0].folder if units else "", part_rows, 0, 0

    def close() -> None:
        nonlocal spans, room, first_row
        if spans:
            parts.append(Part(len(parts), folder, first_row, tuple(spans)))
        spans, room, first_row = [], part_rows, row

    for index, unit in enumerate(units):
        if unit.rows and unit.folder != folder:
            close()
            folder = unit.folder
        start = 0
        while start < unit.rows:
            stop = min(unit.rows, start + room)
            spans.append(Span(index, start, stop))
            row, room, start = row + stop - start, room - (stop - start), stop
            if room == 0:
                close()
    close()
    return parts or [Part(0, folder, 0, ())]


def shard_parts(parts: Sequence[Part], shard: int, shards: int) -> list[Part]:
    """The parts of shard ``shard`` of ``shards`` (counted from 0): neighbours, with close to the same number of rows,
    so that each shard reads its own files.

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


def check_layout(parts: Sequence[Part], units: Sequence[Unit]) -> None:
    """Asserts that the parts hold every row of every unit once and in order."""
    read = [0] * len(units)
    row = 0
    for number, part in enumerate(parts):
        assert part.number == number and part.first_row == row, (
            f"part {number} begins at row {part.first_row}, expected {row}"
        )
        for span in part.spans:
            assert read[span.unit] == span.start < span.stop, (
                f"part {number}: {span} does not follow row {read[span.unit]}"
            )
            assert units[span.unit].folder == part.folder, (
                f"part {number} in {part.folder!r} holds rows of {units[span.unit].folder!r}"
            )
            read[span.unit] = span.stop
        row += part.rows
    assert read == [unit.rows for unit in units], "the parts miss rows of the input"
