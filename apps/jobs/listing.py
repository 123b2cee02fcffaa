"""The files of this machine that a folder or a glob stands for.

Only folders that a pattern can match are read: beside them may lie huge ones, unreadable ones, and names that nobody
can write. A folder that it can match and that cannot be read is an error, as files in it would be missing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence

from flexbatch.apps.jobs.globs import glob_regex, is_hidden, is_wild

Found = tuple[str, os.stat_result]
"""A file's name below the folder where it was looked for."""


def local_files(folder: str, pattern: Sequence[str] = ("**",)) -> Iterator[Found]:
    """Those whose name below ``folder`` matches the parts of a glob, in any order; hidden ones are left out. Raises
    OSError for a folder that cannot be read."""
    waiting = [(0, "")]
    while waiting:
        depth, name = waiting.pop()
        first, is_last = pattern[depth], depth + 1 == len(pattern)
        if "**" in first:
            regex = glob_regex("/".join(pattern[depth:]))
            yield from ((name + inner, status) for inner, status in files_below(folder, name) if regex.fullmatch(inner))
            continue
        for each in matching(os.path.join(folder, name), first):
            status = None if is_hidden(each) else status_of(os.path.join(folder, name, each))
            if status is None:
                continue
            if is_last and stat.S_ISREG(status.st_mode):
                yield name + each, status
            elif not is_last and stat.S_ISDIR(status.st_mode):
                waiting.append((depth + 1, f"{name}{each}/"))


def matching(folder: str, part: str) -> list[str]:
    """What in a folder may match one part of a glob. A part without wildcards needs no look at the others."""
    if not is_wild(part):
        return [part]
    regex = glob_regex(part)
    return [each for each in os.listdir(folder) if regex.fullmatch(each)]


def files_below(folder: str, name: str) -> Iterator[Found]:
    """All files of a folder ``name`` in ``folder``, by their names below it. A link that leads back to a folder that it
    lies in is not followed."""
    top = os.stat(os.path.join(folder, name))
    waiting = [("", frozenset({(top.st_dev, top.st_ino)}))]
    while waiting:
        below, above = waiting.pop()
        with os.scandir(os.path.join(folder, name, below)) as entries:
            shown = [entry for entry in entries if not is_hidden(entry.name)]
        for entry in shown:
            status = status_of(entry.path)
            if status is None:
                continue
            if stat.S_ISREG(status.st_mode):
                yield below + entry.name, status
            elif stat.S_ISDIR(status.st_mode) and (status.st_dev, status.st_ino) not in above:
                waiting.append((f"{below}{entry.name}/", above | {(status.st_dev, status.st_ino)}))


def status_of(path: str) -> os.stat_result | None:
    """None for what is not there, or was a moment ago, and for a link that leads nowhere."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
