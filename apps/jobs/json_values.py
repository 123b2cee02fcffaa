"""Parsed JSON values as Arrow takes them for the type of their column (`json_types`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.columns import UnfitValue, check_text, holds_json
from flexbatch.text.files import json_text
from flexbatch.validation.checks import short


def converter(field: pa.Field) -> Callable[[Any], Any]:
    """Makes of a value, parsed with its numbers exact, what Arrow takes for a field. It raises UnfitValue for one that
    the field does not hold."""
    make = json_text if holds_json(field) else _converter(field.type, field.name or "the answer")
    return lambda value: None if value is None else make(value)


def _converter(kind: pa.DataType, name: str) -> Callable[[Any], Any]:
    if pa.types.is_struct(kind):
        fields = [(each.name, converter(each)) for each in kind]
        return lambda value: {key: make(_is(value, dict, kind, name).get(key)) for key, make in fields}
    if pa.types.is_map(kind):
        inner = converter(kind.item_field)
        return lambda value: [(_text(key, name), inner(each)) for key, each in _is(value, dict, kind, name).items()]
    if pa.types.is_list(kind):
        item = converter(kind.value_field.with_name(name))
        return lambda value: [item(each) for each in _is(value, list, kind, name)]
    if pa.types.is_string(kind):
        return lambda value: _text(_is(value, str, kind, name), name)
    if pa.types.is_boolean(kind):
        return lambda value: _is(value, bool, kind, name)
    return lambda value: _number(value, kind, name)


def _is(value: Any, wanted: type, kind: pa.DataType, name: str) -> Any:
    if type(value) is not wanted:
        raise UnfitValue(f"{name}: {short(value)} is no {kind}")
    return value


def _text(value: str, name: str) -> str:
    check_text(value, name)
    return value


def _number(value: Any, kind: pa.DataType, name: str) -> Any:
    if type(value) in (int, Decimal):
        if pa.types.is_floating(kind) and math.isfinite(found := _double(value)):
            return found
        if pa.types.is_decimal(kind):
            exact = Decimal(value)
            if exact.adjusted() < kind.precision - kind.scale and exact.as_tuple().exponent >= -kind.scale:
                return exact
        if pa.types.is_integer(kind):
            least, most = (-(2**63), 2**63) if pa.types.is_signed_integer(kind) else (0, 2**64)
            if least <= value < most and value == int(value):
                return int(value)
    raise UnfitValue(f"{name}: {short(value)} is no {kind}")


def _double(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
