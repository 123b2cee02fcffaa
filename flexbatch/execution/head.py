"""From the hidden states after the last layer to logits, or straight to tokens where these are all that is wanted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.execution.pass_batch import LogitsChunk
from flexbatch.execution.sampling import most_likely, or_not_finite
from flexbatch.execution.tick_halves import TickHalves
from flexbatch.models import layers
from flexbatch.models.layers import Weights


class Head:
    """Of this rank, which has all of it or a share. logit_rows: of a chunk of logits."""

    def __init__(self, halves: TickHalves, logit_rows: int) -> None:
        self.halves, self.logit_rows = halves, logit_rows
        self.arch, self.weights, self.ranks = halves.arch, halves.weights, halves.ranks

    def draws(self, inputs: MicroBatchInputs, greedy: bool) -> bool:
        """Whether tokens are all that is wanted of ``greedy`` sequences. Not of ranks, which hold a share of the head
        each."""
        return greedy and self.ranks is None and not inputs.head_adapters

    def chunks(self, inputs: MicroBatchInputs, micro_batch: int, count: int, greedy: bool) -> Iterator[LogitsChunk]:
        """Logits of the rows that were asked for, in chunks, or the tokens of all; the last of ``count`` micro-batches
        gives the weights back."""
        layer, hidden = self.arch.num_layers, self.halves.ends.activations.get(micro_batch)
        weights = self.weights.weights(layer, "head", len(hidden))
        if self.draws(inputs, greedy):
            with self.halves.tracer.compute_span(f"head {micro_batch}"):
                token_ids = self.tokens(weights, hidden)
            yield inputs.drawn_chunk(token_ids)
        else:
            yield from self.logits(inputs, micro_batch, weights, hidden)
        if micro_batch == count - 1:
            self.weights.release(layer, self.halves.queues.mark())

    def logits(
        self, inputs: MicroBatchInputs, micro_batch: int, weights: Weights, hidden: Tensor
    ) -> Iterator[LogitsChunk]:
        """Of the rows that were asked for, in chunks."""
        step = self.logit_rows
        for chunk, start in enumerate(range(0, len(hidden), step)):
            adapters = inputs.head_adapters[chunk] if inputs.head_adapters else None
            with self.halves.tracer.compute_span(f"head {micro_batch}"):
                logits = layers.head(self.arch, weights, hidden[start : start + step], adapters)
            whole = logits if self.ranks is None else self.ranks.gather_logits(logits)
            if whole is not None:
                yield inputs.logits_chunk(start, whole)

    def tokens(self, weights: Weights, hidden: Tensor) -> Tensor:
        """The most likely token of every row. By rows, 1,000 of Llama-3-8B read the head's weights, 1 GB, eight times,
        and its logits were written in 16 bits, in 32, and read again: a tenth of the pass on an H100."""
        found = layers.largest_logits(self.arch, weights, hidden, self.logit_rows * self.arch.vocab_size)
        if found is not None:
            return or_not_finite(*found)
        drawn = [most_likely(layers.head(self.arch, weights, part)) for part in hidden.split(self.logit_rows)]
        return torch.cat(drawn)
