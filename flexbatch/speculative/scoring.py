"""Which tokens a target is most likely to draw where its draft has logits."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from flexbatch.execution.random_stream import gumbel
from flexbatch.execution.sampling import adjust, restrict
from flexbatch.execution.sequence import Sequence
from flexbatch.speculative.growth import Candidates


def likeliest(logits: Tensor, sequences: Many[Sequence], paths: Many[tuple[int, ...]], count: int) -> list[Candidates]:
    """For every row of logits [N, vocab], the ``count`` tokens that the target is most likely to draw there if it
    agrees with the draft.

    Bias, penalties, temperature and cuts apply as in plain decoding; a sampled request adds the noise of that position
    in its stream, the same that the target adds, so that of two equal distributions the same token comes first.
    Tokens that cannot be drawn are left out.
    """
    scores = noisy(logits, sequences, paths).log_softmax(-1)
    values, tokens = scores.topk(min(count, logits.shape[1]), dim=-1)
    return [
        [(token, value) for token, value in zip(row_tokens, row_values, strict=True) if value > -torch.inf]
        for row_tokens, row_values in zip(tokens.tolist(), values.tolist(), strict=True)
    ]


def noisy(logits: Tensor, sequences: Many[Sequence], paths: Many[tuple[int, ...]]) -> Tensor:
    """Scores [N, vocab] whose largest is the token that plain decoding would draw from these logits."""
    if all(sequence.params.greedy and not sequence.adjusted for sequence in sequences):
        return logits
    adjusted = adjust(logits, sequences, paths)
    rows = [r for r, sequence in enumerate(sequences) if not sequence.params.greedy]
    if not rows:
        return adjusted.double()
    chosen = [sequences[r] for r in rows]
    positions = [sequences[r].num_output_tokens + len(paths[r]) for r in rows]
    restricted = restrict(adjusted[rows], chosen)
    noise = gumbel([sequence.stream_key for sequence in chosen], positions, logits.shape[1], logits.device)
    scores = adjusted.double()
    scores[rows] = noise.add_(restricted)
    return scores
