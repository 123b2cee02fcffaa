"""The results of a job: the columns of the Parquet parts, and the record of one row that the journal keeps until its
part is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from flexbatch.apps.jobs.columns import ROW_ERROR
from flexbatch.apps.jobs.parsed_answers import ParsedAnswers
from flexbatch.apps.jobs.rows import RowRequest
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.request import Completion, TokenLogprob
from flexbatch.validation.errors import ConfigurationError, reason
from flexbatch.validation.secrets import redacted

RowRecord = Any
"""JSON value that holds the outcome of one row; its form belongs to the output that wrote it."""
LOGPROB = pa.struct([("token_id", pa.int32()), ("logprob", pa.float32()), ("rank", pa.int32())])
COLUMNS = [
    ("generated_text", pa.string()),
    ("finish_reason", pa.string()),
    ("num_input_tokens", pa.int32()),
    ("num_generated_tokens", pa.int32()),
    ("error", pa.string()),
    ("generated_tokens", pa.list_(pa.int32())),
    ("logprobs", pa.list_(pa.list_(LOGPROB))),
    ("prompt_logprobs", pa.list_(pa.list_(LOGPROB))),
]

EACH = ("generated_text", "finish_reason", "num_generated_tokens", "generated_tokens", "logprobs")
"""Columns of an answer; the others are of its prompt."""


class Output(Protocol):
    """One form of output files, whose names end with ``suffix``."""

    suffix: str

    def start(self, created: int, tokenizer: Any) -> None:
        """Called before the first record: the unix time at which the job began, and the model's tokenizer."""
        ...

    def record(self, row: RowRequest, completions: Sequence[Completion]) -> RowRecord:
        """The record of a row from the completions of its prompts, in their order."""
        ...

    def failure(self, row: RowRequest, message: str) -> RowRecord: ...

    def error_of(self, record: RowRecord) -> str:
        """Returns the error of a row, "" when it is fine."""
        ...

    def is_truncated(self, record: RowRecord, tokens: int) -> bool:
        """Returns whether an answer was cut before it had so many tokens."""
        ...

    def tokens_of(self, record: RowRecord) -> tuple[int, int]:
        """Returns (input tokens, generated tokens)."""
        ...

    def errors(self, path: Path) -> list[str]:
        """Returns the errors of the rows of a committed part that have one. Raises ValueError for a damaged file."""
        ...

    def write(self, path: Path, table: pa.Table, records: Sequence[RowRecord]) -> None:
        """Writes one part and makes it durable; the caller gives the file its final name."""
        ...

    def read(self, path: Path, rows: int) -> list[RowRecord]:
        """Returns the records of a committed part. Raises ValueError when the file does not hold ``rows`` rows of
        this job."""
        ...


def runs_again(record: RowRecord, output: Output, failed: bool, tokens: int | None) -> bool:
    """Returns whether a finished row is to be run once more: one with an error where ``failed``, and one that was cut
    before ``tokens``."""
    return (failed and bool(output.error_of(record))) or (tokens is not None and output.is_truncated(record, tokens))


def result_schema(schema: pa.Schema, partitions: Sequence[str], prefix: str, results: Sequence[pa.Field]) -> pa.Schema:
    """Returns the input columns, then the result columns behind ``prefix``. Raises ConfigurationError where two names
    clash.

    Metadata that other libraries keep about their columns is dropped where it would no longer be true.
    """
    fields = [field.with_name(prefix + field.name) for field in results]
    clash = [field.name for field in fields if field.name in schema.names or field.name in partitions]
    if clash:
        raise ConfigurationError(
            f"the input already has the column{'s' * (len(clash) > 1)} {', '.join(clash)}: give the new ones other "
            "names, e.g. --output-prefix flexbatch_"
        )
    metadata = {
        key: value
        for key, value in (schema.metadata or {}).items()
        if key != b"huggingface" and not (key == b"pandas" and b'"kind": "range"' in value)
    }
    return pa.schema([*schema, *fields], metadata or None)


def failure_text(message: str) -> str:
    """Returns the error of a row as every file can hold it: a reason, in Unicode, without credentials."""
    return redacted(message.encode("utf-8", "backslashreplace").decode()) or "failed without a message"


def listed_logprobs(steps: Sequence[dict[int, TokenLogprob] | None] | None) -> list[list[list[float]] | None] | None:
    """Returns, per token, its candidates as [token id, natural-log probability, rank], most likely first; None for a
    token of the prompt that was not scored, as the first."""
    if steps is None:
        return None
    return [
        None
        if step is None
        else [
            [entry.token_id, entry.logprob, entry.rank]
            for entry in sorted(step.values(), key=lambda entry: (entry.rank, entry.token_id))
        ]
        for step in steps
    ]


class ParquetOutput:
    """Parquet parts: all input columns in their types, then the results. A record is a list in the order of `COLUMNS`.

    With several answers to a prompt (--n), what belongs to one answer is a list of as many. With --parse-json a column
    behind the others holds what the answers' texts say.
    """

    suffix = ".parquet"

    def __init__(self, config: JobConfig, schema: pa.Schema, partitions: Sequence[str]) -> None:
        self._prefix = config.output_prefix
        left_out = {
            "generated_tokens": not config.generated_tokens,
            "logprobs": config.logprobs is None,
            "prompt_logprobs": config.prompt_logprobs is None,
        }
        self._kept = [name for name, _ in COLUMNS if not left_out.get(name)]
        self._many = (config.n or 1) > 1
        self._kinds = [(name, pa.list_(kind) if self._many and name in EACH else kind) for name, kind in COLUMNS]
        fields = [pa.field(name, kind) for name, kind in self._kinds if name in self._kept]
        self._parsed = ParsedAnswers(config) if config.parse_json else None
        if self._parsed is not None:
            column = self._parsed.field
            fields.append(pa.field(column.name, pa.list_(column.with_name("item"))) if self._many else column)
        self.schema = result_schema(schema, partitions, self._prefix, fields)

    def log_columns(self) -> None:
        """Say of columns what their types leave open."""
        if self._parsed is not None:
            self._parsed.log()

    def start(self, created: int, tokenizer: Any) -> None:
        """Does nothing: the records hold neither times nor names of tokens."""

    def record(self, row: RowRequest, completions: Sequence[Completion]) -> RowRecord:
        (completion,) = completions
        used = len(completion.prompt_token_ids)
        if completion.finish_reason == "error":
            return self.failure(row, completion.bare_error, used)
        answers = [self._answer(sample) for sample in completion.samples or [completion]]
        values = {name: [answer[name] for answer in answers] if self._many else answers[0][name] for name in EACH}
        scored = listed_logprobs(completion.prompt_logprobs) if "prompt_logprobs" in self._kept else None
        error = self._unparsed(row, answers)
        found = {"num_input_tokens": used, "error": error, "prompt_logprobs": scored, **values}
        return [found[name] for name, _ in COLUMNS]

    def _unparsed(self, row: RowRequest, answers: Sequence[dict[str, Any]]) -> str:
        """The error of a row with a whole answer that should be JSON, and is not, or does not fit its column."""
        form = row.params.structured_outputs
        if self._parsed is None or form is None or not form.is_json:
            return ""
        found = [self._parsed.problem(each["generated_text"], each["finish_reason"]) for each in answers]
        told = [f"answer {number} of {len(found)}: {problem}" for number, problem in enumerate(found, 1) if problem]
        return failure_text("; ".join(told) if self._many else found[0]) if told else ""

    def _answer(self, sample: Completion) -> dict[str, Any]:
        return {
            "generated_text": sample.text,
            "finish_reason": sample.finish_reason,
            "num_generated_tokens": len(sample.token_ids),
            "generated_tokens": [int(token) for token in sample.token_ids]
            if "generated_tokens" in self._kept
            else None,
            "logprobs": listed_logprobs(sample.logprobs) if "logprobs" in self._kept else None,
        }

    def failure(self, row: RowRequest, message: str, input_tokens: int = 0) -> RowRecord:
        reason, made = (["error"], [0]) if self._many else ("error", 0)
        return [None, reason, input_tokens, made, failure_text(message), None, None, None]

    def error_of(self, record: RowRecord) -> str:
        return record[4]

    def is_truncated(self, record: RowRecord, tokens: int) -> bool:
        answers = zip(record[1], record[3], strict=True) if self._many else [(record[1], record[3])]
        return any(reason == "length" and made < tokens for reason, made in answers)

    def tokens_of(self, record: RowRecord) -> tuple[int, int]:
        return record[2], sum(record[3]) if self._many else record[3]

    def table(self, table: pa.Table, records: Sequence[RowRecord]) -> pa.Table:
        """Returns input rows and their records as output rows."""
        results: list[pa.Array] = []
        for index, (name, kind) in enumerate(self._kinds):
            if name not in self._kept:
                continue
            values = [record[index] for record in records]
            if name == "logprobs":
                values = [self._each(value, _as_structs) for value in values]
            if name == "prompt_logprobs":
                values = [value and _as_structs(value) for value in values]
            results.append(pa.array(values, kind))
        if self._parsed is not None:
            read = self._parsed.value_or_none
            texts = ((record[0], record[1]) for record in records)
            results.append(
                pa.array(
                    [text and list(map(read, text, ends)) if self._many else read(text, ends) for text, ends in texts],
                    self.schema.field(len(self.schema) - 1).type,
                )
            )
        columns = [column for name, column in zip(table.column_names, table.columns, strict=True) if name != ROW_ERROR]
        return pa.Table.from_arrays([*columns, *results], schema=self.schema)

    def write(self, path: Path, table: pa.Table, records: Sequence[RowRecord]) -> None:
        with path.open("wb") as file:
            pq.write_table(self.table(table, records), file, write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())

    def errors(self, path: Path) -> list[str]:
        name = f"{self._prefix}error"
        try:
            column = _read_columns(path, [name])[name]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{path}: {error}") from error
        return [error for error in column.to_pylist() if error]

    def read(self, path: Path, rows: int) -> list[RowRecord]:
        try:
            table = _read_columns(path, [self._prefix + name for name in self._kept])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: {reason(error)}") from error
        if len(table) != rows:
            raise ValueError(f"{path} holds {len(table)} rows, this job's part has {rows}")
        columns = {name: table[self._prefix + name].to_pylist() for name in self._kept}
        if "logprobs" in columns:
            columns["logprobs"] = [self._each(value, _as_lists) for value in columns["logprobs"]]
        if "prompt_logprobs" in columns:
            columns["prompt_logprobs"] = [value and _as_lists(value) for value in columns["prompt_logprobs"]]
        absent = [None] * rows
        return [list(values) for values in zip(*(columns.get(name, absent) for name, _ in COLUMNS), strict=True)]

    def _each(self, value: Any, change: Callable[[Any], Any]) -> Any:
        """Change the log-probabilities of one answer, or of every one of several."""
        if value is None:
            return None
        return [change(answer) for answer in value] if self._many else change(value)


def _read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Reads a part. It is opened here: by its name pyarrow opens none in a folder whose name is not UTF-8."""
    with path.open("rb") as file:
        return pq.read_table(file, columns=list(names), partitioning=None)


def _as_structs(steps: Any) -> Any:
    names = ("token_id", "logprob", "rank")
    return [step and [dict(zip(names, entry, strict=True)) for entry in step] for step in steps]


def _as_lists(steps: Any) -> Any:
    return [step and [list(entry.values()) for entry in step] for step in steps]
