"""Notices files of the input that are written anew while the job runs: rows of two versions would mix, some twice and
some never where the new one has another order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence

import pyarrow.fs as pafs

from flexbatch.apps.jobs.files import InputFile, SourceError
from flexbatch.validation.errors import ConfigurationError

Stamp = tuple[int | None, int | None]
"""Size in bytes and time of the last change of a file: ns, or seconds in an object store, whose listings are finer than
what it says of one object."""


class Unchanged:
    """What a source asks when it opens one of its files, and after it has read of it.

    A file with another stamp is compared: one that was only touched, or has grown at its end where that does not
    matter, serves on. ``is_same`` tells of a file whether it holds what it held.
    """

    def __init__(
        self, filesystem: pafs.FileSystem, files: Sequence[InputFile], is_same: Callable[[InputFile], bool]
    ) -> None:
        self._filesystem, self._is_same = filesystem, is_same
        self._local = isinstance(filesystem, pafs.LocalFileSystem)
        self._stamps: dict[str, Stamp] = {file.path: self._stamp(file.size, file.changed_ns) for file in files}
        self._opened: Mapping[str, int] = {}

    def _stamp(self, size: int | None, changed_ns: int | None) -> Stamp:
        return size, changed_ns if self._local or changed_ns is None else changed_ns // 10**9

    def opened(self, file: InputFile) -> None:
        """Called when the file is open. Raises SourceError."""
        if self._local:
            with contextlib.suppress(FileNotFoundError):
                self._opened = {file.path: os.stat(file.path).st_ino}
        self._compare(file)

    def read(self, file: InputFile) -> None:
        """Called when some of the open file was read, before its rows are used. Raises SourceError."""
        if self._local:
            with contextlib.suppress(FileNotFoundError):
                # Where another file has taken the name, the one that is open is as it was.
                if os.stat(file.path).st_ino == self._opened.get(file.path):
                    self._compare(file)

    def _compare(self, file: InputFile) -> None:
        info = self._filesystem.get_file_info(file.path)
        stamp = self._stamp(info.size, info.mtime_ns)
        if info.type != pafs.FileType.File or stamp == self._stamps[file.path]:
            return
        try:
            same = self._is_same(file)
        except (ConfigurationError, OSError):
            same = False
        if not same:
            raise SourceError(
                f"{file.name} has changed since the job began: the rows of two versions would mix. Put the old file "
                "back and resume, or start over with the new one (another output folder, or --overwrite)"
            )
        self._stamps[file.path] = stamp
