"""Errors as the OpenAI API tells them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

import json
import logging
from typing import Any

logger = logging.getLogger("flexbatch")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    507: "server_error",
}
"""By status; others are invalid_request_error."""


class ApiError(Exception):
    """A request that is answered with an error. ``retry_after``: seconds after which it may be asked again."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.retry_after is None:
            return {}
        return {"retry-after": str(max(1, round(self.retry_after)))}

    def content(self) -> bytes:
        return json.dumps(self.body(), ensure_ascii=False).encode("utf-8", "backslashreplace")


def engine_failed() -> ApiError:
    """What a client is told of a failure that is not its own; the log has the rest."""
    return ApiError(500, "the engine failed while it ran this request; the server's log says why", "engine_error")


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping; ask again when it is back", "stopping", retry_after=5)


def not_found(what: str, id: str) -> ApiError:
    """id: as the client gave it; shown in part, as it may be anything."""
    return ApiError(404, f"no {what} {id[:64]!r} is here", f"{what.replace(' ', '_')}_not_found")


def full_disk() -> ApiError:
    return ApiError(
        507, "the server's disk is full: delete files that are no longer needed, or ask its owner", "disk_full"
    )
