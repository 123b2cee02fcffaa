"""Finds the input files behind a path, glob or URI, in one fixed order, with their hive partition folders."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from flexbatch.apps.jobs.globs import first_wild, glob_regex, is_hidden
from flexbatch.apps.jobs.listing import local_files
from flexbatch.validation.errors import ConfigurationError
from flexbatch.validation.secrets import hide_uri, redacted, secrets_of

FORMATS = {
    ".parquet": "parquet", ".pq": "parquet", ".parq": "parquet",
    ".csv": "csv", ".tsv": "csv",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
}  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".zst")
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
URI_OPTIONS = re.compile(r"\?[\w.%-]+=[^&?/]*(&[\w.%-]+=[^&?/]*)*$")
"""Options of a file system at the end of a URI, ``?endpoint_override=host:9000&scheme=http``. A question mark
elsewhere belongs to a glob."""


class SourceError(RuntimeError):
    """The input cannot be read any more, in the middle of a job; the message names file and row group."""


@dataclass(frozen=True)
class InputFile:
    """One file: ``path`` for the file system, ``name`` relative to the input's folder (its identity), ``size`` in
    bytes, the time of its last change in ns where the file system tells it."""

    path: str
    name: str
    size: int
    changed_ns: int | None = None

    @property
    def folder(self) -> str:
        """The hive part of the folder, ``year=2024/lang=de``; other folders do not count."""
        return "/".join(part for part in PurePosixPath(self.name).parts[:-1] if "=" in part)

    @property
    def format(self) -> str | None:
        suffixes = [suffix.lower() for suffix in PurePosixPath(self.name).suffixes]
        if suffixes and suffixes[-1] in COMPRESSED:
            suffixes.pop()
        return FORMATS.get(suffixes[-1]) if suffixes else None


def partition_values(folder: str) -> dict[str, str | None]:
    """Returns ``{"year": "2024"}`` for ``year=2024``."""
    pairs = (part.split("=", 1) for part in folder.split("/") if "=" in part)
    return {unquote(name): None if value == NULL_PARTITION else unquote(value) for name, value in pairs}


def resolve(location: str) -> tuple[pafs.FileSystem, str]:
    """Returns the file system and path of a local path or a URI (``s3://``, ``gs://``, ``file://``, and what fsspec
    knows). Raises ConfigurationError."""
    if "://" not in location:
        return pafs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    given = URI_OPTIONS.search(location)
    options = "" if given is None else given[0]
    location = location.removesuffix(options)
    wild = re.search(r"[*?\[]", location)
    head = location if wild is None else location[: location.rindex("/", 0, wild.start())]
    try:
        filesystem, path = pafs.FileSystem.from_uri(head + options)
    except (pa.ArrowException, ValueError, OSError):
        filesystem, path = _fsspec(location + options, head + options)
    return filesystem, path.rstrip("/") + location[len(head) :]


def _fsspec(location: str, head: str) -> tuple[pafs.FileSystem, str]:
    try:
        from fsspec.core import url_to_fs

        found, path = url_to_fs(head)
    except (ImportError, ValueError) as error:
        reason = _redacted(error, location)
        raise ConfigurationError(f"{hide_uri(location)}: no file system for this URI: {reason}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(found)), path


def _redacted(error: Exception, location: str) -> str:
    """Returns a library's message without the credentials of the location in any spelling."""
    return redacted(str(error) or type(error).__name__, secrets_of([location]))


def list_files(location: str) -> tuple[pafs.FileSystem, list[InputFile]]:
    """Returns every input file behind a file, folder, glob (``*``, ``?``, ``[]``, ``**``) or URI, sorted by name.

    Names that begin with a dot or an underscore are left out, as every reader of such folders does. Raises
    ConfigurationError when there are none.
    """
    filesystem, path = resolve(location)
    parts = path.split("/")
    wild = first_wild(parts)
    base, pattern = (
        (path, None) if wild is None else ("/".join(parts[:wild]) or "/", [part for part in parts[wild:] if part])
    )
    try:
        info = filesystem.get_file_info(base)
        if wild is not None and filesystem.get_file_info(path).type == pafs.FileType.File:
            info, base, pattern = filesystem.get_file_info(path), path, None
        if info.type == pafs.FileType.File:
            # Over HTTP the path is the whole address; its options, such as a signature that runs out, are no part of
            # the file's name.
            address = URI_OPTIONS.sub("", info.path) if "://" in location else info.path
            return filesystem, [InputFile(info.path, PurePosixPath(address).name, info.size, info.mtime_ns)]
        if info.type == pafs.FileType.NotFound:
            raise ConfigurationError(f"input {hide_uri(location)} does not exist")
        if pattern is not None and location.endswith("/") and not location.endswith("**/"):
            raise ConfigurationError(
                f"input {hide_uri(location)}: a pattern that ends with a slash stands for folders: add the names of "
                "files in them, *.jsonl, or ** for all files below them"
            )
        here = isinstance(filesystem, pafs.LocalFileSystem)
        found = _local(info.path, pattern) if here else _elsewhere(filesystem, info.path, pattern)
    except ConfigurationError:
        raise
    except Exception as error:  # every file system has errors of its own, fsspec's those of HTTP clients too
        raise ConfigurationError(f"input {hide_uri(location)} cannot be listed: {_redacted(error, location)}") from None
    files = sorted((file for file in found if pattern or file.format), key=lambda file: file.name)
    if not files:
        raise ConfigurationError(f"input {hide_uri(location)} holds no Parquet, CSV or JSONL file")
    if strange := [file.name for file in files if file.name.encode(errors="ignore").decode() != file.name]:
        raise ConfigurationError(
            f"input {hide_uri(location)}: the name of a file in {base} is not UTF-8 ({os.fsencode(strange[0])!r}): "
            "rename it"
        )
    return filesystem, files


def _local(folder: str, pattern: list[str] | None) -> list[InputFile]:
    """Returns the files of a folder of this machine, or those below it that match the parts of a glob."""
    found = local_files(folder) if pattern is None else local_files(folder, pattern)
    return [
        InputFile(f"{folder.rstrip('/')}/{name}", name, status.st_size, status.st_mtime_ns) for name, status in found
    ]


def _elsewhere(filesystem: pafs.FileSystem, folder: str, pattern: list[str] | None) -> list[InputFile]:
    """Returns those of another file system. An object store lists all that is below a folder faster than one folder
    after another, but for the last part of a glob."""
    only_here = pattern is not None and len(pattern) == 1 and "**" not in pattern[0]
    infos = filesystem.get_file_info(pafs.FileSelector(folder, recursive=not only_here))
    root, regex = folder.rstrip("/") + "/", None if pattern is None else glob_regex("/".join(pattern))
    files = [
        InputFile(info.path, info.path.removeprefix(root), info.size, info.mtime_ns)
        for info in infos
        if info.type == pafs.FileType.File
    ]
    return [file for file in files if not is_hidden(file.name) and (regex is None or regex.fullmatch(file.name))]
