"""JSON schemas of many kinds, as they are in public use, and those that cannot be followed."""

from __future__ import annotations

from typing import Any

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
SHORT = {"type": "string", "maxLength": 6}


def fields(**properties: Any) -> dict[str, Any]:
    """An object with all of these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def items(schema: Any, **bounds: Any) -> dict[str, Any]:
    return {"type": "array", "items": schema, **bounds}


FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "duration")
SCHEMAS: dict[str, Any] = {
    "flat": fields(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "enum": fields(kind={"enum": ["a", "b", "größer", 1, 2.5, None, True]}),
    "const": fields(v={"const": {"a": [1, "x"]}}),
    "bounds": fields(n={"type": "integer", "minimum": -3, "maximum": 120}, x={"type": "number", "minimum": 0}),
    "exclusive": fields(n={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
    "multiple": fields(n={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500}),
    "array": fields(tags=items(SHORT, minItems=1, maxItems=3)),
    "tuple": fields(t={"type": "array", "prefixItems": [WHOLE, SHORT], "items": False, "minItems": 2}),
    "no items": fields(t=items(WHOLE, maxItems=0)),
    "pattern": fields(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "pattern and length": fields(code={"type": "string", "pattern": "^[a-z]+$", "maxLength": 4}),
    "length": fields(c={"type": "string", "minLength": 2, "maxLength": 5}),
    "unicode": fields(**{"größe": SHORT, "漢字": {"enum": ["猫", "犬", "🙂"]}}),
    "nested": fields(a=fields(b=fields(c={"type": "boolean"}))),
    "ref": {"$defs": {"point": fields(x={"enum": [1, 2]})}, **fields(p={"$ref": "#/$defs/point"})},
    "recursive": {
        "$defs": {"node": {**fields(v={"enum": [1, 2]}, kids=items({"$ref": "#/$defs/node"}, maxItems=2))}},
        "$ref": "#/$defs/node",
    },
    "list": fields(v={"enum": [1]}, next={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    "any of": fields(v={"anyOf": [{"type": "boolean"}, SHORT, {"type": "null"}]}),
    "one of": fields(v={"oneOf": [fields(a={"type": "boolean"}), fields(b=SHORT)]}),
    "all of": {"allOf": [fields(a={"type": "boolean"}) | {"additionalProperties": True}, {"properties": {"b": SHORT}}]},
    "types": fields(v={"type": ["boolean", "null"]}),
    "optional": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": SHORT}, "additionalProperties": False},
    "additional": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    "names": {"type": "object", "patternProperties": {"^x_": {"type": "null"}}, "additionalProperties": False},
    "top array": items(fields(a={"type": "boolean"}), minItems=2, maxItems=3),
    "top text": {"type": "string", "maxLength": 8},
    "top null": {"type": "null"},
    "annotated": {"title": "T", "description": "d", **fields(a={"type": "boolean", "default": True})},
    **{f"format {name}": fields(v={"type": "string", "format": name}) for name in FORMATS},
}
REFUSED: dict[str, tuple[Any, str]] = {
    "type": ({"type": "nothing"}, "nothing"),
    "ref": ({"$ref": "#/$defs/none"}, "none"),
    "pattern": (fields(a={"type": "string", "pattern": "("}), "unclosed group"),
    "bounds": (fields(a={"type": "integer", "minimum": 3, "maximum": 1}), "nsatisfiable"),
    "unique": (fields(a=items(WHOLE, uniqueItems=True)), "uniqueItems"),
    "contains": (fields(a={"type": "array", "contains": WHOLE}), "contains"),
    "not": (fields(a={"not": TEXT}), "not"),
    "if": ({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if"),
    "names that differ": ({"type": "object", "additionalProperties": WHOLE, "minProperties": 2}, "2 names open"),
    "nothing": (False, "not"),
}
"""By name: a schema that the library cannot follow exactly, and a word of its message."""
