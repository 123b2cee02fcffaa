"""What a rank has to the others of its engine."""

from __future__ import annotations

from dataclasses import dataclass

from flexbatch.parallel.stage_ranks import StageRanks
from flexbatch.parallel.tensor_ranks import TensorRanks


@dataclass(frozen=True)
class RankLinks:
    """``tensor``: the ranks that have the rest of its layers; ``stages``: those that have other layers. None where
    there are none."""

    tensor: TensorRanks | None = None
    stages: StageRanks | None = None

    def synchronize(self) -> None:
        """Let everything arrive that passes have sent, all of which have come to their ends."""
        if self.stages is not None:
            self.stages.synchronize()
            self.stages.check()
