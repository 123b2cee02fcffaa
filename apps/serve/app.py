"""The routes of the server."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

from flexbatch.apps.jobs.openai_requests import CHAT, COMPLETIONS
from flexbatch.apps.serve.answers import Answers
from flexbatch.apps.serve.batches import Batches
from flexbatch.apps.serve.bodies import json_object
from flexbatch.apps.serve.errors import ApiError, full_disk, not_found, stopping
from flexbatch.apps.serve.keys import Keys
from flexbatch.apps.serve.monitoring import Monitoring
from flexbatch.apps.serve.serving import Serving
from flexbatch.apps.serve.settings import ServeConfig
from flexbatch.apps.serve.state import Body, ServerState
from flexbatch.apps.serve.streaming import chunks
from flexbatch.apps.serve.uploads import new_file_id, receive_file
from flexbatch.apps.serve.web import ClientGone, EventStream, Gate, body_of, gone, received

PAGE = Path(__file__).with_name("page.html")
MOST_LISTED = {"files": 10_000, "batches": 100}


@dataclass(frozen=True)
class Parts:
    """What the routes are about."""

    config: ServeConfig
    state: ServerState
    serving: Serving
    answers: Answers
    batches: Batches
    monitoring: Monitoring
    keys: Keys | None


def make_app(parts: Parts) -> Any:
    """The ASGI application."""
    app = FastAPI(title="FlexBatch", docs_url=None, redoc_url=None, openapi_url=None)

    async def api_error(request: Any, error: ApiError) -> Any:
        headers = error.headers() | ({"connection": "close"} if error.status in (408, 413) else {})
        return JSONResponse(error.body(), error.status, headers)

    async def no_address(request: Any, error: Any) -> Any:
        return await api_error(request, ApiError(404, "there is nothing at this address", "unknown_url"))

    async def no_method(request: Any, error: Any) -> Any:
        return await api_error(request, ApiError(405, "this address does not take this method", "unknown_method"))

    async def crashed(request: Any, error: Exception) -> Any:
        return await api_error(request, ApiError(500, "the server failed; its log says why", "server_error"))

    async def left(request: Any, error: ClientGone) -> Any:
        return Response(status_code=499)

    app.add_exception_handler(Exception, crashed)
    app.add_exception_handler(ClientGone, left)  # type: ignore[arg-type]
    app.add_exception_handler(ApiError, api_error)  # type: ignore[arg-type]
    app.add_exception_handler(404, no_address)
    app.add_exception_handler(405, no_method)
    for add in (add_looks, add_models, add_files, add_batches, add_answers):
        add(app, parts)
    return Gate(app, parts.keys, parts.config.client_timeout, parts.monitoring)


def add_looks(app: Any, parts: Parts) -> None:
    @app.get("/health")
    async def health() -> Any:
        stops = parts.serving.stopping.is_set()
        return JSONResponse({"status": "stopping" if stops else "ok"}, 503 if stops else 200)

    @app.get("/metrics")
    def metrics() -> Any:
        return Response(parts.monitoring.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/status")
    def status() -> Any:
        return JSONResponse(parts.monitoring.status())

    @app.get("/")
    def page() -> Any:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))


def add_models(app: Any, parts: Parts) -> None:
    names, created = parts.answers.names, int(time.time())

    def shown(name: str) -> Body:
        found: Body = {"id": name, "object": "model", "created": created, "owned_by": "flexbatch"}
        if name in names.adapters:
            found |= {"root": names.model, "parent": names.model}
        return found | {"max_model_len": parts.serving.llm.arch.context}

    @app.get("/v1/models")
    async def list_models() -> Any:
        return {"object": "list", "data": [shown(name) for name in names.all]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Any:
        if name not in names.all:
            raise not_found("model", name)
        return shown(name)


def listed(parts: Parts, table: str, query: Any, default: int) -> Body:
    """A page of files or batches, as the query asks for it. Raises ApiError."""
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= MOST_LISTED[table]):
        raise ApiError(400, f"limit must be from 1 to {MOST_LISTED[table]:,}", "invalid_value", "limit")
    order, after = query.get("order", "desc"), query.get("after")
    if order not in ("asc", "desc"):
        raise ApiError(400, "order must be asc or desc", "invalid_value", "order")
    page = parts.state.page(table, int(text) + 1, after, order == "desc")
    if page is None:
        raise not_found("file" if table == "files" else "batch", after or "")
    data = page[: int(text)]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": len(page) > len(data)}


def add_files(app: Any, parts: Parts) -> None:
    state, config = parts.state, parts.config

    def known(file_id: str) -> Body:
        body = state.file(file_id)
        if body is None:
            raise not_found("file", file_id)
        return body

    @app.post("/v1/files")
    async def upload(request: Request) -> Any:
        largest = config.max_file_bytes
        # A form is a little larger than its file.
        incoming = received(request, largest + 2**20, config.client_timeout)
        target, kind = state.path_of(new_file_id()), request.headers.get("content-type", "")
        try:
            body = await receive_file(incoming, kind, target, largest, run_in_threadpool)
            await run_in_threadpool(state.add_file, body)
        except OSError:
            raise full_disk() from None
        return body

    @app.get("/v1/files")
    def list_files(request: Request) -> Any:
        found = listed(parts, "files", request.query_params, 10_000)
        purpose = request.query_params.get("purpose")
        return {**found, "data": [file for file in found["data"] if purpose in (None, file["purpose"])]}

    @app.get("/v1/files/{file_id}")
    def get_file(file_id: str) -> Any:
        return known(file_id)

    @app.get("/v1/files/{file_id}/content")
    def content(file_id: str) -> Any:
        return FileResponse(state.path_of(known(file_id)["id"]), media_type="application/octet-stream")

    @app.delete("/v1/files/{file_id}")
    def delete(file_id: str) -> Any:
        known(file_id)
        return {"id": file_id, "object": "file", "deleted": state.remove_file(file_id)}


def add_batches(app: Any, parts: Parts) -> None:
    batches, config = parts.batches, parts.config

    @app.post("/v1/batches")
    async def create(request: Request) -> Any:
        data = await body_of(request, config.max_request_bytes, config.client_timeout)
        return await run_in_threadpool(batches.create, json_object(data))

    @app.get("/v1/batches")
    def list_batches(request: Request) -> Any:
        found = listed(parts, "batches", request.query_params, 20)
        return {**found, "data": [batches.shown(body) for body in found["data"]]}

    @app.get("/v1/batches/{batch_id}")
    def get_batch(batch_id: str) -> Any:
        body = parts.state.batch(batch_id)
        if body is None:
            raise not_found("batch", batch_id)
        return batches.shown(body)

    @app.post("/v1/batches/{batch_id}/cancel")
    def cancel(batch_id: str) -> Any:
        return batches.cancel(batch_id)


def add_answers(app: Any, parts: Parts) -> None:
    @app.post(COMPLETIONS)
    async def complete(request: Request) -> Any:
        return await answer(parts, request, COMPLETIONS)

    @app.post(CHAT)
    async def chat(request: Request) -> Any:
        return await answer(parts, request, CHAT)


async def answer(parts: Parts, request: Any, url: str) -> Any:
    """Answers one request, whole or in chunks. Raises ApiError, and ClientGone."""
    config, answers, monitoring = parts.config, parts.answers, parts.monitoring
    if parts.serving.stopping.is_set():
        raise stopping()
    with answers.entering():
        data = await body_of(request, config.max_request_bytes, config.client_timeout)
        loop = asyncio.get_running_loop()
        reading = await loop.run_in_executor(answers.intake, partial(answers.read, data, url))
    running = answers.begin(reading)
    if reading.stream is not None:

        async def timed() -> Any:
            first = True
            async for chunk in chunks(running, answers.bodies, answers.replies):
                if first:
                    monitoring.first.observe(time.monotonic() - running.began)
                    first = False
                yield chunk
            monitoring.seconds.labels(url).observe(time.monotonic() - running.began)

        return EventStream(request, timed(), running.leave)
    whole, leaving = asyncio.ensure_future(running.whole()), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({whole, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            raise ClientGone
        body = whole.result()
    finally:
        for task in (whole, leaving):
            task.cancel()
        running.leave()
    monitoring.seconds.labels(url).observe(time.monotonic() - running.began)
    return JSONResponse(body)
