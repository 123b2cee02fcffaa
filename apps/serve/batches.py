"""All batches of a server: which wait, which run, and when one has to end."""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

from flexbatch.apps.jobs.openai_requests import CHAT, COMPLETIONS
from flexbatch.apps.serve.errors import ApiError, full_disk, not_found, stopping
from flexbatch.apps.serve.runs import CANCELLED, EXPIRED, STOPPED, BatchRun, Served, began, count
from flexbatch.apps.serve.state import ENDED, Body, ServerState

logger = logging.getLogger("flexbatch")

WINDOW = re.compile(r"([1-9]\d{0,5})([smhd])", re.ASCII)
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST_WINDOW = 366 * 86400
MOST_METADATA, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512
"""As in the API."""
RETRY_SECONDS, TICK_SECONDS = 30.0, 0.5
TIMES = (
    "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at",
    "cancelled_at",
)  # fmt: skip


def new_batch(request: Mapping[str, Any]) -> Body:
    """The batch that a request asks for. Raises ApiError that names the field."""
    known = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
    for name in request:
        if name not in known and request[name] is not None:
            raise ApiError(400, f"{name[:64]!r} is no field of a batch", "unknown_parameter", name[:64])
    if request.get("output_expires_after") is not None:
        raise ApiError(
            400, "output_expires_after is not supported: files stay until they are deleted", "unsupported_parameter",
            "output_expires_after",
        )  # fmt: skip
    endpoint, window = request.get("endpoint"), request.get("completion_window")
    if endpoint not in (COMPLETIONS, CHAT):
        raise ApiError(400, f"endpoint must be {COMPLETIONS} or {CHAT}", "invalid_value", "endpoint")
    if not isinstance(request.get("input_file_id"), str):
        raise ApiError(400, "input_file_id must be the id of a file", "invalid_value", "input_file_id")
    match = WINDOW.fullmatch(window) if isinstance(window, str) else None
    seconds = int(match[1]) * SECONDS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_WINDOW:
        wanted = "a time such as 24h, 90m or 7d, at most 366 days"
        raise ApiError(400, f"completion_window must be {wanted}", "invalid_value", "completion_window")
    now = int(time.time())
    return {
        "id": f"batch_{secrets.token_hex(12)}",
        "object": "batch",
        "endpoint": endpoint,
        "errors": None,
        "input_file_id": request["input_file_id"],
        "completion_window": window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        **dict.fromkeys(TIMES),
        "expires_at": now + seconds,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": _metadata(request.get("metadata")),
    }


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    texts = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    if not texts or len(value) > MOST_METADATA or any(len(key) > LONGEST_KEY for key in value):
        wanted = f"at most {MOST_METADATA} texts under keys of at most {LONGEST_KEY} characters"
        raise ApiError(400, f"metadata must be {wanted}", "invalid_value", "metadata")
    if any(len(text) > LONGEST_VALUE for text in value.values()):
        raise ApiError(400, f"a text of metadata has more than {LONGEST_VALUE} characters", "invalid_value", "metadata")
    return value


class Batches:
    """Starts the oldest batches, a few at a time, and ends those that are cancelled or late. Any thread may ask."""

    def __init__(self, state: ServerState, served: Served, most_open: int, most_active: int) -> None:
        self._state, self._served = state, served
        self._most_open, self._most_active = most_open, most_active
        self._changed = threading.Condition()
        self._runs: dict[str, BatchRun] = {}
        """Those that run, by id."""
        self._not_before: dict[str, float] = {}
        """When those are tried again that could not go on."""
        self._stopped = False
        self._thread = threading.Thread(target=self._watch, name="batches", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def create(self, request: Mapping[str, Any]) -> Body:
        """Raises ApiError."""
        body = new_batch(request)
        file = self._state.file(body["input_file_id"])
        if file is None:
            raise not_found("file", body["input_file_id"])
        if file["purpose"] != "batch":
            raise ApiError(
                400, f"the purpose of {file['id']} is {file['purpose']}, not batch", "invalid_value", "input_file_id"
            )
        if self._stopped:
            raise stopping()
        try:
            added = self._state.add_batch(body, self._most_open)
        except FileNotFoundError:
            raise not_found("file", body["input_file_id"]) from None
        except OSError:
            raise full_disk() from None
        if not added:
            raise ApiError(
                429, f"{self._most_open} batches have not ended yet, which is the limit", "batch_limit", retry_after=60
            )
        with self._changed:
            self._changed.notify_all()
        return body

    def cancel(self, batch_id: str) -> Body:
        """Raises ApiError for one that is not there, or has ended otherwise."""

        def cancelling(body: Body) -> None:
            if body["status"] != "cancelling":
                began(body, "cancelling")

        if self._state.batch(batch_id) is None:
            raise not_found("batch", batch_id)
        body = self._state.change_batch(batch_id, cancelling)
        if body["status"] in ENDED and body["status"] != "cancelled":
            raise ApiError(409, f"{batch_id} has ended already: it is {body['status']}", "batch_ended")
        with self._changed:
            if (run := self._runs.get(batch_id)) is not None:
                run.stop(CANCELLED)
            self._changed.notify_all()
        return self.shown(body)

    def shown(self, body: Body) -> Body:
        """A batch with the counts of this moment."""
        run = self._runs.get(body["id"])
        if run is not None and body["status"] in ("in_progress", "cancelling", "finalizing"):
            count(body, run.counts)
        return body

    def status(self) -> list[dict[str, Any]]:
        """Every batch that has not ended, with its progress and the seconds that it will take."""
        found = []
        for body in self._state.unfinished_batches():
            run = self._runs.get(body["id"])
            found.append(
                {
                    **{
                        name: self.shown(body)[name]
                        for name in ("id", "status", "endpoint", "created_at", "request_counts")
                    },
                    "metadata": body["metadata"],
                    "expires_at": body["expires_at"],
                    "running": run is not None,
                    "eta_seconds": None if run is None else run.seconds_left(),
                }
            )
        return found

    def stop(self, timeout: float) -> None:
        """Keep what is finished; the next server goes on."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            runs = list(self._runs.values())
        end = time.monotonic() + timeout
        for run in runs:
            run.stop(STOPPED)
        for run in runs:
            run.join(max(0.0, end - time.monotonic()))

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._stopped:
                    return
                try:
                    self._turn()
                except Exception:
                    logger.exception("the state of the batches cannot be read")
                self._changed.wait(TICK_SECONDS)

    def _turn(self) -> None:
        """Start what may run, end what is late. Those that are cancelled only write their results: no limit is
        theirs."""
        now, clock = time.time(), time.monotonic()
        for body in self._state.unfinished_batches():
            run, ending = self._runs.get(body["id"]), body["status"] == "cancelling" or body["expires_at"] <= now
            if run is None:
                late = clock < self._not_before.get(body["id"], 0.0)
                if late or (not ending and len(self._runs) >= self._most_active):
                    continue
                run = self._runs[body["id"]] = BatchRun(self._state, self._served, body, self._ended)
                if ending:
                    run.stop(CANCELLED if body["status"] == "cancelling" else EXPIRED)
                run.start()
            elif body["expires_at"] <= now and body["status"] in ("validating", "in_progress"):
                run.stop(EXPIRED)

    def _ended(self, run: BatchRun, again: bool) -> None:
        with self._changed:
            self._runs.pop(run.id, None)
            self._not_before.pop(run.id, None)
            if again:
                self._not_before[run.id] = time.monotonic() + RETRY_SECONDS
            self._changed.notify_all()

    def check(self) -> None:
        """Invariant: whatever runs has not ended."""
        with self._changed:
            open_batches = {body["id"] for body in self._state.unfinished_batches()}
            assert self._runs.keys() <= open_batches, self._runs.keys() - open_batches
