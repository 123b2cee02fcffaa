"""Hidden states from stage to stage of a pipeline. A process that has all layers has no such object, and sends none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flexbatch.parallel.channel import Group, waited
from flexbatch.parallel.mesh import Mesh


@dataclass
class Edge:
    """One direction between two stages. What one side sends, the other expects, in the same order.

    A group of its own for each direction: operations of one NCCL communicator run in the order in which they were
    called, and those of two directions are called in another order on either side.
    """

    mesh: Mesh
    group: Group
    peer: int
    """The stage on the other side."""
    pending: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)
    """By micro-batch: what is on its way, and its memory."""

    def send(self, micro_batch: int, hidden: Tensor) -> None:
        """Starts. Of the micro-batches of one pass all may be on their way; what came before in the place of this one
        has to have arrived."""
        self.finish(micro_batch)
        if len(hidden):
            hidden = hidden.contiguous()
            self.pending[micro_batch] = self.group.send([hidden], self.peer, micro_batch), hidden

    def expect(self, micro_batch: int, rows: int, like: Tensor) -> None:
        """Starts to receive so many rows. like: of the same width and type, and on the same device."""
        assert micro_batch not in self.pending, micro_batch
        hidden = like.new_empty(rows, like.shape[1])
        work = self.group.recv([hidden], self.peer, micro_batch) if rows else None
        self.pending[micro_batch] = work, hidden

    def receive(self, micro_batch: int) -> Tensor:
        """What was expected. Later work of the current stream comes behind it; on CPUs the caller waits."""
        work, hidden = self.pending.pop(micro_batch)
        if work is not None:
            waited(work, self.mesh)
        return hidden

    def finish(self, micro_batch: int) -> None:
        """Order the caller's further work behind what it has sent."""
        work, _ = self.pending.pop(micro_batch, (None, None))
        if work is not None:
            waited(work, self.mesh)


class StageRanks:
    """The ranks before and after this one in a pipeline.

    Transfers overlap with compute: a micro-batch is sent while the next one is computed, and expected while the one
    before it is. Rows that the head reads come back from the last stage to the first.
    """

    def __init__(self, mesh: Mesh, stage: int, stages: int, forward: Group, back: Group, like: Tensor) -> None:
        """forward, back: groups of the ranks of all stages. like: [0, width], of the type of hidden states and on the
        device that computes them."""
        self.stage, self.stages, self.like = stage, stages, like
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.before = Edge(mesh, back if self.is_first else forward, (stage - 1) % stages)
        self.after = Edge(mesh, back if self.is_last else forward, (stage + 1) % stages)

    def expect(self, micro_batch: int, rows: int) -> None:
        self.before.expect(micro_batch, rows, self.like)

    def receive(self, micro_batch: int) -> Tensor:
        return self.before.receive(micro_batch)

    def send(self, micro_batch: int, hidden: Tensor) -> None:
        self.after.send(micro_batch, hidden)

    def synchronize(self) -> None:
        """Wait for what was sent, once every pass has come to its end: Gloo closes the connections of a group that is
        dropped with a send nobody has waited for, and the other ranks fail (in the first round of a test that makes and
        drops groups; where sends are waited for, in none of 352)."""
        for micro_batch in list(self.after.pending):
            self.after.finish(micro_batch)

    def check(self) -> None:
        """Invariant: between passes nothing is expected."""
        assert not self.before.pending, self.before.pending.keys()
