"""A pass of a block that is on the compute device whole: no transfers, no ticks."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.execution.sampling import most_likely
from flexbatch.execution.tick_halves import TickHalves
from flexbatch.memory.transfer import READY
from flexbatch.models import layers
from flexbatch.policy.schedule import Tick


class ResidentPass:
    """What decode graphs record. logit_rows: of a chunk of logits, as everywhere: products of other numbers of rows may
    be rounded otherwise."""

    def __init__(self, halves: TickHalves, logit_rows: int) -> None:
        self.halves, self.logit_rows = halves, logit_rows
        self.arch, self.routing = halves.arch, halves.routing

    def hidden(self, inputs: MicroBatchInputs) -> Tensor:
        """After all layers. Runs under capture."""
        halves = self.halves
        with halves.recorded(), self.routing.of_graph() if self.routing is not None else nullcontext():
            for layer in range(self.arch.num_layers):
                halves.finish(halves.begin(Tick(layer, 0, None, None, None), inputs, READY, 0), 1)
        return halves.ends.activations.get(0)

    def tokens(self, inputs: MicroBatchInputs) -> Tensor:
        """The most likely token of every row, which is what greedy sequences draw that nothing adjusts: 1,000 rows of
        Qwen3-0.6B take ten chunks of logits, each of which would cost the host 0.6 ms of launches. Not for ranks, which
        hold a share of the head each."""
        hidden, store, head = self.hidden(inputs), self.halves.weights, self.arch.num_layers
        weights = store.weights(head, "head", len(hidden))
        drawn = [most_likely(layers.head(self.arch, weights, part)) for part in hidden.split(self.logit_rows)]
        store.release(head, self.halves.queues.mark())
        return torch.cat(drawn)
