"""What a walk through a job knows of the sequences in flight."""

from __future__ import annotations

from dataclasses import dataclass

from flexbatch.policy.workload import RequestLengths


class MicroBatch:
    """The sequences of one micro-batch: prompts that are being read in the order of admission, and how many decode."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.reading: list[Reading] = []
        """With several tokens to read."""
        self.single: list[Reading] = []
        """With one prompt token to read, which rides along as a decode token does."""
        self.decoding = 0


@dataclass(eq=False)
class Reading:
    """A sequence whose prompt is being read."""

    request: RequestLengths
    tier: str
    micro_batch: MicroBatch
    uncached: int
    pages: int
    """Reserved for it."""
    admitted: int = 0
    began: int | None = None
    """The pass in which its first token came."""
