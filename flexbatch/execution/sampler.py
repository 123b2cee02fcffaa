"""From the logits of a pass to the tokens of its sequences, one block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from flexbatch.execution.sampling import sample, token_logprobs
from flexbatch.execution.work import LogitsBlock, QueryTokens
from flexbatch.request import TokenLogprob


@dataclass
class Drawn:
    """What a pass gave one sequence: new tokens, their log-probabilities, and those of prompt tokens."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, TokenLogprob] | None] = field(default_factory=list)
    prompt_logprobs: list[dict[int, TokenLogprob]] = field(default_factory=list)
    """Of the prompt tokens after each row's own, in order."""


def draw(blocks: Iterable[LogitsBlock]) -> dict[QueryTokens, Drawn]:
    """Sample the next token of every sequence whose newest token was in the pass, and score prompt tokens where that was asked for.

    Logits are consumed block by block, so that those of a long prompt never exist at once.
    """
    results: dict[QueryTokens, Drawn] = {}
    for block in blocks:
        score_prompts(block, results)
        rows = [r for r, (query, token) in enumerate(block.rows) if draws(query, token)]
        if not rows:
            continue
        sampled = sample(select(block.logits, rows), [block.rows[r][0].sequence.state for r in rows])
        for r, token_id, entry in zip(rows, sampled.token_ids.tolist(), sampled.logprobs, strict=True):
            drawn = results.setdefault(block.rows[r][0], Drawn())
            drawn.token_ids.append(token_id)
            drawn.logprobs.append(entry)
    return results


def select(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def draws(query: QueryTokens, token: int) -> bool:
    """Whether the row predicts a token that the sequence does not have yet (and wants)."""
    return query.start + token + 1 == len(query.sequence.token_ids) and query.sequence.output.finish is None


def score_prompts(block: LogitsBlock, results: dict[QueryTokens, Drawn]) -> None:
    """Log-probabilities of the prompt tokens that follow the rows of sequences with ``prompt_logprobs``."""
    rows, targets, counts = [], [], []
    for r, (query, token) in enumerate(block.rows):
        sequence, following = query.sequence, query.start + token + 1
        if sequence.state.params.prompt_logprobs is not None and following < sequence.num_prompt_tokens:
            rows.append(r)
            targets.append(sequence.token_ids[following])
            counts.append(sequence.state.params.prompt_logprobs)
    if rows:
        for r, entry in zip(rows, token_logprobs(block.logits, targets, counts, rows=rows), strict=True):
            results.setdefault(block.rows[r][0], Drawn()).prompt_logprobs.append(entry)
