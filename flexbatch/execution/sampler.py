"""From the logits of a pass to the tokens of its sequences, one block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from flexbatch.execution.sampling import NOT_FINITE, finite_rows, sample, token_logprobs
from flexbatch.execution.work import Fault, LogitsChunk, QueryTokens
from flexbatch.request import TokenLogprob


@dataclass
class SampledTokens:
    """What a pass gave one sequence: new tokens, their log-probabilities, and those of prompt tokens."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, TokenLogprob] | None] = field(default_factory=list)
    prompt_logprobs: list[dict[int, TokenLogprob]] = field(default_factory=list)
    """Of the prompt tokens after each row's own, in order."""
    path: tuple[int, ...] = ()
    """Of a tree: the accepted query tokens below token 0, to which all but the last of `token_ids` belong."""
    fault: Fault | None = None
    """With one there are no new tokens."""

    def settle(self, query: QueryTokens) -> None:
        """Turn a mark in the place of the last token (`sampling.NOT_FINITE`, `sampling.ALL_BARRED`) into a fault."""
        if self.fault is not None or not self.token_ids or self.token_ids[-1] >= 0:
            return
        *path, mark = self.token_ids
        place = len(query.sequence.state.output_token_ids) + len(path) + 1
        if mark == NOT_FINITE:
            problem = f"the model's logits for generated token {place} are not finite numbers"
        else:
            problem = f"bias, suppressed words and other constraints bar every token as generated token {place}"
        self.fault = Fault(problem, mark == NOT_FINITE)
        self.token_ids, self.logprobs, self.path = [], [], ()

    def follow(self, query: QueryTokens) -> SampledTokens:
        """From a token after every query token of a tree to the path that plain decoding takes."""
        path = query.follow(self.token_ids)
        places = (0, *path)
        return SampledTokens(
            [self.token_ids[place] for place in places],
            [self.logprobs[place] for place in places],
            self.prompt_logprobs,
            path,
            self.fault,
        )


class Verifier(Protocol):
    """Decides about trees that are not simply followed; see `proposals.Proposer`."""

    def needs_verification(self, query: QueryTokens) -> bool: ...

    def verify(self, query: QueryTokens, logits: Tensor) -> SampledTokens: ...

    def follow(self, query: QueryTokens, drawn: SampledTokens) -> SampledTokens: ...


def draw(blocks: Iterable[LogitsChunk], verifier: Verifier | None = None) -> dict[QueryTokens, SampledTokens]:
    """Sample the next token of every sequence whose newest token was in the pass, and score prompt tokens where that
    was asked for.

    Logits are consumed block by block, so that those of a long prompt never exist at once. Of a tree, every query
    token draws what plain decoding would draw there, and the path of matching tokens is the result; trees that
    ``verifier`` judges are handed to it whole.
    """
    results: dict[QueryTokens, SampledTokens] = {}
    verified_whole: set[QueryTokens] = set()
    begun: dict[QueryTokens, Tensor] = {}
    for block in blocks:
        score_prompts(block, results)
        if verifier is not None:
            verified_whole |= verify_trees(block, begun, results, verifier)
        rows = [r for r, (query, token) in enumerate(block.rows) if query not in verified_whole and draws(query, token)]
        if not rows:
            continue
        queries = [block.rows[r][0] for r in rows]
        drafted = [
            query.paths[block.rows[r][1]] if query.parents is not None else ()
            for r, query in zip(rows, queries, strict=True)
        ]
        sampled = sample(select(block.logits, rows), [query.sequence.state for query in queries], drafted)
        for query, token_id, entry in zip(queries, sampled.token_ids.tolist(), sampled.logprobs, strict=True):
            drawn = results.setdefault(query, SampledTokens())
            drawn.token_ids.append(token_id)
            drawn.logprobs.append(entry)
    for query, drawn in results.items():
        if query.parents is not None and query not in verified_whole:
            results[query] = drawn.follow(query) if verifier is None else verifier.follow(query, drawn)
        results[query].settle(query)
    return results


def verify_trees(
    block: LogitsChunk, begun: dict[QueryTokens, Tensor], results: dict[QueryTokens, SampledTokens], verifier: Verifier
) -> set[QueryTokens]:
    """Have every tree judged whose last query token is in the block, and return all that are judged, now or later.

    begun: logits of a tree that goes on in the next block. They are copied: a view would keep the whole block beside
    the next one.
    """
    verified_whole = set()
    for query, rows in groupby(range(len(block.rows)), key=lambda r: block.rows[r][0]):
        if query.parents is None or not verifier.needs_verification(query):
            continue
        verified_whole.add(query)
        start, *_ = places = list(rows)
        logits = block.logits[start : start + len(places)]
        if query in begun:
            logits = torch.cat((begun.pop(query), logits))
        if len(logits) == query.num_tokens:
            results[query] = verifier.verify(query, logits)
        else:
            begun[query] = logits.clone()
    return verified_whole


def select(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def draws(query: QueryTokens, token: int) -> bool:
    """Whether the row predicts a token that the sequence does not have yet (and wants)."""
    newest = query.parents is not None or query.start + token + 1 == len(query.sequence.token_ids)
    return newest and query.sequence.output.finish is None


def score_prompts(block: LogitsChunk, results: dict[QueryTokens, SampledTokens]) -> None:
    """Log-probabilities of the prompt tokens that follow the rows of sequences with ``prompt_logprobs``, or a fault
    where a row has none."""
    rows, targets, counts = [], [], []
    for r, (query, token) in enumerate(block.rows):
        sequence = query.sequence
        if (wanted := sequence.state.request.params.prompt_logprobs) is not None and (
            following := query.start + token + 1
        ) < sequence.num_prompt_tokens:
            rows.append(r)
            targets.append(sequence.token_ids[following])
            counts.append(wanted)
    if rows:
        finite = finite_rows(block.logits).tolist()
        for r, entry in zip(rows, token_logprobs(block.logits, targets, counts, rows=rows), strict=True):
            query, token = block.rows[r]
            drawn = results.setdefault(query, SampledTokens())
            drawn.prompt_logprobs.append(entry)
            if not finite[r]:
                place = query.start + token + 1
                problem = f"the model's logits for prompt token {place} (the first is 0) are not finite numbers"
                drawn.fault = drawn.fault or Fault(problem)
