"""JSON lines: one object a line, whose keys are the columns. A pass before the job finds types that hold all values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from flexbatch.apps.jobs.columns import (
    ROW_ERROR,
    ObservedValues,
    UnfitValue,
    check_names,
    check_text,
    json_column,
    refuse_reserved,
)
from flexbatch.apps.jobs.files import InputFile
from flexbatch.apps.jobs.text_source import LinesSource
from flexbatch.text.files import parse_json
from flexbatch.validation.errors import ConfigurationError

MOST_COLUMNS = 10_000


class JsonLinesSource(LinesSource):
    """JSON lines, parsed into columns. Types follow from all the values (see `columns`), or are given by ``types``."""

    format, empty = "jsonl", dict

    def __init__(
        self, filesystem: pafs.FileSystem, files: Sequence[InputFile], types: Mapping[str, pa.DataType] | None = None
    ) -> None:
        self._types = dict(types or {})
        self._observed: dict[str, ObservedValues] = {}
        super().__init__(filesystem, files)
        self.schema = self._schema(files[0].name)
        self._observed = {}

    def parse(self, line: bytes, number: int, name: str) -> tuple[dict[str, Any], str | None]:
        problems: list[str] = []
        row = _object(line, problems)
        if problems and number == 1 and line.startswith(b"[") and not row:
            _refuse_list(line, name)
        return row, f"{name}: line {number}: {problems[0]}" if problems else None

    def observe(self, rows: Sequence[dict[str, Any]], errors: list[str | None], name: str) -> None:
        for row in rows:
            for column, cell in row.items():
                if column not in self._observed:
                    self._observed[column] = ObservedValues()
                if column not in self._types:
                    self._observed[column].add(cell)
        if len(self._observed) > MOST_COLUMNS:
            raise ConfigurationError(
                f"{name}: its lines have more than {MOST_COLUMNS:,} different keys: are they JSON objects of one kind?"
            )
        for column, kind in self._types.items():
            json_column([row.get(column) for row in rows], pa.field(column, kind), errors)

    def columns(self, rows: Sequence[dict[str, Any]], errors: list[str | None]) -> list[pa.Array]:
        return [
            json_column([row.get(kind.name) for row in rows], kind, errors)
            for kind in self.schema
            if kind.name != ROW_ERROR
        ]

    def _schema(self, name: str) -> pa.Schema:
        """Returns the columns. Raises ConfigurationError where there is none."""
        if not self._observed:
            raise ConfigurationError(
                f"no line of the input is a JSON object: {self._first_error}"
                if self._first_error
                else f"{name} has no rows: its columns are unknown"
            )
        refuse_reserved(self._observed, name)
        check_names(self._types, self._observed)
        columns = [
            pa.field(column, self._types[column]) if column in self._types else values.field(column)
            for column, values in self._observed.items()
        ]
        return pa.schema([*columns, *self.error_columns])


def _object(line: bytes, problems: list[str]) -> dict[str, Any]:
    """Returns the cells of a line as far as they can be read; what is wrong with the others, or with the line, is
    added to ``problems``."""
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
        except UnfitValue as error:
            problems.append(str(error))
            del value[name]
    return value


def _refuse_list(line: bytes, name: str) -> None:
    """Raises ConfigurationError for a file that is one JSON list, on one line or over several: it would be a job of
    nothing but errors."""
    try:
        whole = parse_json(line)
    except ValueError:
        whole = [{}]
    if any(isinstance(item, dict) for item in whole):
        raise ConfigurationError(
            f"{name} is a JSON list, not JSON lines: write one object a line, e.g. with jq -c '.[]' OLD > NEW"
        )
