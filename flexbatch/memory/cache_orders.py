"""What is done to a cache between passes, noted for the ranks that have other heads of the same sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Order = tuple[str, tuple[Any, ...]]
"""A function of `page_moves` by its name, and its arguments: plain data, as they were when it was called."""


@dataclass
class CacheOrders:
    """Kept in the order of the calls, until the next pass takes them along."""

    pending: list[Order] = field(default_factory=list)

    def note(self, name: str, *arguments: Any) -> None:
        self.pending.append((name, arguments))

    def take(self) -> tuple[Order, ...]:
        taken, self.pending = tuple(self.pending), []
        return taken
