"""200 JSON schemas in the style of public ones: small ones of every keyword (`schemas.SCHEMAS`), whole documents as
APIs and data sets have them, and every kind of value in every kind of place, built by a rule."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

from tests.schemas import SCHEMAS, SHORT, fields, items

COUNT = 200
Schema = dict[str, Any]


def text(**bounds: Any) -> Schema:
    return {"type": "string", **bounds}


def number(**bounds: Any) -> Schema:
    return {"type": "number", **bounds}


def whole(**bounds: Any) -> Schema:
    return {"type": "integer", **bounds}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


NAME = text(minLength=1, maxLength=8)
MONEY = number(minimum=0, maximum=9999)
SCORE = number(minimum=0, maximum=1)
DATE = text(format="date")
DOCUMENTS: dict[str, Schema] = {
    "person": fields(name=NAME, age=whole(minimum=0, maximum=130), email=nullable(text(maxLength=9))),
    "address": fields(street=NAME, zip=text(pattern="^[0-9]{5}$"), country=one_of("DE", "US", "JP")),
    "invoice": fields(
        id=text(pattern="^INV-[0-9]{4}$"),
        lines=items(fields(sku=text(pattern="^[A-Z]{3}$"), count=whole(minimum=1, maximum=9)), minItems=1, maxItems=2),
        total=MONEY,
    ),
    "sentiment": fields(label=one_of("positive", "negative", "neutral"), confidence=SCORE),
    "entities": items(fields(text=SHORT, kind=one_of("PER", "ORG", "LOC", "MISC")), maxItems=3),
    "triple": fields(subject=SHORT, relation=one_of("born in", "works for"), object=SHORT),
    "question": fields(answer=nullable(SHORT), evidence=items(whole(minimum=0, maximum=99), maxItems=3)),
    "multiple choice": fields(answer=one_of("A", "B", "C", "D"), reason=SHORT),
    "geo point": fields(
        type={"const": "Point"},
        coordinates={
            "type": "array",
            "prefixItems": [number(minimum=-180, maximum=180), number(minimum=-90, maximum=90)],
            "items": False,
            "minItems": 2,
        },
    ),
    "geo feature": {
        "$defs": {"position": items(number(minimum=-180, maximum=180), minItems=2, maxItems=2)},
        **fields(type={"const": "Feature"}, line=items({"$ref": "#/$defs/position"}, minItems=2, maxItems=2)),
    },
    "package": fields(
        name=text(pattern="^[a-z][a-z0-9-]{0,8}$"),
        version=text(pattern=r"^\d{1,2}\.\d{1,2}\.\d{1,2}$"),
        private={"type": "boolean"},
        keywords=items(SHORT, maxItems=2),
    ),
    "issue": fields(title=NAME, labels=items(one_of("bug", "docs"), maxItems=2), state=one_of("open", "closed")),
    "tool call": {
        "anyOf": [
            fields(name={"const": "search"}, arguments=fields(query=SHORT)),
            fields(name={"const": "add"}, arguments=fields(a=whole(minimum=0, maximum=9), b=whole(minimum=0))),
        ]
    },
    "event": fields(start=text(format="date-time"), end=nullable(text(format="date-time")), busy={"type": "boolean"}),
    "comment tree": {
        "$defs": {"comment": fields(by=one_of("a", "b"), replies=items({"$ref": "#/$defs/comment"}, maxItems=1))},
        "$ref": "#/$defs/comment",
    },
    "expression": {
        "$defs": {
            "term": {
                "anyOf": [
                    whole(minimum=0, maximum=9),
                    fields(op=one_of("+", "*"), of=items({"$ref": "#/$defs/term"}, minItems=2, maxItems=2)),
                ]
            }
        },
        "$ref": "#/$defs/term",
    },
    "file system": {
        "$defs": {
            "entry": {
                "anyOf": [
                    fields(file=text(pattern=r"^[a-z]{1,4}\.(py|md)$")),
                    fields(folder=one_of("src", "docs"), entries=items({"$ref": "#/$defs/entry"}, maxItems=2)),
                ]
            }
        },
        **fields(root={"$ref": "#/$defs/entry"}),
    },
    "menu": fields(
        **{f"{day}": fields(dish=SHORT, vegan={"type": "boolean"}, price=MONEY) for day in ("mon", "tue", "wed")}
    ),
    "patient": fields(
        resourceType={"const": "Patient"},
        name=items(fields(family=SHORT, given=items(SHORT, minItems=1, maxItems=2)), minItems=1, maxItems=1),
        gender=one_of("male", "female", "other", "unknown"),
        birthDate=DATE,
    ),
    "config": {
        "type": "object",
        "properties": {"host": text(format="hostname"), "port": whole(minimum=1, maximum=65535), "debug": {}},
        "required": ["host"],
        "additionalProperties": False,
        "patternProperties": {},
    },
    "settings": {"type": "object", "additionalProperties": {"type": ["boolean", "null"]}, "maxProperties": 2},
    "log line": fields(level=one_of("INFO", "WARN"), at=text(format="time"), code=nullable(whole(minimum=100))),
    "unit": {"allOf": [{"$ref": "#/$defs/base"}, {"properties": {"extra": SHORT}, "required": ["extra"]}],
             "$defs": {"base": {"type": "object", "properties": {"id": whole(minimum=0)}, "required": ["id"]}}},
    "grüße": fields(**{"straße": SHORT, "число": whole(minimum=-9, maximum=9), "名前": one_of("山", "川"), "🙂": NAME}),
    "escapes": fields(**{'quo"te': one_of('a"b', "c\\d"), "line\nend": {"const": "\t"}, "sl/ash": one_of("/", "</p>")}),
    "matrix": items(items(whole(minimum=0, maximum=9), minItems=2, maxItems=2), minItems=2, maxItems=2),
    "yes or no": {"type": "boolean"},
    "rating": whole(minimum=1, maximum=5),
    "const document": {"const": {"a": [1, 2.5, None, {"b": "größe"}], "c": True}},
    "any": fields(anything={"type": ["string", "integer", "boolean", "null"], "maxLength": 4, "minimum": 0}),
    "draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"positive": whole(exclusiveMinimum=0)},
        **fields(count={"$ref": "#/definitions/positive"}, pair={"type": "array", "items": SHORT, "maxItems": 1}),
    },
    "pydantic": {
        "title": "Order",
        "$defs": {"Size": {"enum": ["S", "M"], "title": "Size", "type": "string"}},
        "type": "object",
        "properties": {
            "size": {"$ref": "#/$defs/Size"},
            "note": {"anyOf": [SHORT, {"type": "null"}], "default": None, "title": "Note"},
        },
        "required": ["size"],
        "additionalProperties": False,
    },
}  # fmt: skip
VALUES: dict[str, Schema] = {
    "short text": SHORT,
    "text of 3": text(minLength=3, maxLength=3),
    "code": text(pattern="^[A-Z]{2}[0-9]{2}$"),
    "part of a text": text(pattern="ab", maxLength=6),
    "begins": text(pattern="^x", maxLength=5),
    "or": text(pattern="^(yes|no|[0-9]+ times)$", maxLength=10),
    "greek": text(pattern="^[α-ω]{2,4}$"),
    "hex": text(pattern="^#[0-9a-fA-F]{6}$"),
    "dotted": text(pattern=r"^\w{1,3}\.\w{1,3}$"),
    "texts": one_of("low", "medium", "high", "größer als", ""),
    "mixed": one_of(1, "1", None, True, 2.5, [1], {"a": 1}),
    "constant": {"const": "v1.0"},
    "constant zero": {"const": 0},
    "whole": whole(minimum=-20, maximum=20),
    "positive": whole(exclusiveMinimum=0, maximum=1000),
    "large": whole(minimum=10**9, maximum=10**12),
    "even": whole(multipleOf=2, minimum=0, maximum=50),
    "quarters": number(multipleOf=0.25, minimum=0, maximum=10),
    "share": SCORE,
    "negative": number(maximum=-1, minimum=-5),
    "open": number(exclusiveMinimum=0, exclusiveMaximum=1),
    "flag": {"type": "boolean"},
    "nothing": {"type": "null"},
    "flag or nothing": {"type": ["boolean", "null"]},
    "whole or text": {"anyOf": [whole(minimum=0, maximum=99), SHORT]},
    "bounded or const": {"anyOf": [whole(minimum=0, maximum=9), {"const": "many"}]},
    "exactly one": {"oneOf": [{"type": "boolean"}, whole(minimum=0, maximum=9)]},
    "both": {"allOf": [whole(minimum=3), whole(maximum=30)]},
    "date": DATE,
    "address": text(format="ipv4"),
    "uuid": text(format="uuid"),
    "list": items(one_of(1, 2), minItems=1, maxItems=2),
    "object": fields(x={"type": "boolean"}),
}
PLACEMENTS: dict[str, Callable[[Schema], Schema]] = {
    "field": lambda value: fields(value=value),
    "among others": lambda value: fields(before={"type": "boolean"}, value=value, after=one_of("x", "y")),
    "optional": lambda value: {"type": "object", "properties": {"value": value, "z": {"type": "null"}},
                               "additionalProperties": False},
    "nullable": lambda value: fields(value=nullable(value)),
    "array": lambda value: fields(values=items(value, minItems=1, maxItems=2)),
    "top array": lambda value: items(value, minItems=1, maxItems=2),
    "tuple": lambda value: {"type": "array", "prefixItems": [value, {"type": "boolean"}], "items": False,
                            "minItems": 2},
    "map": lambda value: {"type": "object", "additionalProperties": value, "maxProperties": 1},
    "pattern of names": lambda value: {"type": "object", "patternProperties": {"^k[0-9]$": value},
                                       "additionalProperties": False, "maxProperties": 1},
    "nested": lambda value: fields(a=fields(b=fields(c=value))),
    "definition": lambda value: {"$defs": {"d": value}, **fields(p={"$ref": "#/$defs/d"}, q={"$ref": "#/$defs/d"})},
    "recursive": lambda value: fields(value=value, next=nullable({"$ref": "#"})),
    "all of": lambda value: {"allOf": [{"type": "object", "properties": {"a": value}, "required": ["a"]},
                                       {"properties": {"b": {"type": "null"}}}]},
    "variants": lambda value: {"anyOf": [fields(kind={"const": "v"}, value=value), fields(kind={"const": "none"})]},
    "top": lambda value: value,
    "described": lambda value: {"title": "T", "description": "D", **fields(value={"description": "d", **value})},
    "named by others": lambda value: fields(**{"$id": value, "größe": {"type": "null"}}),
}  # fmt: skip


def built(count: int) -> dict[str, Schema]:
    """So many values in places, of which every two neighbors differ in both: 33 and 17 have no common divisor."""
    pairs = islice(zip(cycle(VALUES.items()), cycle(PLACEMENTS.items())), count)
    return {f"{value}, {placement}": make(schema) for (value, schema), (placement, make) in pairs}


PUBLIC: dict[str, Schema] = {**SCHEMAS, **DOCUMENTS}
PUBLIC |= built(COUNT - len(PUBLIC))
