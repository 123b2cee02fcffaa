"""Logits to tokens. Every row is treated by itself: its token does not depend on what else is in the micro-batch.

Order of processing, as vLLM documents it: logit bias, repetition, frequency and presence penalty, temperature, min-p,
top-k, top-p, draw. What transformers'
generation_config.json adds comes where transformers has it: biases of sequences first, forced and barred tokens between
penalties and temperature.
Log-probabilities are those of the model (before any processing), vLLM's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexbatch.execution.constraints import Effect
from flexbatch.execution.copies import sent
from flexbatch.execution.logprobs import Scored, chunks, take
from flexbatch.execution.masks import masked
from flexbatch.execution.random_stream import gumbel
from flexbatch.execution.sequence import Sequence
from flexbatch.request import TokenLogprob

NOT_FINITE, ALL_BARRED = -1, -2
"""These stand for a token id where there is none: the model's logits are NaN or infinite; bias and constraints leave
no token that can be drawn."""

Drafted = Many[tuple[int, ...]]
"""Per row, the tokens after the committed output that the row has seen: the path of a tree node, () for an ordinary
row."""


@dataclass(frozen=True)
class Sampled:
    """token_ids: [N] int64 on the device of the logits, NOT_FINITE or ALL_BARRED where there is none. Nothing here
    waits for the device but `logprobs`, which are None for rows that did not ask."""

    token_ids: Tensor
    scored: Scored | None = None
    """Log-probabilities of the rows that asked."""
    scored_rows: tuple[int, ...] = ()

    @property
    def logprobs(self) -> list[dict[int, TokenLogprob] | None]:
        """For every row; waits until they are on the host."""
        entries: list[dict[int, TokenLogprob] | None] = [None] * len(self.token_ids)
        for row, entry in zip(self.scored_rows, [] if self.scored is None else self.scored.read(), strict=True):
            entries[row] = entry
        return entries


def sample(logits: Tensor, sequences: Many[Sequence], drafted: Drafted | None = None) -> Sampled:
    """Draw one token per row.

    logits: [N, vocab] float32, not modified. sequences: the request of each row; a request may have several rows (nodes
    of a token tree), each with its path in `drafted`. The noise of output token t is a function of (stream, t): a
    drawn tree node gets the token that plain decoding would draw there.
    """
    _check_shapes(logits, sequences, drafted)
    if all(sequence.unadjusted_greedy for sequence in sequences):
        return Sampled(most_likely(logits))
    paths = drafted or [()] * len(sequences)
    token_ids = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
    for rows in chunks([r for r, sequence in enumerate(sequences) if sequence.params.greedy], logits.shape[1]):
        chunk, index = take(logits, rows)
        token_ids[index] = _best(adjust(chunk, [sequences[r] for r in rows], [paths[r] for r in rows]))
    for rows in chunks([r for r, sequence in enumerate(sequences) if not sequence.params.greedy], logits.shape[1]):
        chunk, index = take(logits, rows)
        chosen = [sequences[r] for r in rows]
        chunk = restrict(adjust(chunk, chosen, [paths[r] for r in rows]), chosen)
        positions = [sequences[r].num_output_tokens + len(paths[r]) for r in rows]
        token_ids[index] = _best(
            chunk + gumbel([sequence.stream_key for sequence in chosen], positions, logits.shape[1], logits.device)
        )
    token_ids = torch.where(finite_rows(logits), token_ids, NOT_FINITE)
    wanting = [r for r, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    if not wanting:
        return Sampled(token_ids)
    counts = [sequences[r].params.logprobs or 0 for r in wanting]
    drawn = token_ids.index_select(0, sent(wanting, torch.int64, logits.device))
    return Sampled(token_ids, Scored(logits, drawn, counts, wanting), tuple(wanting))


def most_likely(logits: Tensor) -> Tensor:
    """[N] int64, NOT_FINITE where a row has NaN or infinity, or -inf alone. The maximum comes with its index, and would
    be these: they are seen without another look at the logits."""
    return or_not_finite(*logits.max(-1))


def or_not_finite(peaks: Tensor, token_ids: Tensor) -> Tensor:
    """The tokens of the largest logits ``peaks``, NOT_FINITE where that is no finite number."""
    return torch.where(peaks.isfinite(), token_ids, NOT_FINITE)


def _best(scores: Tensor) -> Tensor:
    """The token of the largest score of each row, ALL_BARRED where none is finite."""
    peaks, token_ids = scores.max(-1)
    return torch.where(peaks.isfinite(), token_ids, ALL_BARRED)


def finite_rows(logits: Tensor) -> Tensor:
    """[N] bool: no NaN or +inf among a row's logits, and not -inf alone. A model may rule out tokens of its own by
    -inf."""
    return logits.amax(-1).isfinite()


def process_logits(logits: Tensor, sequences: Many[Sequence], drafted: Drafted | None = None) -> Tensor:
    """The distribution each row draws from, as probabilities [N, vocab] float32; a greedy row has all mass on its
    argmax. Of a row from which nothing can be
    drawn (see `Sampled`) they are NaN, also where it is greedy.

    For verifying drafted tokens: one row per tree node, `drafted` gives the path that leads to it, penalties count
    that path.
    """
    _check_shapes(logits, sequences, drafted)
    paths = drafted or [()] * len(sequences)
    probabilities = torch.zeros_like(logits)
    for rows in chunks(list(range(len(sequences))), logits.shape[1]):
        chunk, index = take(logits, rows)
        chosen = [sequences[r] for r in rows]
        finite = finite_rows(chunk)
        chunk = adjust(chunk, chosen, [paths[r] for r in rows])
        peaks, best = chunk.max(-1)
        drawn = restrict(chunk, chosen).softmax(-1)
        greedy = sent([r for r, each in enumerate(chosen) if each.params.greedy], torch.int64, logits.device)
        drawn[greedy] = 0.0
        drawn[greedy, best[greedy]] = 1.0
        drawn.masked_fill_(~(finite & peaks.isfinite())[:, None], torch.nan)
        probabilities[index] = drawn
    return probabilities


def adjust(logits: Tensor, sequences: Many[Sequence], drafted: Drafted) -> Tensor:
    """Bias, penalties, constraints and grammars, which can change the argmax. logits [N, vocab] is returned as it is
    when no row asks for any, else a copy."""
    if not any(sequence.adjusted for sequence in sequences):
        return logits
    effects = {
        row: sequence.constraints.effect(path)
        for row, (sequence, path) in enumerate(zip(sequences, drafted, strict=True))
        if sequence.constraints is not None
    }
    logits = _biased(
        logits, [(row, token, bias) for row, effect in effects.items() for token, bias in effect.bias.items()]
    )
    masks = {
        row: sequence.grammar.mask(path)
        for row, (sequence, path) in enumerate(zip(sequences, drafted, strict=True))
        if sequence.grammar is not None
    }
    # What a grammar bars is not forced: an answer is cut at max_tokens rather than failed.
    effects |= {row: effect.unforced(masks[row]) for row, effect in effects.items() if row in masks and effect.forced}
    return masked(_confined(_penalized(logits, sequences, drafted), effects), masks)


def _biased(logits: Tensor, biases: Many[tuple[int, int, float]]) -> Tensor:
    """biases: (row, token, what to add), every token of a row once."""
    if not biases:
        return logits
    rows, tokens, values = zip(*biases, strict=True)
    where = placed(rows, _in_vocabulary(np.array(tokens), logits.shape[1]), logits.device)
    return logits.index_put(where, logits[where] + sent(values, logits.dtype, logits.device))


def _penalized(logits: Tensor, sequences: Many[Sequence], drafted: Drafted) -> Tensor:
    """Logit bias and penalties.

    Repetition penalty (Keskar et al., "CTRL", 2019): logits of tokens in prompt or output are divided by it when
    positive, multiplied when negative.
    """
    pieces = [
        (row, sequence.adjustments.extended(path) if path else sequence.adjustments)
        for row, (sequence, path) in enumerate(zip(sequences, drafted, strict=True))
        if sequence.adjustments is not None
    ]
    rows = np.repeat([row for row, _ in pieces], [len(piece.token_ids) for _, piece in pieces])
    if not len(rows):
        return logits
    tokens = _in_vocabulary(np.concatenate([piece.token_ids for _, piece in pieces]), logits.shape[1])
    where = placed(rows, tokens, logits.device)
    terms = sent(np.concatenate([piece.terms for _, piece in pieces]), torch.float32, logits.device)
    bias, repetition, subtract = terms.unbind(1)
    value = logits[where] + bias
    # A bias of 1e30 divided by a penalty of 1e-30 would be infinite, which says that nothing can be drawn; times 1e30
    # it would bar a token that is unlikely. Bars, which are infinite before, stay.
    limits = torch.finfo(value.dtype)
    penalized = torch.where(value > 0, value / repetition, value * repetition).clamp(limits.min, limits.max) - subtract
    return logits.index_put(where, torch.where(value.isinf(), value, penalized))


def _confined(logits: Tensor, effects: Mapping[int, Effect]) -> Tensor:
    """Allowed tokens alone, of which forced ones alone, and no barred ones."""
    vocab = logits.shape[1]
    logits = _allowed(logits, {row: effect.allowed for row, effect in effects.items() if effect.allowed is not None})
    forced = [(row, token) for row, effect in effects.items() for token in effect.forced]
    barred = [(row, token) for row, effect in effects.items() for token in effect.barred if 0 <= token < vocab]
    if not forced and not barred:
        return logits
    logits = logits.clone()
    for pairs, value in ((forced, 0.0), (barred, -torch.inf)):
        if pairs:
            rows, tokens = zip(*pairs, strict=True)
            where = placed(rows, _in_vocabulary(np.array(tokens), vocab), logits.device)
            if pairs is forced:
                logits.index_fill_(0, where[0], -torch.inf)
            logits.index_put_(where, torch.full((), value, dtype=logits.dtype, device=logits.device))
    return logits


def _allowed(logits: Tensor, allowed: Mapping[int, np.ndarray]) -> Tensor:
    """allowed: tokens of a row that keep their logits, each once."""
    if not allowed:
        return logits
    rows = sent(list(allowed), torch.int64, logits.device)
    counts = [len(tokens) for tokens in allowed.values()]
    tokens = _in_vocabulary(np.concatenate(list(allowed.values())), logits.shape[1])
    row_of_token = np.repeat(list(allowed), counts)
    where = placed(row_of_token, tokens, logits.device)
    kept = logits[where]
    return logits.index_fill(0, rows, -torch.inf).index_put(where, kept)


def placed(rows: Many[int] | np.ndarray, tokens: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where to index logits: a row and a token each."""
    return sent(rows, torch.int64, device), sent(tokens, torch.int64, device)


def _in_vocabulary(tokens: np.ndarray, vocab: int) -> np.ndarray:
    if tokens.max() >= vocab or tokens.min() < 0:
        raise ValueError(
            f"a token id of a bias, a constraint or a history is outside the vocabulary of {vocab}: "
            f"{tokens.min()} to {tokens.max()}"
        )
    return tokens


def restrict(logits: Tensor, sequences: Many[Sequence]) -> Tensor:
    """Temperature, min-p, top-k, top-p: scaled logits [N, vocab] float32 with -inf for every token that may not be
    drawn. Greedy rows pass with temperature 1.

    At least the most likely token stays. Tokens tied with the k-th stay, as in vLLM and transformers.
    """
    vocab, device = logits.shape[1], logits.device
    # Within what float32 holds: infinity would make a number of -inf, and 0 none of the maximum. Subtracting that first
    # keeps a tiny one from inf - inf.
    limits = torch.finfo(logits.dtype)
    temperatures = [min(max(sequence.params.temperature or 1.0, limits.tiny), limits.max) for sequence in sequences]
    temperature = sent(temperatures, logits.dtype, device)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    min_p = [sequence.params.min_p for sequence in sequences]
    if any(min_p):
        floor = sent(min_p, logits.dtype, device).log()
        logits = logits.masked_fill(logits < floor[:, None], -torch.inf)
    top_k = [min(sequence.params.top_k, vocab) if sequence.params.top_k > 0 else vocab for sequence in sequences]
    if min(top_k) < vocab:
        limited = [r for r, k in enumerate(top_k) if k < vocab]
        part, index = take(logits, limited)
        last = sent([top_k[r] - 1 for r in limited], torch.int64, device)
        kth = part.topk(max(top_k[r] for r in limited), dim=-1).values.gather(1, last[:, None])
        logits = logits.index_put((index,), part.masked_fill(part < kth, -torch.inf))
    if any(sequence.params.top_p < 1 for sequence in sequences):
        logits = _restrict_mass(logits, [sequence.params.top_p for sequence in sequences])
    return logits


def _restrict_mass(logits: Tensor, top_p: list[float]) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities sum to at least top_p. logits: [N, vocab] float32."""
    nucleus = [r for r, p in enumerate(top_p) if p < 1]
    part, index = take(logits, nucleus)
    ordered, order = part.sort(dim=-1, descending=True, stable=True)
    # In float64, so that the result does not depend on the order in which a device adds up rows of different counts.
    mass = ordered.softmax(-1, dtype=torch.float64)
    before = mass.cumsum(-1).sub_(mass)
    del mass
    wanted = sent([top_p[r] for r in nucleus], torch.float64, logits.device)
    ordered.masked_fill_(before >= wanted[:, None], -torch.inf)
    del before
    return logits.index_put((index,), torch.empty_like(part).scatter_(1, order, ordered))


def _check_shapes(logits: Tensor, sequences: Many[Sequence], drafted: Drafted | None) -> None:
    paths = len(sequences) if drafted is None else len(drafted)
    if logits.ndim != 2 or not logits.shape[0] == len(sequences) == paths:
        raise ValueError(
            f"logits {tuple(logits.shape)} for {len(sequences)} sequences and {paths} paths: need one row each"
        )
