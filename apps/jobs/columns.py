"""Values of text files as Arrow columns: the types of JSON values over all lines, the types that the user gives, and
what no type holds.

Nothing is rounded. A whole number is int64, uint64 or a decimal, whichever is the first to hold all of its column. A
number with a point is a double where
the double, printed with as many digits, gives the same number; otherwise its column is a decimal. A column whose values
are of several kinds, or fit no
type, holds the JSON text of each value, and its field says so (`JSON_FIELD`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa

from flexbatch.policy.suggest import did_you_mean
from flexbatch.text.files import json_text, lone_surrogate
from flexbatch.validation.checks import short
from flexbatch.validation.errors import ConfigurationError

JSON_FIELD = {b"flexbatch.json": b"1"}
"""Metadata of a string column that holds JSON texts."""
ROW_ERROR = "\x00row error"
"""Column of a source besides those of the input: why a row could not be read, null for the others. It exists only
where there are such rows."""
MOST_DIGITS, MOST_FIELDS, DEEPEST_TYPE = 76, 1000, 30
DECIMAL = re.compile(r"decimal(?:128|256)?\((\d+),\s*(\d+)\)")


class UnfitValue(ValueError):
    """A value that its column does not hold; the message says which and why."""


@dataclass
class Numbers:
    """The properties that the numbers of one column have in common."""

    whole: bool = True
    doubles: bool = True
    least: int = 0
    most: int = 0
    digits: int = 0
    """The most digits before the decimal point."""
    scale: int = 0
    """The most digits after the decimal point."""

    def add(self, value: int | Decimal | float) -> None:
        if type(value) is int:
            self.least, self.most = min(self.least, value), max(self.most, value)
            self.doubles = self.doubles and (-(2**53) <= value <= 2**53 or _is_double(Decimal(value)))
            return
        self.whole = False
        if not isinstance(value, Decimal):  # NaN and infinities, as Python's json writes them, are in no decimal
            self.digits = MOST_DIGITS + 1
            return
        self.doubles = self.doubles and _is_double(value)
        exponent = value.as_tuple().exponent
        assert isinstance(exponent, int)
        self.digits, self.scale = max(self.digits, value.adjusted() + 1, 1), max(self.scale, -exponent)

    def type(self) -> pa.DataType | None:
        if self.whole and self.least >= -(2**63):
            if self.most < 2**63:
                return pa.int64()
            if self.least >= 0 and self.most < 2**64:
                return pa.uint64()
        if self.doubles and not self.whole:
            return pa.float64()
        precision = max(self.digits, len(str(max(-self.least, self.most)))) + self.scale
        if precision > MOST_DIGITS:
            return None
        return pa.decimal128(38, self.scale) if precision <= 38 else pa.decimal256(MOST_DIGITS, self.scale)


def _is_double(value: Decimal) -> bool:
    """Returns whether a double holds the number: printed with as many digits, it is the number again."""
    if not -400 < value.adjusted() < 400:
        return not value
    digits = len(value.as_tuple().digits)
    return digits <= 1100 and Decimal(f"{float(value):.{max(digits - 1, 0)}e}") == value


@dataclass
class ObservedValues:
    """The values seen so far of one column, or of one field of nested ones: the type that holds them all follows
    from them."""

    scalars: set[type] = field(default_factory=set)
    numbers: Numbers | None = None
    items: ObservedValues | None = None
    fields: dict[str, ObservedValues] | None = None

    def add(self, value: Any) -> None:
        kind = type(value)
        if value is None:
            return
        if kind is str or kind is bool:
            self.scalars.add(kind)
        elif kind is dict:
            self.fields = {} if self.fields is None else self.fields
            for name, item in value.items():
                if name not in self.fields:
                    self.fields[name] = ObservedValues()
                self.fields[name].add(item)
        elif kind is list:
            self.items = ObservedValues() if self.items is None else self.items
            for item in value:
                self.items.add(item)
        else:
            self.numbers = Numbers() if self.numbers is None else self.numbers
            self.numbers.add(value)

    def type(self, depth: int = 0) -> pa.DataType | None:
        """Returns the type, or None where only JSON text holds all the values."""
        if (
            len(self.scalars) + (self.numbers is not None) + (self.items is not None) + (self.fields is not None) > 1
            or depth > DEEPEST_TYPE
        ):
            return None
        if self.scalars:
            return pa.string() if str in self.scalars else pa.bool_()
        if self.numbers is not None:
            return self.numbers.type()
        if self.items is not None:
            inner = self.items.type(depth + 1)
            return None if inner is None else pa.list_(inner)
        if self.fields is None:
            return pa.null()
        if (
            not 0 < len(self.fields) <= MOST_FIELDS
        ):  # Parquet has no objects without a field; as many as that are keys of a map
            return None
        types = {name: seen.type(depth + 1) for name, seen in self.fields.items()}
        return None if None in types.values() else pa.struct(list(types.items()))

    def field(self, name: str) -> pa.Field:
        kind = self.type()
        return pa.field(name, kind) if kind is not None else pa.field(name, pa.string(), metadata=JSON_FIELD)


def holds_json(column: pa.Field) -> bool:
    return JSON_FIELD.items() <= (column.metadata or {}).items()


def _sizable(value: Any) -> Any:
    """Returns the value. Raises UnfitValue for a number that no type holds: Arrow would write out every digit of
    1e999999999."""
    if isinstance(value, Decimal) and not -MOST_DIGITS <= value.adjusted() <= MOST_DIGITS and value:
        raise UnfitValue(f"{value} has more digits than any type holds")
    return value


def arrow_value(kind: pa.DataType) -> Callable[[Any], Any]:
    """Returns the function that makes of a parsed JSON value what Arrow takes for this type: doubles of Decimals
    where the column is one of doubles."""
    if pa.types.is_floating(kind):
        return float
    if pa.types.is_decimal(kind):
        return lambda value: _sizable(Decimal(value))
    if pa.types.is_list(kind):
        inner = arrow_value(kind.value_type)
        return lambda value: [None if item is None else inner(item) for item in value]
    if pa.types.is_struct(kind):
        fields = [(entry.name, arrow_value(entry.type)) for entry in kind]
        return lambda value: {name: None if value.get(name) is None else make(value[name]) for name, make in fields}
    return _sizable


def check_text(value: Any, name: str) -> None:
    """Raises UnfitValue where a text, or one anywhere in a value, is no Unicode text."""
    if isinstance(value, str):
        index = lone_surrogate(value)
        if index >= 0:
            raise UnfitValue(
                f"{name!r} holds half of a surrogate pair, {value[index].encode('unicode_escape').decode()}, at "
                f"character {index}: no Unicode text"
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, name)
            check_text(item, name)
    elif isinstance(value, list | tuple):
        for item in value:
            check_text(item, name)


def parse_types(words: Sequence[str]) -> dict[str, pa.DataType]:
    """Parses ``("id=int64", "price=decimal(10,2)")``. Raises ConfigurationError that names the word."""
    types: dict[str, pa.DataType] = {}
    for word in words:
        name, separator, kind = word.rpartition("=")
        if not separator or not name:
            raise ConfigurationError(f"column_types={word!r} must be COLUMN=TYPE, e.g. id=int64")
        if name in types:
            raise ConfigurationError(f"column_types: {name!r} stands there twice")
        match = DECIMAL.fullmatch(kind)
        try:
            types[name] = _decimal(int(match[1]), int(match[2])) if match else pa.type_for_alias(kind)
            pa.array([], pa.string()).cast(types[name])
        except (ValueError, pa.ArrowException):
            raise ConfigurationError(
                f"column_types={word!r}: {kind!r} is no type; there are string, bool, int8 to int64, uint8 to "
                "uint64, float32, float64, decimal(digits,scale), "
                "date32, timestamp[s] to timestamp[ns] and the other names of Arrow"
            ) from None
    return types


def _decimal(precision: int, scale: int) -> pa.DataType:
    return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)


def column(
    values: Sequence[Any], kind: pa.Field, errors: list[str | None], make: Callable[[Sequence[Any]], pa.Array]
) -> pa.Array:
    """Returns ``make`` of all values. One that does not fit is null, and the reason goes to its index in ``errors``
    unless there is one already."""
    try:
        return make(values)
    except (pa.ArrowException, ValueError, TypeError, ArithmeticError):
        pieces = []
        for index, value in enumerate(values):
            try:
                pieces.append(make([value]))
            except (pa.ArrowException, ValueError, TypeError, ArithmeticError) as error:
                errors[index] = errors[index] or (
                    str(error)
                    if isinstance(error, UnfitValue)
                    else f"column {kind.name!r}: {short(value)} is no {kind.type}"
                )
                pieces.append(pa.nulls(1, kind.type))
        return pa.concat_arrays(pieces)


def json_column(values: Sequence[Any], kind: pa.Field, errors: list[str | None]) -> pa.Array:
    """Returns parsed JSON values as their column; see `column`. In a column of text, a value that is no text is its
    JSON."""
    convert = json_text if holds_json(kind) else text_of if pa.types.is_string(kind.type) else arrow_value(kind.type)
    return column(
        values,
        kind,
        errors,
        lambda chosen: pa.array([None if value is None else convert(value) for value in chosen], kind.type),
    )


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json_text(value)


def text_column(values: Sequence[str | None], kind: pa.Field, errors: list[str | None]) -> pa.Array:
    """Returns texts as the type that the user gives; see `column`. An empty one is null, except in a column of text.

    Bytes that are not UTF-8 come as surrogate escapes: no reader could read the column that held them as text.
    """
    if not pa.types.is_string(kind.type):
        return column(
            values,
            kind,
            errors,
            lambda chosen: pa.array([value or None for value in chosen], pa.string()).cast(kind.type),
        )
    try:
        return pa.array(values, kind.type)
    except UnicodeEncodeError:
        return column(
            values, kind, errors, lambda chosen: pa.array([_utf8(value, kind.name) for value in chosen], kind.type)
        )


def _utf8(value: str | None, name: str) -> str | None:
    try:
        return None if value is None else value.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise UnfitValue(f"{name!r} is not UTF-8: {error.reason} at byte {error.start}") from None


def refuse_reserved(columns: Iterable[str], file: str) -> None:
    """Raises ConfigurationError where a column has the name of the column that holds the errors of rows."""
    if ROW_ERROR in columns:
        raise ConfigurationError(
            f"{file}: a column has the name {ROW_ERROR!r}, which FlexBatch keeps for itself: rename it"
        )


def check_names(types: Iterable[str], columns: Iterable[str]) -> None:
    """Raises ConfigurationError for a type of a column that the input does not have."""
    known = list(columns)
    if unknown := [name for name in types if name not in known]:
        raise ConfigurationError(
            f"column_types: the input has no column {unknown[0]!r}{did_you_mean(unknown[0], known)}; its columns are: "
            f"{', '.join(known)}"
        )
