"""What ``--tree`` asks for. Free of torch, so that a command refuses a wrong one at once."""

from __future__ import annotations

import itertools
import operator
import re
from dataclasses import dataclass

from flexbatch.validation.errors import ConfigurationError

SYNTAX = (
    "chain:N (one path of N tokens), <1,1,3,1,1> (children per node at each depth), best-first:N (the N "
    "likeliest nodes) or auto (the policy decides)"
)

MOST_NODES = 1024
"""Nodes of a tree for each sequence of a pass, which reads them all: published trees have 64 or fewer."""


@dataclass(frozen=True)
class TreeSpec:
    """What ``--tree`` asks for: ``kind`` is "widths" (chains too), "best-first" or "auto"; ``nodes`` bounds the tree
    where the kind does."""

    kind: str
    widths: tuple[int, ...] = ()
    nodes: int = 0

    @property
    def text(self) -> str:
        """The text by which a user may ask for it."""
        return {"widths": f"<{','.join(map(str, self.widths))}>", "best-first": f"best-first:{self.nodes}"}.get(
            self.kind, self.kind
        )


def parse_tree(text: str) -> TreeSpec:
    """Reads ``chain:N``, ``<1,1,3,1,1>``, ``best-first:N`` or ``auto``. Raises ConfigurationError that names the
    accepted forms."""
    text = text.strip()
    if text == "auto":
        return TreeSpec("auto")
    if match := re.fullmatch(r"(chain|best-first):(\d+)", text):
        nodes = _count(match[2])
        if nodes < 1:
            raise ConfigurationError(
                f"tree {text!r} needs at least one node; to decode without speculation leave --draft out"
            )
        _check_size(text, nodes)
        return TreeSpec("widths", (1,) * nodes, nodes) if match[1] == "chain" else TreeSpec("best-first", (), nodes)
    if re.fullmatch(r"<\s*\d+(\s*,\s*\d+)*\s*>", text):
        widths = tuple(_count(width.strip()) for width in text[1:-1].split(","))
        if min(widths) < 1:
            raise ConfigurationError(f"tree {text!r}: every depth needs at least one child per node")
        nodes = sum(itertools.accumulate(widths[: MOST_NODES + 1], operator.mul))
        _check_size(text, nodes)
        return TreeSpec("widths", widths, nodes)
    raise ConfigurationError(f"not a tree: {text!r}; write {SYNTAX}")


def _count(digits: str) -> int:
    """A number, or one above all limits for digits that Python refuses to convert."""
    return int(digits) if len(digits) < 20 else MOST_NODES + 1


def _check_size(text: str, nodes: int) -> None:
    if nodes > MOST_NODES:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ConfigurationError(f"tree {shown!r} has more than {MOST_NODES:,} nodes; ask for fewer")
