"""CSV taken apart: cells are text, as they were written."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TextIO

from flexbatch.validation.errors import ConfigurationError

NUL = "\udc00"
"""Stands for a zero byte while a line is taken apart: Python 3.10 refuses it. No byte that is not UTF-8 is escaped
as this one."""


class CsvRows:
    """The rows of a CSV file: (number of the first line, cells). Bytes that are not UTF-8 are surrogate escapes.

    A line ends with ``\\n``, ``\\r\\n`` or ``\\r``; ends of lines inside quotes belong to the cell. Blank lines are no
    rows. Raises ConfigurationError for what cannot be taken apart: a quote that is never closed, which would swallow
    the rest of the file, and a line or cell of more than ``longest`` characters.
    """

    def __init__(self, stream: TextIO, name: str, delimiter: str, longest: int) -> None:
        self._stream, self._name, self._longest, self._ended = stream, name, longest, False
        # The module's limit of 131,072 characters holds for the whole process; prompts are longer.
        csv.field_size_limit(max(csv.field_size_limit(), self._longest))
        self._reader = csv.reader(self._lines(), delimiter=delimiter)

    def _lines(self) -> Iterator[str]:
        while line := self._stream.readline(self._longest + 1):
            if len(line) > self._longest:
                raise ConfigurationError(
                    f"{self._name}: line {self._reader.line_num + 1} is longer than {self._longest:,} characters: "
                    "is it CSV?"
                )
            yield line.replace("\x00", NUL)
        self._ended = True

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        while True:
            number = self._reader.line_num + 1
            try:
                cells = next(self._reader, None)
            except csv.Error as error:
                raise ConfigurationError(
                    f"{self._name}: the row that begins in line {number}: {error}. Is a quote never closed?"
                ) from None
            if cells is None:
                return
            if self._ended:  # the reader only asks for another line while a quote is open
                raise ConfigurationError(
                    f"{self._name}: the row that begins in line {number} opens a quote that is never closed"
                )
            if cells:
                yield number, [cell.replace(NUL, "\x00") for cell in cells]


def delimiter_of(name: str) -> str:
    """Tabs in what is named .tsv, else commas."""
    return "\t" if ".tsv" in name.lower() else ","
