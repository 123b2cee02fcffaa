"""What somebody who mistyped a name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

LIKENESS = 0.6
"""Share of equal characters from which two names look alike, as in difflib."""
LIKE_PATHS = 0.75
"""For names of files: those of a folder are alike by chance more often than flags are."""
PREFIX_CHARACTERS = 4
"""Of a name that was cut short, at least."""


def plain(name: str) -> str:
    """A name without what people get wrong about it: case, and which of ``-`` and ``_`` is meant."""
    return name.lower().replace("_", "-").strip("-")


def nearest(name: str, known: Iterable[str], likeness: float = LIKENESS) -> str | None:
    """The known name that looks most like this one; None where none does."""
    names = {plain(each): each for each in sorted(known, reverse=True)}
    wanted = plain(name)
    matches = difflib.get_close_matches(wanted, names, 1, likeness)
    if wanted in names:
        return names[wanted]
    longer = [each for each in names if len(wanted) >= PREFIX_CHARACTERS and each.startswith(wanted)]
    # A name that was cut short may look more like another one: "max-tok" like "max-errors".
    found = min(longer, key=len) if longer else matches[0] if matches else None
    return None if found is None else names[found]


def did_you_mean(name: str, known: Iterable[str], likeness: float = LIKENESS) -> str:
    """The end of an error about an unknown name; empty where no known one looks like it."""
    found = nearest(name, known, likeness)
    return "" if found is None else f"; did you mean {found}?"


def neighbor(path: Path) -> str:
    """The end of an error about a path that does not exist; empty where nothing in its folder looks like it."""
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    found = nearest(path.name, names, LIKE_PATHS)
    return "" if found is None else f"; did you mean {path.parent / found}?"
