"""What may watch a run without standing in its loop: statistics, the comparison with the plan, text for readers."""

from __future__ import annotations

from flexbatch.execution.pass_batch import PassBatch
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence


class RunObserver:
    """Is told of every pass and every sequence of a run. Each method may be left as it is."""

    def after_pass(self, scheduler: Scheduler, batch: PassBatch, seconds: float) -> None:
        """A pass was committed, in a turn of the loop that took ``seconds`` beside set-up (`execution.set_up`). Where
        passes are composed ahead, the turn composed the one that follows it."""

    def after_sequence(self, sequence: Sequence) -> None:
        """A sequence has finished, or was refused."""

    def after_run(self) -> None:
        """Nothing is left to run, or the run failed."""
