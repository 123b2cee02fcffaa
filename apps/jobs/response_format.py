"""The form of the answers that an OpenAI request asks for: ``response_format`` of the API, and
``structured_outputs`` of vLLM's server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexbatch.apps.jobs.prompts import RowError, unicode_text
from flexbatch.validation.checks import short
from flexbatch.validation.structured_fields import StructuredOutputsParams

TYPES = ("text", "json_object", "json_schema")


def response_form(body: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """Returns None where any text will do. Raises RowError, or ValueError, that names what is wrong."""
    own, asked = body.get("structured_outputs"), body.get("response_format")
    if own is not None and not isinstance(own, dict):
        raise RowError(f"structured_outputs is {short(own)}, wanted an object")
    form = None if asked is None else _asked(asked)
    if own is None:
        return form
    if form is not None:
        raise RowError("response_format and structured_outputs are both given: leave one out")
    return StructuredOutputsParams(**unicode_text(own, "structured_outputs"))


def _asked(value: Any) -> StructuredOutputsParams | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in TYPES:
        raise RowError(f"response_format is {short(value)}, wanted an object with type {', '.join(TYPES)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    inner = value.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise RowError(f"response_format.json_schema is {short(inner)}, wanted an object with a schema")
    return StructuredOutputsParams(json=unicode_text(schema, "response_format"))
