"""Stop strings in a text: whole ones, and beginnings of them."""

from __future__ import annotations

from collections.abc import Iterable


def begun_stop(text: str, stops: Iterable[str]) -> int:
    """Characters at the end of `text` that may turn out to be the beginning of a stop string."""
    return max((length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])), default=0)


def first_stop(text: str, stops: Iterable[str], passed: int = 0) -> tuple[int, str | None]:
    """(position, stop string) of the earliest stop string in `text` that ends after its first ``passed`` characters,
    the longer at equal positions, or (len(text), None)."""
    found = [
        (offset, -len(stop), stop) for stop in stops if (offset := text.find(stop, max(0, passed + 1 - len(stop)))) >= 0
    ]
    return (len(text), None) if not found else (min(found)[0], min(found)[2])
