"""Wildcards in the location of an input. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence


def is_wild(part: str) -> bool:
    """Returns whether part of a path has a wildcard."""
    return re.search(r"[*?\[]", part) is not None


def first_wild(parts: Sequence[str]) -> int | None:
    """Returns the first of the parts of a path that has a wildcard; None where none has."""
    return next((i for i, part in enumerate(parts) if is_wild(part)), None)


def is_hidden(name: str) -> bool:
    """Returns whether readers leave out this file: it, or a folder that it is in, begins with a dot or an
    underscore."""
    return re.search(r"(^|/)[._]", name) is not None


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Compiles a glob: ``**`` crosses folders, ``*`` and ``?`` do not."""
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:[^/]+/)*", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] in "*?":
            out, i = out + ("[^/]*" if pattern[i] == "*" else "[^/]"), i + 1
        elif pattern[i] == "[" and "]" in pattern[i + 2 :]:
            end = pattern.index("]", i + 2)
            body = pattern[i + 1 : end].replace("\\", "\\\\")
            out, i = out + "[" + ("^/" + body[1:] if body[0] == "!" else body) + "]", end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return re.compile(out)
