"""Rows of a data set as examples: the text that the model reads, and the answer that it should give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flexbatch.apps.wrangle.datasets import DataSet
from flexbatch.apps.wrangle.tables import INDEX_COLUMNS, TableError, TableRow, find_table, read_table

FILES = {"train": "train", "validation": "valid", "test": "test"}
SIDES = {"A": ("tableA", "ltable_id"), "B": ("tableB", "rtable_id")}
LABEL_COLUMNS = frozenset(["row_id", "col_name", "is_clean", "text", "label_str"])


@dataclass(frozen=True)
class Example:
    """One row, pair or cell. ``group`` is the value by which hand-written examples are chosen, ``nan`` where it is
    missing."""

    text: str
    label: str
    group: str | None = None

    @property
    def shot(self) -> str:
        """The example with its answer, as it stands in a prompt."""
        return f"{self.text}{self.label}".strip()


@dataclass(frozen=True)
class Wording:
    """The way a row is written: ``separator`` between its attributes, ``missing`` for a value that is not there."""

    separator: str = "."
    missing: str = "nan"

    def row(self, row: TableRow, columns: dict[str, str]) -> str:
        """Returns ``name: value`` of every column of ``columns`` (column -> name in the text)."""
        parts = [
            f"{name}: {self.missing if row[column] is None else str(row[column]).strip()}".lstrip()
            for column, name in columns.items()
        ]
        return f"{self.end} ".join(parts)

    @property
    def end(self) -> str:
        """The separator as it stands in the text: with a space before it unless it is a full stop."""
        return f" {self.separator}" if self.separator and self.separator != "." else self.separator


def read_examples(folder: Path, data: DataSet, split: str, wording: Wording) -> list[Example]:
    """Returns the examples of ``train``, ``validation`` or ``test``, in the order of the file. Raises TableError."""
    path = find_table(folder, FILES[split])
    if path is None:
        raise TableError(
            f"{folder} holds no {FILES[split]}.csv or {FILES[split]}.parquet, which the {split} split needs"
        )
    rows = read_table(path)
    if data.task == "entity_matching":
        return _pairs(folder, path, rows, data, wording)
    if data.task == "data_imputation":
        return _imputation(path, rows, data, wording)
    if data.task == "schema_matching":
        return _schemas(path, rows, data)
    return _cells(folder, path, rows, data, wording)


def _columns(rows: list[TableRow], data: DataSet, without: Iterable[str] = ()) -> dict[str, str]:
    """Maps the columns that a text shows to their names in the text."""
    hidden = {"id", *INDEX_COLUMNS, *data.drop, *without}
    return {column: data.rename.get(column, column) for column in (rows[0] if rows else {}) if column not in hidden}


def _value(path: Path, number: int, row: TableRow, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise TableError(f"{path}, row {number}: no value in column {column!r}; the file has {', '.join(row)}")
    return value


def _yes(path: Path, number: int, row: TableRow, column: str) -> bool:
    """Returns whether a 0/1 label is 1."""
    value = _value(path, number, row, column)
    try:
        return {0.0: False, 1.0: True}[float({"true": "1", "false": "0"}.get(value.lower(), value))]
    except (KeyError, ValueError):
        raise TableError(f"{path}, row {number}: column {column!r} holds {value!r}, wanted 0 or 1") from None


def _answer(yes: bool) -> str:
    return "Yes\n" if yes else "No\n"


def _pairs(folder: Path, path: Path, rows: list[TableRow], data: DataSet, wording: Wording) -> list[Example]:
    sides = {}
    for side, (table, _) in SIDES.items():
        found = find_table(folder, table)
        if found is None:
            raise TableError(f"{folder} holds no {table}.csv or {table}.parquet, which {path.name} refers to")
        entities = read_table(found)
        sides[side] = (found, {row.get("id"): row for row in entities}, _columns(entities, data))
    examples = []
    for number, row in enumerate(rows):
        text = ""
        left: TableRow = {}
        for side, (_, key) in SIDES.items():
            found, by_id, columns = sides[side]
            identity = _value(path, number, row, key)
            if identity not in by_id:
                raise TableError(f"{path}, row {number}: {key} is {identity}, and {found} has no such id")
            left = left or by_id[identity]
            text += f"{data.noun} {side} is {wording.row(by_id[identity], columns)}. "
        group = data.group.removesuffix("_A") if data.group else None
        text = f"{text.rstrip()}{data.suffix} "
        examples.append(Example(text, _answer(_yes(path, number, row, data.label)), _group(left, group)))
    return examples


def _group(row: TableRow, column: str | None) -> str | None:
    return None if column is None else (row.get(column) or "nan")


def _imputation(path: Path, rows: list[TableRow], data: DataSet, wording: Wording) -> list[Example]:
    columns = _columns(rows, data, [data.label])
    return [
        Example(
            f"{wording.row(row, columns)}{wording.end}{data.suffix} ",
            f"{_value(path, number, row, data.label)}\n",
            _group(row, data.group),
        )
        for number, row in enumerate(rows)
    ]


def _schemas(path: Path, rows: list[TableRow], data: DataSet) -> list[Example]:
    names = {new: old for old, new in data.rename.items()}
    examples = []
    for number, row in enumerate(rows):
        left, right = (_value(path, number, row, names.get(side, side)) for side in ("left", "right"))
        examples.append(
            Example(f"A is {left}. B is {right}. {data.suffix} ", _answer(_yes(path, number, row, data.label)), left)
        )
    return examples


def _cells(folder: Path, path: Path, rows: list[TableRow], data: DataSet, wording: Wording) -> list[Example]:
    """Returns the cells to check. The split names a row of ``table`` by ``row_id`` and a column by ``col_name``, or its
    rows are complete themselves.

    In Adult ``table`` holds the labels too, and is what the authors read for every split.
    """
    table_path = find_table(folder, "table")
    table = read_table(table_path) if table_path else []
    if (
        rows
        and table_path
        and not _columns(rows, data, LABEL_COLUMNS)
        and "row_id" not in rows[0]
        and {"col_name", data.label} <= table[0].keys()
    ):
        path, rows = table_path, table
    examples = []
    for number, label in enumerate(rows):
        row = label
        if "row_id" in label and table_path:
            index = int(float(_value(path, number, label, "row_id")))
            if not 0 <= index < len(table):
                raise TableError(
                    f"{path}, row {number}: row_id is {index}, and {table_path} has rows 0 to {len(table) - 1}"
                )
            row = {**table[index], **label}
        column = _value(path, number, label, "col_name")
        if column not in row:
            raise TableError(f"{path}, row {number}: col_name is {column!r}, and the table has {', '.join(row)}")
        cell = wording.row(row, {column: column})
        if data.task == "error_detection_spelling":
            text = f"Is there a x spelling error in {cell}{data.suffix} "
        else:
            whole = wording.row(row, _columns([row], data, LABEL_COLUMNS))
            text = f"{whole}\n\nIs there an error in {cell}{data.suffix} "
        examples.append(Example(text, _answer(not _yes(path, number, label, data.label)), _group(label, data.group)))
    return examples
