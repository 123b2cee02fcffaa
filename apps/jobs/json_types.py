"""Arrow types of the answers to a JSON schema.

Objects with declared properties are structs, others maps where all their values have one type; arrays are lists; what
may be null, or absent, is null. Alternatives have the type that holds them all: of objects, a struct with the fields of
each. What has no such type (any value, text or number, a schema within itself) is a text column of JSON, and its field
says so (`columns.JSON_FIELD`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from flexbatch.apps.jobs.columns import (
    DEEPEST_TYPE,
    JSON_FIELD,
    MOST_FIELDS,
    ObservedValues,
    holds_json,
)
from flexbatch.validation.checks import short

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ITEM = "item"
Part = Mapping[str, Any]


class Untyped(ValueError):
    """Values that no one Arrow type holds; the message says why."""


class SchemaTypes:
    """The type of the values of one JSON schema, parsed with its numbers exact. ``reasons`` says by its path why a
    value is JSON text; ``open`` lists the paths of objects that may have properties which their struct has not."""

    def __init__(self, schema: Any) -> None:
        self._schema, self._fields = schema, 0
        self.reasons: dict[str, str] = {}
        self.open: list[str] = []

    def field(self, name: str) -> pa.Field:
        """The column of the values."""
        return self._field(name, self._schema, "$", frozenset())

    def _field(self, name: str, schema: Any, path: str, seen: frozenset[str]) -> pa.Field:
        try:
            self._fields += 1
            if self._fields > MOST_FIELDS:
                raise Untyped(f"more than {MOST_FIELDS:,} fields")
            if path.count(".") + path.count("[") > DEEPEST_TYPE:
                raise Untyped(f"nested more than {DEEPEST_TYPE} deep")
            found = self._typed(schema, path, seen)
            return found.with_name(name)
        except Untyped as reason:
            self.reasons[path] = str(reason)
            return json_field(name)

    def _typed(self, schema: Any, path: str, seen: frozenset[str]) -> pa.Field:
        """The type of the values as an unnamed field. Raises Untyped."""
        parts, seen = self._parts(schema, seen)
        for part in parts:
            if "const" in part or "enum" in part:
                return of_values([part["const"]] if "const" in part else part["enum"])
        for index, part in enumerate(parts):
            for key in ("anyOf", "oneOf"):
                if key in part:
                    rest = [*parts[:index], {name: value for name, value in part.items() if name != key}]
                    both = [{"allOf": [*rest, *parts[index + 1 :], branch]} for branch in part[key]]
                    return reduce(united, [self._typed(branch, path, seen) for branch in both])
        kinds = set(TYPES)
        for part in parts:
            named = part.get("type", TYPES)
            kinds &= {named} if isinstance(named, str) else set(named)
        kinds -= {"null"} if len(kinds) > 1 else set()
        kinds -= {"integer"} if "number" in kinds else set()
        if len(kinds) != 1:
            raise Untyped("any value" if len(kinds) > 3 else " or ".join(sorted(kinds)))
        (kind,) = kinds
        if kind == "object":
            return self._object(parts, path, seen)
        if kind == "array":
            return self._array(parts, path, seen)
        plain = {"null": pa.null(), "boolean": pa.bool_(), "string": pa.string(), "number": pa.float64()}
        return unnamed(whole_type(parts) if kind == "integer" else plain[kind])

    def _parts(self, schema: Any, seen: frozenset[str]) -> tuple[list[Part], frozenset[str]]:
        """The schemas that hold together, without references and ``allOf``, and all references on the way there."""
        if not isinstance(schema, Mapping):
            return [], seen
        here = {name: value for name, value in schema.items() if name not in ("$ref", "allOf")}
        parts: list[Part] = [here] if here else []
        if isinstance(reference := schema.get("$ref"), str):
            if reference in seen or reference == "#":
                raise Untyped("a schema within itself")
            found, seen = self._parts(self._referred(reference), seen | {reference})
            parts += found
        for branch in schema.get("allOf", ()):
            found, seen = self._parts(branch, seen)
            parts += found
        return parts, seen

    def _referred(self, reference: str) -> Any:
        found = self._schema
        if not reference.startswith("#/"):
            raise Untyped(f"a reference to {short(reference)}")
        for name in unquote(reference[2:]).split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(name)] if isinstance(found, Sequence) else found[name]
            except (KeyError, IndexError, ValueError, TypeError):
                raise Untyped(f"a reference to {short(reference)}, which is not there") from None
        return found

    def _object(self, parts: Iterable[Part], path: str, seen: frozenset[str]) -> pa.Field:
        declared: dict[str, list[Any]] = {}
        for part in parts:
            for name, schema in part.get("properties", {}).items():
                declared.setdefault(name, []).append(schema)
        declared = {name: found for name, found in declared.items() if False not in found}
        closed = any(part.get("additionalProperties") is False for part in parts)
        others = [schema for part in parts for schema in part.get("patternProperties", {}).values()]
        others += [part["additionalProperties"] for part in parts if isinstance(part.get("additionalProperties"), dict)]
        if declared:
            if others or not closed:
                self.open.append(path)
            fields = [self._field(name, {"allOf": all_}, f"{path}.{name}", seen) for name, all_ in declared.items()]
            return unnamed(pa.struct(fields))
        if not others:
            raise Untyped("an object without a property" if closed else "an object of any properties")
        values = reduce(united, [self._field("value", schema, f"{path}.*", seen) for schema in others])
        return unnamed(pa.map_(pa.string(), values.with_name("value")))

    def _array(self, parts: Sequence[Part], path: str, seen: frozenset[str]) -> pa.Field:
        first: list[Any] = []
        rest: list[Any] = []
        for part in parts:
            items = part.get("items", True)
            prefix, items = (items, part.get("additionalItems", True)) if isinstance(items, list) else ((), items)
            prefix = [*prefix, *part.get("prefixItems", ())]
            first += [schema for schema in prefix if schema is not False]
            if isinstance(items, dict) or (items is True and "maxItems" not in part and prefix):
                rest.append(items)
        wanted = first + rest
        if not wanted:
            if any(part.get("items") is False or part.get("maxItems") == 0 for part in parts):
                return unnamed(pa.list_(pa.field(ITEM, pa.null())))
            wanted = [True]
        try:
            found = reduce(united, [self._field(ITEM, schema, f"{path}[]", seen) for schema in wanted])
        except Untyped as reason:
            self.reasons[f"{path}[]"], found = str(reason), json_field(ITEM)
        return unnamed(pa.list_(found.with_name(ITEM)))


def unnamed(kind: pa.DataType) -> pa.Field:
    return pa.field("", kind)


def json_field(name: str) -> pa.Field:
    return pa.field(name, pa.string(), metadata=JSON_FIELD)


def of_values(values: Sequence[Any]) -> pa.Field:
    """The type that holds all of some values. Raises Untyped."""
    seen = ObservedValues()
    for value in values:
        seen.add(value)
    if (kind := seen.type()) is None:
        raise Untyped("values of several types")
    return unnamed(kind)


def whole_type(parts: Iterable[Part]) -> pa.DataType:
    """int64, unless the bounds say that it does not hold all the values. Raises Untyped where nothing does."""
    least = max((part["minimum"] for part in parts if "minimum" in part), default=None)
    most = min((part["maximum"] for part in parts if "maximum" in part), default=None)
    if (least is None or least >= -(2**63)) and (most is None or most < 2**63):
        return pa.int64()
    if least is not None and least >= 0 and most is not None and most < 2**64:
        return pa.uint64()
    if max(abs(least or 0), abs(most or 0)) < 10**38:
        return pa.decimal128(38, 0)
    raise Untyped("whole numbers of more than 38 digits")


def united(one: pa.Field, other: pa.Field) -> pa.Field:
    """The type that holds the values of both. Raises Untyped."""
    a, b = one.type, other.type
    if holds_json(one) or holds_json(other):
        raise Untyped("several types")
    if a == b or pa.types.is_null(b):
        return one
    if pa.types.is_null(a):
        return other
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        names = dict.fromkeys([*(each.name for each in a), *(each.name for each in b)])
        held = {name: [kind.field(name) for kind in (a, b) if kind.get_field_index(name) >= 0] for name in names}
        return unnamed(pa.struct([_common(name, fields) for name, fields in held.items()]))
    if pa.types.is_list(a) and pa.types.is_list(b):
        return unnamed(pa.list_(_common(ITEM, [a.value_field, b.value_field])))
    numbers = [pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal]
    if all(any(test(kind) for test in numbers) for kind in (a, b)):
        return unnamed(pa.float64() if pa.types.is_floating(a) or pa.types.is_floating(b) else pa.decimal128(38, 0))
    raise Untyped(f"{a} or {b}")


def _common(name: str, fields: Sequence[pa.Field]) -> pa.Field:
    try:
        return reduce(united, fields).with_name(name)
    except Untyped:
        return json_field(name)


def told_types(types: SchemaTypes, field: pa.Field) -> Iterator[str]:
    """What the log says of a column before a job begins."""
    yield f"column {field.name}: {'JSON text' if holds_json(field) else field.type}"
    texts = [path for path, each in nested(field) if holds_json(each)]
    if texts:
        listed = [f"{path} ({types.reasons.get(path, 'alternatives of several types')})" for path in texts]
        yield f"no one Arrow type holds these, which are JSON text: {', '.join(listed)}"
    structs = {path for path, each in nested(field) if pa.types.is_struct(each.type)}
    open_ = [path for path in dict.fromkeys(types.open) if path in structs]
    if open_:
        yield (
            "the schema allows properties that it does not declare, which are in the text of an answer alone: in "
            f'{", ".join(open_)} ("additionalProperties": false allows no others)'
        )


def nested(field: pa.Field, path: str = "$") -> Iterator[tuple[str, pa.Field]]:
    """A column and all fields within it, by their paths."""
    yield path, field
    if pa.types.is_struct(field.type):
        for each in field.type:
            yield from nested(each, f"{path}.{each.name}")
    elif pa.types.is_list(field.type):
        yield from nested(field.type.value_field, f"{path}[]")
    elif pa.types.is_map(field.type):
        yield from nested(field.type.item_field, f"{path}.*")
