"""Tables from CSV and Parquet, as rows of text that look as the authors' pandas code prints them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path

from flexbatch.text.files import read_text
from flexbatch.validation.errors import reason

TableRow = dict[str, str | None]
"""Maps a column to its printed value; None where a value is missing."""

MISSING = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
    | {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""The texts that pandas.read_csv takes for a missing value."""
INDEX_COLUMNS = frozenset(["", "Unnamed: 0", "__index_level_0__"])


class TableError(ValueError):
    """A table is absent or does not hold what it should; the message names file, row and column."""


def find_table(folder: Path, name: str) -> Path | None:
    """Returns ``name.csv`` or ``name.parquet`` in the folder, None where there is neither."""
    return next((path for path in (folder / f"{name}.csv", folder / f"{name}.parquet") if path.is_file()), None)


def read_table(path: Path) -> list[TableRow]:
    """Returns all rows of a CSV or Parquet file. Raises TableError for a file that is neither, or has rows of
    another length than its header."""
    if path.suffix == ".parquet":
        return _read_parquet(path)
    lines = csv.reader(io.StringIO(read_text(path), newline=""))
    header = next(lines, None)
    if not header:
        raise TableError(f"{path} is empty; it needs a line of column names")
    if repeated := {name for name in header if header.count(name) > 1}:
        raise TableError(f"{path}: column names repeat: {', '.join(sorted(repeated))}")
    rows = []
    for number, line in enumerate(lines):
        if line and len(line) != len(header):
            raise TableError(
                f"{path}, line {lines.line_num} (row {number}): {len(line)} values for {len(header)} columns"
            )
        rows += [line] if line else []
    columns = [
        _printed([None if line[index] in MISSING else line[index] for line in rows]) for index in range(len(header))
    ]
    return [dict(zip(header, values, strict=True)) for values in zip(*columns, strict=True)] if rows else []


def _printed(values: list[str | None]) -> list[str | None]:
    """Returns a CSV column as pandas would print it: whole numbers unchanged, but with a decimal point when the
    column has gaps or fractions."""
    present = [value.strip() for value in values if value is not None]
    if not present:
        return values
    if len(present) == len(values) and _all(int, present):
        return [str(int(value)) for value in present]
    if _all(float, present):
        return [None if value is None else str(float(value)) for value in values]
    return values


def _all(kind: Callable[[str], object], values: Iterable[str]) -> bool:
    try:
        for value in values:
            if "_" in value:  # Python reads 1_000 as a number, pandas does not
                return False
            kind(value)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path) -> list[TableRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowInvalid) as problem:
        raise TableError(f"{path} cannot be read as Parquet: {reason(problem)}") from problem
    columns: dict[str, list[str | None]] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        values = column.to_pylist()
        gaps = pyarrow.types.is_integer(column.type) and column.null_count
        columns[name] = [
            None if value is None or value != value else str(float(value) if gaps else value) for value in values
        ]
    return [{name: column[index] for name, column in columns.items()} for index in range(table.num_rows)]
