"""From input rows to requests: the prompt out of a column, messages or a template, and the sampling parameters of
each row."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.columns import ROW_ERROR, Unfit, check_text, holds_json
from flexbatch.apps.jobs.files import partition_values
from flexbatch.request import SamplingParams
from flexbatch.text.files import MARK, json_text, parse_json, short, with_doubles
from flexbatch.validation.errors import ConfigurationError

SETTINGS: dict[str, type] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "seed": int,
    "stop": str,
}
"""Settings that a column can hold per row, with the type of its values; ``stop`` may also be a list."""


class RowError(ValueError):
    """This row cannot be run; the job goes on without it."""


@dataclass
class Row:
    """One input row on its way: ``offset`` counts in its part, ``index`` in the whole input. With ``error`` there is
    no prompt."""

    part: int
    offset: int
    index: int
    prompt: Any = None
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    error: str = ""
    extra: Any = None
    """What the output of this row needs besides the completion."""


def row_seed(seed: int, place: int | str) -> int:
    """The seed of a row's random stream, 63 bits: from the job's seed and the row's place in the input, so neither
    order nor restarts change its tokens."""
    digest = hashlib.blake2b(f"{seed}:{place}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Template:
    """``Summarise: {text}``: fields are columns, or ``column.field`` of nested ones; ``{{`` and ``}}`` are braces.
    Else raises ConfigurationError."""

    def __init__(self, text: str) -> None:
        self._pieces: list[tuple[str, tuple[str, ...] | None]] = []
        try:
            for literal, name, form, conversion in string.Formatter().parse(text.removeprefix(MARK)):
                if name is not None and (form or conversion or not name or any(mark in name for mark in "[]()")):
                    raise ConfigurationError(
                        f"prompt template: {{{name}}} must be the name of a column; write {{{{ and }}}} for braces"
                    )
                self._pieces.append((literal, None if name is None else tuple(name.split("."))))
        except ValueError as error:
            raise ConfigurationError(f"prompt template {text!r}: {error}; write {{{{ and }}}} for braces") from None

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path[0] for _, path in self._pieces if path))

    def render(self, row: Mapping[str, Any]) -> str:
        """The prompt of one row. Raises RowError that names a missing or undecodable field."""
        out = []
        for literal, path in self._pieces:
            out.append(literal)
            if path:
                value: Any = row
                for name in path:
                    value = value.get(name) if isinstance(value, Mapping) else None
                out.append(_text(value, ".".join(path)))
        return "".join(out)


def _text(value: Any, name: str) -> str:
    if value is None:
        raise RowError(f"template field {name!r} is missing or null")
    if isinstance(value, bytes):
        return _decode(value, name)
    return unicode_text(json_text(value) if isinstance(value, list | dict) else str(value), name)


def _decode(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(name, error) from None


def _not_utf8(name: str, error: UnicodeDecodeError) -> RowError:
    return RowError(f"{name!r} is not UTF-8: {error.reason} at byte {error.start}")


def row_error(error: Exception) -> RowError:
    """Whatever went wrong with one row, as the reason that its error column gives."""
    if isinstance(error, RowError):
        return error
    known = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
    return RowError(str(error) if known and str(error) else f"{type(error).__name__}: {error}")


def text_prompt(value: Any, name: str) -> str:
    """A text, or bytes that are UTF-8. Raises RowError."""
    if value is None:
        raise RowError(f"{name!r} is null")
    if isinstance(value, bytes):
        return _decode(value, name)
    if not isinstance(value, str):
        raise RowError(f"{name!r} is {short(value)}, not text")
    return unicode_text(value, name)


def unicode_text(value: Any, name: str) -> Any:
    """The value. Raises RowError where a text in it holds half of a surrogate pair."""
    try:
        check_text(value, name)
    except Unfit as error:
        raise RowError(str(error)) from None
    return value


def messages_prompt(value: Any, name: str) -> list[dict[str, Any]]:
    """Chat messages: a list of {role, content}, or the JSON text of one. Raises RowError that names the message."""
    if value is None:
        raise RowError(f"{name!r} is null")
    if isinstance(value, str | bytes):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RowError(f"{name!r} holds what is {error}") from None
    if not isinstance(value, list) or not value:
        raise RowError(f"{name!r} holds no list of messages")
    messages = []
    for place, message in enumerate(value):
        # an assistant that calls tools may say nothing
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or (message.get("content") is None and not message.get("tool_calls"))
        ):
            raise RowError(f'{name!r}: message {place} needs "role" and "content"')
        messages.append({key: with_doubles(item) for key, item in message.items() if item is not None})
    return unicode_text(messages, name)


class RowReader:
    """Makes the requests of a table.

    Exactly one of ``prompt_column``, ``messages_column`` and ``template`` is given. ``columns`` maps a setting of
    `SETTINGS` to the column that holds it per row; null there means the value of ``params``. ``seed_by_prompt``
    derives seeds from prompts, where rows do not know their place. Raises ConfigurationError for columns that the
    schema lacks or whose type cannot be a prompt.
    """

    def __init__(
        self,
        schema: pa.Schema,
        partitions: Sequence[str],
        params: SamplingParams,
        seed: int,
        *,
        prompt_column: str | None = None,
        messages_column: str | None = None,
        template: str | None = None,
        columns: Mapping[str, str] | None = None,
        seed_by_prompt: bool = False,
    ) -> None:
        self._params, self._seed, self._columns, self._seed_by_prompt = (
            params,
            seed,
            dict(columns or {}),
            seed_by_prompt,
        )
        self._template = None if template is None else Template(template)
        self._prompt: Callable[[dict[str, Any]], Any]
        if prompt_column is not None:
            names, self._prompt = [prompt_column], lambda row: text_prompt(row[prompt_column], prompt_column)
        elif messages_column is not None:
            names, self._prompt = [messages_column], lambda row: messages_prompt(row[messages_column], messages_column)
        else:
            assert self._template is not None
            names, self._prompt = list(self._template.columns), self._template.render
        wanted = [*names, *self._columns.values()]
        for name in wanted:
            if name not in schema.names and name not in partitions:
                raise ConfigurationError(
                    f"the input has no column {name!r}; its columns are: {', '.join([*schema.names, *partitions])}"
                )
        if prompt_column in schema.names and not _is_text(schema.field(prompt_column).type):
            raise ConfigurationError(
                f"column {prompt_column!r} holds {schema.field(prompt_column).type}, not text; --prompt-template "
                f"'{{{prompt_column}}}' writes it as text"
            )
        self._names = [name for name in dict.fromkeys(wanted) if name in schema.names]
        self._json = [name for name in self._names if holds_json(schema.field(name))]

    def rows(
        self, table: pa.Table, part: int, first_row: int, folder: str, skip: Callable[[int], bool]
    ) -> Iterator[Row]:
        """The rows of one part in order, without those that ``skip`` names by their place in it."""
        fixed = partition_values(folder)
        offset = 0
        names = [*self._names, *([ROW_ERROR] if ROW_ERROR in table.schema.names else [])]
        for batch in table.select(names).to_batches(max_chunksize=256) if names else [None] * len(table):
            for row in [{}] if batch is None else _python_rows(batch):
                if not skip(offset):
                    yield self._row(fixed, row, part, offset, first_row + offset)
                offset += 1

    def _row(self, fixed: dict[str, Any], row: dict[str, Any] | RowError, part: int, offset: int, index: int) -> Row:
        try:
            if isinstance(row, RowError):
                raise row
            if row.get(ROW_ERROR):
                raise RowError(row[ROW_ERROR])
            texts = {name: row[name] for name in self._json if row[name] is not None}
            values = {**fixed, **row, **{name: parse_json(texts[name], exact=True, constants=True) for name in texts}}
            params, prompt = self._params, self._prompt(values)
            settings = ((name, _setting(name, values[column])) for name, column in self._columns.items())
            changes = {name: value for name, value in settings if value is not None}
            if params.seed is None and "seed" not in changes and changes.get("temperature", params.temperature) > 0:
                changes["seed"] = row_seed(self._seed, repr(prompt) if self._seed_by_prompt else index)
            if changes:
                params = dataclasses.replace(params, **changes)
            return Row(part, offset, index, prompt, params)
        except Exception as error:
            return Row(part, offset, index, error=str(row_error(error)))


def _python_rows(batch: pa.RecordBatch) -> Sequence[dict[str, Any] | RowError]:
    """The rows as Python values; RowError in the place of a row with a value that Python cannot hold, such as text
    that is not UTF-8 or the year 10000."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, LookupError):  # so rare that only then each row is tried by itself
        return [_python_row(batch, place) for place in range(len(batch))]


def _python_row(batch: pa.RecordBatch, place: int) -> dict[str, Any] | RowError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[place].as_py()
        except UnicodeDecodeError as error:
            return _not_utf8(name, error)
        except (ValueError, OverflowError, LookupError) as error:
            return RowError(f"{name!r} cannot be read: {error}")
    return row


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    kinds = pa.types
    return any(
        is_kind(kind)
        for is_kind in (
            kinds.is_string,
            kinds.is_large_string,
            kinds.is_string_view,
            kinds.is_binary,
            kinds.is_large_binary,
            kinds.is_null,
        )
    )


def _setting(name: str, value: Any) -> Any:
    """A per-row value as its setting's type, from text too (cells of CSV); None where there is none. Raises RowError
    for values that are not of this type.
    """
    kind = SETTINGS[name]
    if value is None or value == "":
        return None
    if name == "stop":
        if isinstance(value, str):
            return unicode_text(value, "stop")
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return tuple(unicode_text(value, "stop"))
    else:
        with contextlib.suppress(ValueError, ArithmeticError):
            number = Decimal(value.strip()) if isinstance(value, str) else value
            # A number such as 1e999999999 would fill the memory as an int.
            small = not isinstance(number, Decimal) or number.adjusted() < 30
            good = isinstance(number, int | float | Decimal) and not isinstance(number, bool) and small
            if good and number == number and (kind is float or kind(number) == number):
                return kind(number)
    wanted = "text or a list of texts" if name == "stop" else "a number" if kind is float else "a whole number"
    raise RowError(f"setting {name} is {short(value)}, wanted {wanted}")
