"""Makes requests of input rows: the prompt and the sampling parameters of each row."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

import pyarrow as pa

from flexbatch.apps.jobs.columns import ROW_ERROR, holds_json
from flexbatch.apps.jobs.files import partition_values
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.prompts import (
    RowError,
    Template,
    messages_prompt,
    not_utf8,
    row_error,
    text_prompt,
    unicode_text,
)
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.policy.suggest import did_you_mean
from flexbatch.request import SamplingParams
from flexbatch.text.files import parse_json, with_doubles
from flexbatch.validation.checks import short
from flexbatch.validation.errors import ConfigurationError
from flexbatch.validation.structured_fields import StructuredOutputsParams

SETTINGS: dict[str, type] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "seed": int,
    "stop": str,
    "lora": str,
    "json_schema": str,
}
"""Settings that a column can hold per row, with the type of its values; ``stop`` may also be a list, and a schema an
object. ``lora`` names an adapter."""
FIELDS = {"json_schema": "structured_outputs"}
"""Fields of SamplingParams that have another name."""


@dataclass
class RowRequest:
    """The request of one input row: ``offset`` counts the rows of its part, ``index`` those of the whole input. With
    ``error`` there is no prompt; ``token_ids`` are those of the prompt once it is encoded."""

    part: int
    offset: int
    index: int
    prompt: Any = None
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    token_ids: Sequence[int] = ()
    error: str = ""
    extra: Any = None
    """Whatever the output of this row needs besides the completion."""
    others: Sequence[RowRequest] = ()
    """Of a row with several prompts, the requests of all but the first."""
    lora: str | None = None
    """The name of its adapter; None: the default."""
    number: int = 0
    prompts: int = 1
    """The request is for prompt ``number`` of so many that the row has."""

    @property
    def requests(self) -> tuple[RowRequest, ...]:
        """Those of all prompts of the row, in order."""
        return self, *self.others


Encode = Callable[[RowRequest], RowRequest]
"""Returns the row with the token ids of its prompt and a number for ``max_tokens``. Raises RowError with the reason why
the row cannot be run."""


class RequestReader(Protocol):
    """Makes the requests of one form of input."""

    def rows(self, table: pa.Table, part: Part, skip: Callable[[int], bool]) -> Iterator[RowRequest]:
        """Yields the requests of one part, whose input rows are ``table``, in order; those whose offset ``skip``
        names are left out."""
        ...


def row_seed(seed: int, key: int | str) -> int:
    """Returns the seed of a row's random stream, 63 bits: from the job's seed and the row's index in the input (or
    its prompt), so that neither order nor restarts change its tokens."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class RowReader:
    """Makes the requests of a table, as ``config`` says: from its column of prompts or messages, else its template.

    A setting that has a column takes its value per row from there; null means the value of ``params``.
    ``seed_by_prompt`` derives seeds from prompts, where the index of a row is not known. Raises ConfigurationError for
    columns that the schema lacks or whose type cannot be a prompt.
    """

    def __init__(
        self,
        config: JobConfig,
        schema: pa.Schema,
        partitions: Sequence[str],
        params: SamplingParams,
        seed: int,
        *,
        seed_by_prompt: bool = False,
    ) -> None:
        self._params, self._seed, self._seed_by_prompt = params, seed, seed_by_prompt
        self._columns, self._tight = config.setting_columns(), config.disable_any_whitespace
        prompts, messages = config.prompt_column, config.messages_column
        self._prompt: Callable[[dict[str, Any]], Any]
        if prompts is not None:
            names, self._prompt = [prompts], lambda row: text_prompt(row[prompts], prompts)
        elif messages is not None:
            names, self._prompt = [messages], lambda row: messages_prompt(row[messages], messages)
        else:
            template = Template(config.prompt_template or "")
            names, self._prompt = list(template.columns), template.render
        wanted = [*names, *self._columns.values()]
        for name in wanted:
            if name not in schema.names and name not in partitions:
                known = [*schema.names, *partitions]
                raise ConfigurationError(
                    f"the input has no column {name!r}{did_you_mean(name, known)}; its columns are: {', '.join(known)}"
                )
        if prompts in schema.names and not _is_text(schema.field(prompts).type):
            raise ConfigurationError(
                f"column {prompts!r} holds {schema.field(prompts).type}, not text; --prompt-template "
                f"'{{{prompts}}}' writes it as text"
            )
        self._names = [name for name in dict.fromkeys(wanted) if name in schema.names]
        self._json = [name for name in self._names if holds_json(schema.field(name))]

    def rows(self, table: pa.Table, part: Part, skip: Callable[[int], bool]) -> Iterator[RowRequest]:
        """Yields the requests of one part in order, without those whose offset ``skip`` names."""
        fixed = partition_values(part.folder)
        offset = 0
        names = [*self._names, *([ROW_ERROR] if ROW_ERROR in table.schema.names else [])]
        for batch in table.select(names).to_batches(max_chunksize=256) if names else [None] * len(table):
            for row in [{}] if batch is None else _python_rows(batch):
                if not skip(offset):
                    yield self._request(fixed, row, part, offset)
                offset += 1

    def _request(self, fixed: dict[str, Any], row: dict[str, Any] | RowError, part: Part, offset: int) -> RowRequest:
        index = part.first_row + offset
        try:
            if isinstance(row, RowError):
                raise row
            if row.get(ROW_ERROR):
                raise RowError(row[ROW_ERROR])
            texts = {name: row[name] for name in self._json if row[name] is not None}
            values = {**fixed, **row, **{name: parse_json(texts[name], exact=True, constants=True) for name in texts}}
            params, prompt = self._params, self._prompt(values)
            settings = ((name, _setting(name, values[column])) for name, column in self._columns.items())
            changes = {FIELDS.get(name, name): value for name, value in settings if value is not None}
            lora = changes.pop("lora", None)
            if self._tight and "structured_outputs" in changes:
                form = dataclasses.replace(changes["structured_outputs"], disable_any_whitespace=True)
                changes["structured_outputs"] = form
            if params.seed is None and "seed" not in changes and changes.get("temperature", params.temperature) > 0:
                changes["seed"] = row_seed(self._seed, repr(prompt) if self._seed_by_prompt else index)
            if changes:
                params = dataclasses.replace(params, **changes)
            return RowRequest(part.number, offset, index, prompt, params, lora=lora)
        except Exception as error:
            return RowRequest(part.number, offset, index, error=str(row_error(error)))


def _python_rows(batch: pa.RecordBatch) -> Sequence[dict[str, Any] | RowError]:
    """Returns the rows as Python values; RowError instead of a row with a value that Python cannot hold, such as
    text that is not UTF-8 or the year 10000."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, LookupError):  # so rare that only then each row is tried by itself
        return [_python_row(batch, offset) for offset in range(len(batch))]


def _python_row(batch: pa.RecordBatch, offset: int) -> dict[str, Any] | RowError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[offset].as_py()
        except UnicodeDecodeError as error:
            return not_utf8(name, error)
        except (ValueError, OverflowError, LookupError) as error:
            return RowError(f"{name!r} cannot be read: {error}")
    return row


def without_nulls(value: Any) -> Any:
    """Returns an object without the fields that are null: a column of objects gives each all the fields of any."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    names = ("string", "large_string", "string_view", "binary", "large_binary", "null")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)


def _setting(name: str, value: Any) -> Any:
    """Returns a per-row value as its setting's type, from text too (cells of CSV); None where there is none. Raises
    RowError for values that are not of this type."""
    kind = SETTINGS[name]
    if value is None or value == "":
        return None
    if name == "json_schema":
        given = value if isinstance(value, str) else without_nulls(with_doubles(value))
        return StructuredOutputsParams(json=unicode_text(given, name))
    if name == "lora":
        if isinstance(value, str):
            return unicode_text(value, "lora")
    elif name == "stop":
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
    words = {"stop": "text or a list of texts", "lora": "the name of an adapter"}
    wanted = words.get(name, "a number" if kind is float else "a whole number")
    raise RowError(f"setting {name} is {short(value)}, wanted {wanted}")
