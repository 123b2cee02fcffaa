"""Bodies of requests."""

from __future__ import annotations

from typing import Any

from flexbatch.apps.serve.errors import ApiError
from flexbatch.text.files import parse_json


def json_object(data: bytes) -> dict[str, Any]:
    """The object that a body is. Raises ApiError."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ApiError(400, f"the body is {error}", "invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", "invalid_json")
    return value
