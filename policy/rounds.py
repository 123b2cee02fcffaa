"""When a full block lets others in: one by one as places become free, or several after a number of passes.

A pass that reads a prompt costs more than one that only decodes, however short the prompt is: on the GPU the latter is
one graph. Where answers have lengths of their own a place becomes free in almost every pass of a large block. Then it
is faster to leave a few places empty for some passes, and to read several prompts in one.

The scheduler follows these rules, and the planner counts the passes of a job by them.
"""

from __future__ import annotations

PARTS = 8
"""Of a full block: once this part of it has ended, others are let in whatever the number of passes. Sequences that end
together leave no places empty."""


class Rounds:
    """When the next round of admission may be. ``passes``: from one that filled the block to the next, at least."""

    def __init__(self, passes: int = 1) -> None:
        self.passes = passes
        self.now = 0
        """Passes so far."""
        self.next = 0
        """The pass before which the next round is."""
        self.least = 0
        """Sequences in flight with which it is sooner."""

    def waits(self, running: int) -> bool:
        """Whether nobody is let in before this pass."""
        return self.passes > 1 and self.now < self.next and running > self.least

    def filled(self, running: int) -> None:
        """Of those that waited some were let in, and for the others there is no place or there are no pages."""
        self.next, self.least = self.now + self.passes, running - max(1, running // PARTS)

    def left(self, running: int) -> float:
        """Passes until others are let in though nobody has ended; without end where they need what others have."""
        return self.next - self.now if self.waits(running) else float("inf")
