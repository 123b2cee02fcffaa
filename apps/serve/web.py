"""HTTP below the routes: keys, origins, sizes and times of messages, and what a client is told of an exception."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi import Response

from flexbatch.apps.serve.errors import ApiError
from flexbatch.apps.serve.keys import Keys
from flexbatch.apps.serve.monitoring import Monitoring

logger = logging.getLogger("flexbatch")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
UNWANTED_BYTES, UNWANTED_SECONDS = 64 * 2**20, 2.0
OPEN_PATHS = ("/", "/health")
"""Without a key: neither holds data. The page asks for a key itself."""
ROUTES = (
    "/v1/files",
    "/v1/batches",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/health",
    "/metrics",
    "/status",
)


class ClientGone(Exception):
    """The client has closed its connection, or is too slow to be waited for."""


class Gate:
    """What every request passes before it is read, and every response on its way out: an ASGI application around
    another one."""

    def __init__(self, app: Any, keys: Keys | None, client_timeout: float, monitoring: Monitoring) -> None:
        self._app, self._keys, self._timeout, self._monitoring = app, keys, client_timeout, monitoring

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def timed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                await asyncio.wait_for(send(message), self._timeout)
            except asyncio.TimeoutError:
                raise ClientGone from None

        try:
            error = self._refusal(scope)
            if error is not None:
                await send_error(timed, error)
            else:
                await self._app(scope, receive, timed)
        except ClientGone:
            pass
        except Exception:
            logger.exception("a request failed")
            if not status:
                await send_error(timed, ApiError(500, "the server failed; its log says why", "server_error"))
        finally:
            route = next((each for each in ROUTES[:4] if scope["path"].startswith(each)), scope["path"])
            self._monitoring.requests.labels(route if route in ROUTES else "other", str(status)).inc()

    def _refusal(self, scope: Message) -> ApiError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
            # A page of another site that is open in a browser here.
            return ApiError(403, "requests from pages of other sites are refused", "wrong_origin")
        if self._keys is None or scope["path"] in OPEN_PATHS:
            return None
        if not self._keys.allow(headers.get(b"authorization", "")):
            return ApiError(401, "no known key: send it as 'Authorization: Bearer KEY'", "invalid_api_key")
        return None


async def send_error(send: Send, error: ApiError) -> None:
    content = error.content()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **error.headers()}
    if error.status in (408, 413):
        headers["connection"] = "close"
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})


async def received(request: Any, max_bytes: int, timeout: float) -> AsyncIterator[bytes]:
    """The parts of a request's body. Raises ApiError where it is larger than it may be, or does not come on, and
    ClientGone."""
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told[:20]) > max_bytes:
        await read_away(request)
        raise too_large(max_bytes)
    size = 0
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), timeout)
        except asyncio.TimeoutError:
            raise ApiError(408, f"nothing came for {timeout:g} seconds", "timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            await read_away(request)
            raise too_large(max_bytes)
        yield part
        if not message.get("more_body"):
            return


async def read_away(request: Any) -> None:
    """Take some more of a body that nobody wants: most clients read an answer only when they have sent everything."""
    left, end = UNWANTED_BYTES, time.monotonic() + UNWANTED_SECONDS
    while left > 0 and (seconds := end - time.monotonic()) > 0:
        try:
            message = await asyncio.wait_for(request.receive(), seconds)
        except asyncio.TimeoutError:
            return
        left -= len(message.get("body", b""))
        if not message.get("more_body"):
            return


def too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the request is larger than {max_bytes:,} bytes, the most that is taken", "request_too_large")


async def body_of(request: Any, max_bytes: int, timeout: float) -> bytes:
    """Raises as `received`."""
    return b"".join([part async for part in received(request, max_bytes, timeout)])


async def gone(request: Any) -> None:
    """Returns when the client of a request that was read has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events. ``end`` is called when it is over, however it ends."""

    def __init__(self, request: Any, events: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        super().__init__()
        self._request, self._events, self._end = request, events, end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(gone(self._request))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
            self._end()

    async def _send(self, send: Send) -> None:
        """The status is sent with the first event, so that what fails before it has a status of its own."""
        began = False

        async def begin() -> None:
            kinds = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": kinds})

        try:
            async for data in self._events:
                if not began:
                    await begin()
                    began = True
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            if not began:
                await send_error(send, error)
                return
            data = (
                b"data: " + json.dumps(error.body(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n\n"
            )
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
