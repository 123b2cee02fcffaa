"""Trees drawn by chance from the draft, and the uniform draws that verify them: all from the request's own stream.

By default a draft shares the target's noise, so that trees are deterministic given the stream and tokens are those
of plain decoding. Drawing with noise of its own keeps only the distribution, but accepts more when the two models
differ: with one child, 1 - TV(p, q) against at least (1 - TV) / (1 + TV) (Daliri, Musco and Suresh, "Coupling
without communication and drafter-invariant speculative decoding", 2024).
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from flexbatch.execution.random_stream import ACCEPT_DRAW, gumbel, uniforms
from flexbatch.execution.sampling import process_logits
from flexbatch.execution.sequence import Sequence
from flexbatch.speculative.growth import Candidates
from flexbatch.speculative.tree import Drawing

DRAFT_STREAM = 3
"""Tells the drafts' noise from that of requests, whose keys derive from (1, ...) and (2, ...)."""


def draft_key(sequence: Sequence, node: int) -> int:
    """Key of the noise that draws the children of one node; ``node`` is -1 for the last committed token."""
    return int(np.random.SeedSequence((DRAFT_STREAM, sequence.stream_key, node + 1)).generate_state(1, np.uint64)[0])


def drawn_children(
    logits: Tensor, sequence: Sequence, path: tuple[int, ...], node: int, count: int, drawing: Drawing
) -> tuple[Candidates, Tensor]:
    """Up to ``count`` children of one node in draw order, and the distribution [vocab] float32, to be normalized, that
    they were drawn from.

    logits: [vocab] of the draft, processed as the target's will be. Without replacement there are no more children
    than tokens with a probability: the order of log q + Gumbel noise is a draw without replacement (Vieira, 2014;
    Kool et al., "Stochastic beams", ICML 2019).
    """
    distribution = process_logits(logits[None], [sequence], [path])[0]
    probabilities = distribution.double()
    if not bool(probabilities.sum() > 0):  # NaN: nothing is drawn from a draft that has no logits here
        return [], distribution
    probabilities /= probabilities.sum()
    position, vocab = sequence.num_output_tokens + len(path), len(probabilities)
    key, scores = draft_key(sequence, node), probabilities.log()
    if drawing is Drawing.INDEPENDENT:
        noise = gumbel([key], [position], vocab * count, logits.device).view(count, vocab)
        tokens = (scores + noise).argmax(-1).tolist()
    else:
        possible = int((probabilities > 0).sum())
        tokens = (
            (scores + gumbel([key], [position], vocab, logits.device)[0]).topk(min(count, possible)).indices.tolist()
        )
    return [(token, float(scores[token])) for token in tokens], distribution


class RequestDraws:
    """`verify.Draws` of one request, one after the other from the pass on."""

    def __init__(self, sequence: Sequence, device: torch.device) -> None:
        self.sequence, self.device = sequence, device
        self.start = sequence.num_output_tokens

    def accept(self, depth: int, rank: int, probability: float) -> bool:
        """See `verify.Draws`."""
        return (
            uniforms([self.sequence.stream_key], [self.start + depth], rank + 1, "cpu", ACCEPT_DRAW)[0, rank].item()
            < probability
        )

    def token(self, depth: int, probabilities: Tensor) -> int:
        """See `verify.Draws`."""
        noise = gumbel([self.sequence.stream_key], [self.start + depth], len(probabilities), self.device)[0]
        return int((probabilities.double().log() + noise).argmax())


def target_probabilities(logits: Tensor, sequence: Sequence, paths: Many[tuple[int, ...]]) -> Tensor:
    """What plain decoding draws from at every query token of a tree, [n + 1, vocab]."""
    return process_logits(logits, [sequence] * len(paths), paths)
