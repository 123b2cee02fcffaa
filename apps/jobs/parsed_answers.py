"""Answers parsed as JSON, for a column with a type of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.json_types import SchemaTypes, json_field, told_types
from flexbatch.apps.jobs.json_values import converter
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.text.files import parse_json

logger = logging.getLogger("flexbatch")
PARSED = "parsed_json"


class ParsedAnswers:
    """The column of parsed answers, by the schema of ``--json-schema``. With a schema per row no type fits all: the
    column holds JSON texts. It follows from the texts and their finish reasons, so that no journal need hold it."""

    def __init__(self, config: JobConfig) -> None:
        form = config.given().get("structured_outputs")
        self._types: SchemaTypes | None = None
        if config.json_schema_column is None and form is not None and form.json is not None:
            self._types = SchemaTypes(parse_json(form.json, exact=True))
        self.field: pa.Field = json_field(PARSED) if self._types is None else self._types.field(PARSED)
        self._convert: Callable[[Any], Any] = converter(self.field.with_name(""))

    def log(self) -> None:
        """Say what the column holds, before anything runs."""
        if self._types is None:
            logger.info("column %s: JSON text, as every row may have a schema of its own", PARSED)
            return
        for line in told_types(self._types, self.field):
            logger.info("%s", line)

    def value(self, text: str) -> Any:
        """What the column holds for a whole answer. Raises ValueError for one that is no JSON, or that no value of the
        column's type is."""
        return self._convert(parse_json(text, exact=True))

    def value_or_none(self, text: str | None, finish_reason: str) -> Any:
        """The same, and None for an answer that is not whole, or that has no such value."""
        if text is None or finish_reason != "stop":
            return None
        try:
            return self.value(text)
        except ValueError:
            return None

    def problem(self, text: str, finish_reason: str) -> str:
        """Why a whole answer has no value in the column; "" where it has one, and for answers that are not whole."""
        if finish_reason != "stop":
            return ""
        try:
            self.value(text)
        except ValueError as error:
            return f"{PARSED}: {error}"
        return ""
