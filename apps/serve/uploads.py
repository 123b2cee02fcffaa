"""Uploads of files, in form data that is written to the disk as it comes."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

from flexbatch.apps.serve.errors import ApiError
from flexbatch.apps.serve.state import Body

LONGEST_FIELD, MOST_PARTS, LONGEST_NAME = 4096, 32, 255
PARAMETER = re.compile(rb';\s*([\w*-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;]+))')
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def parameters(header: bytes) -> dict[str, str]:
    """``{"boundary": "x"}`` of ``multipart/form-data; boundary=x``."""
    found = {}
    for name, quoted, bare in PARAMETER.findall(header):
        value = re.sub(rb"\\(.)", rb"\1", quoted) if quoted else bare
        found[name.decode("ascii", "replace").lower()] = value.decode("utf-8", "replace")
    return found


def shown_name(name: str) -> str:
    """A file's name as it is shown: never a path, whatever a client says."""
    return CONTROL.sub("", re.split(r"[/\\]", name)[-1])[:LONGEST_NAME] or "file"


class Upload:
    """One file that is being uploaded, and the fields beside it. `feed` takes the next bytes of the request; all of it
    is the caller's to call in one thread after another. Raises ApiError."""

    def __init__(self, content_type: str, target: Path, max_bytes: int) -> None:
        from python_multipart.multipart import MultipartParser

        header = content_type.encode("latin-1", "replace")
        boundary = parameters(header).get("boundary", "")
        if not header.lower().startswith(b"multipart/form-data") or not 0 < len(boundary) <= 200:
            raise ApiError(
                400, "a file is uploaded as multipart/form-data with the fields purpose and file", "invalid_form"
            )
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.num_bytes, self._parts, self._ended = 0, 0, False
        self._target, self._max_bytes = target, max_bytes
        self._file: BinaryIO | None = None
        self._name, self._value = "", bytearray()
        self._is_file = False
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._parser = MultipartParser(
            boundary.encode(),
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> None:
        from python_multipart.exceptions import FormParserError

        try:
            self._parser.write(data)
        except FormParserError:
            raise ApiError(400, "the form data cannot be read", "invalid_form") from None

    def finish(self) -> None:
        """Make the file durable. Raises ApiError for a form that was cut, or lacks its file."""
        if not self._ended:
            raise ApiError(400, "the form data ends before its last part does", "invalid_form")
        if self._file is None:
            raise ApiError(400, "the form has no field 'file' with a file", "missing_required_parameter", "file")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _begin(self) -> None:
        self._parts += 1
        self._disposition, self._is_file = b"", False
        self._header, self._value = (bytearray(), bytearray()), bytearray()
        if self._parts > MOST_PARTS:
            raise ApiError(400, f"the form has more than {MOST_PARTS} fields", "invalid_form")

    def _end_header(self) -> None:
        if bytes(self._header[0]).lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = bytearray(), bytearray()

    def _end_headers(self) -> None:
        found = parameters(self._disposition)
        self._name = found.get("name", "")
        self._is_file = self._name == "file"
        if self._is_file:
            if self._file is not None:
                raise ApiError(400, "the form has two fields 'file'", "invalid_form", "file")
            self.filename = shown_name(found.get("filename", "file"))
            self._file = open(self._target, "xb")  # noqa: SIM115  # closed by `close`

    def _data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            self._value.extend(data[start:end])
            if len(self._value) > LONGEST_FIELD:
                raise ApiError(400, f"the field {self._name[:64]!r} is too long", "invalid_form")
            return
        self.num_bytes += end - start
        if self.num_bytes > self._max_bytes:
            raise ApiError(
                413,
                f"the file is larger than {self._max_bytes:,} bytes, the most that is taken",
                "file_too_large",
                "file",
            )
        assert self._file is not None
        self._file.write(memoryview(data)[start:end])

    def _end_part(self) -> None:
        if not self._is_file:
            self.fields[self._name] = bytes(self._value).decode("utf-8", "replace")

    def _end(self) -> None:
        self._ended = True


def new_file_id() -> str:
    return f"file-{secrets.token_hex(12)}"


async def receive_file(
    chunks: AsyncIterator[bytes], content_type: str, target: Path, max_bytes: int, in_thread: Any
) -> Body:
    """Write an upload to ``target`` as it comes; returns the file's body. in_thread: awaits a function that a thread
    runs. Raises ApiError; then there is no file, as when the client goes away."""
    upload = Upload(content_type, target, max_bytes)
    try:
        async for chunk in chunks:
            if chunk:
                await in_thread(upload.feed, chunk)
        await in_thread(upload.finish)
        purpose = upload.fields.get("purpose")
        if purpose != "batch":
            raise ApiError(400, "purpose must be batch, what files are for here", "invalid_value", "purpose")
    except BaseException:
        upload.close()
        target.unlink(missing_ok=True)
        raise
    return {
        "id": target.name,
        "object": "file",
        "bytes": upload.num_bytes,
        "created_at": int(time.time()),
        "filename": upload.filename,
        "purpose": purpose,
        "status": "processed",
    }
