"""The identity of an input file, as far as it can be told before the job: a job is resumed on the rows that it began
with.

Sizes and statistics do not tell: two values that are swapped, or one between the smallest and the largest, leave them
as they were. So files are digested whole, at the speed of the disk, up to a size that a job of days does not notice;
object stores say themselves which version of an object they serve.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from flexbatch.apps.jobs.files import InputFile
from flexbatch.models.fingerprint import file_digest
from flexbatch.validation.errors import CheckpointError, ConfigurationError

WHOLE_BYTES = 8 * 2**30
"""An input of at most this size is digested whole: 10 s at 800 MB/s. Of a larger one, 256 samples per file and the
time of its last change count."""
SAMPLES, SAMPLE_BYTES, CHUNK_BYTES = 256, 2**16, 4 * 2**20
VERSIONS = ("etag", "versionid", "version_id", "version-id", "generation", "md5hash", "content-md5", "content_md5")
"""Names by which object stores know a version of an object, in lower case."""


def wanted_whole(sizes: Iterable[int]) -> bool:
    return sum(sizes) <= WHOLE_BYTES


def content(filesystem: pafs.FileSystem, file: InputFile, handle: pa.NativeFile, whole: bool) -> dict[str, str]:
    """Returns a JSON value that changes when the content does. It is the same for a copy of a file, or one that was
    only touched, unless the file is too large to be read whole. ``handle`` is the open file. Raises OSError,
    ConfigurationError."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        if whole:
            return {"content": local_digest(file.path)}
    elif version := _version(filesystem, file.path, handle):
        return {"version": version}
    elif whole:
        digest, offset = hashlib.sha256(), 0
        while data := handle.read_at(CHUNK_BYTES, offset):
            digest.update(data)
            offset += len(data)
        return {"content": f"sha256 {digest.hexdigest()[:32]}"}
    changed = filesystem.get_file_info(file.path).mtime
    digest, last = hashlib.sha256(), max(file.size - SAMPLE_BYTES, 0)
    for start in sorted({last * sample // (SAMPLES - 1) for sample in range(SAMPLES)}):
        digest.update(handle.read_at(SAMPLE_BYTES, start))
    return {
        "samples": f"sha256 {digest.hexdigest()[:32]}",
        **({} if changed is None else {"changed": changed.astimezone(timezone.utc).isoformat()}),
    }


def local_digest(path: str) -> str:
    """Returns the digest of a local file. Raises ConfigurationError for a file that cannot be read, or is being
    written."""
    try:
        return f"sha256 {file_digest(Path(path))[:32]}"
    except CheckpointError as error:
        raise ConfigurationError(str(error)) from None


def _version(filesystem: pafs.FileSystem, path: str, handle: pa.NativeFile) -> str:
    """Returns the version that the store gives the object; empty where it gives nothing that changes with every
    change of the content, as a weak ETag or a time would not."""
    found: Mapping[str, Any] = {}
    if isinstance(filesystem, pafs.PyFileSystem) and isinstance(filesystem.handler, pafs.FSSpecHandler):
        found = filesystem.handler.fs.info(path)
    elif (metadata := handle.metadata()) is not None:
        found = {_text(name): value for name, value in metadata.items()}
    named = sorted((name.lower(), _text(value)) for name, value in found.items() if name.lower() in VERSIONS)
    strong = {name: value for name, value in named if value not in ("", "None", "null") and not value.startswith("W/")}
    return ", ".join(f"{name} {value.strip(chr(34))}" for name, value in strong.items())


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
