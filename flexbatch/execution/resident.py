"""A pass of a block that is on the compute device whole: no transfers, no ticks."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor

from flexbatch.execution.head import Head
from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.execution.tick_halves import TickHalves
from flexbatch.memory.handles import READY
from flexbatch.policy.schedule import Tick


class ResidentPass:
    """What decode graphs record."""

    def __init__(self, halves: TickHalves, head: Head) -> None:
        self.halves, self.head = halves, head
        self.arch, self.routing = halves.arch, halves.routing

    def hidden(self, inputs: MicroBatchInputs) -> Tensor:
        """After all layers. Runs under capture."""
        halves = self.halves
        with halves.recorded(), self.routing.of_graph() if self.routing is not None else nullcontext():
            for layer in range(self.arch.num_layers):
                halves.finish(halves.begin(Tick(layer, 0, None, None, None), inputs, READY, 0), 1)
        return halves.ends.activations.get(0)

    def tokens(self, inputs: MicroBatchInputs) -> Tensor:
        """The most likely token of every row, which is what greedy sequences draw that nothing adjusts."""
        hidden, store, layer = self.hidden(inputs), self.halves.weights, self.arch.num_layers
        token_ids = self.head.tokens(store.weights(layer, "head", len(hidden)), hidden)
        store.release(layer, self.halves.queues.mark())
        return token_ids
