"""What a job made at first use, from the engine's reports before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def made_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """How often each kind of set-up came in a job, and its seconds."""
    nothing = {"count": 0, "seconds": 0.0}
    earlier = before["set_up"]
    found = {
        kind: {what: value - earlier.get(kind, nothing)[what] for what, value in made.items()}
        for kind, made in after["set_up"].items()
    }
    return {kind: made for kind, made in found.items() if made["count"]}


def as_words(made: Mapping[str, Mapping[str, float]]) -> str:
    """For a line of a log."""
    return ", ".join(f"{kind} {each['count']}: {each['seconds']:.2f} s" for kind, each in made.items()) or "none"
