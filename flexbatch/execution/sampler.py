"""From the logits of a pass to the tokens of its sequences, one chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import Protocol

import torch
from torch import Tensor

from flexbatch.execution.copies import Readback, sent
from flexbatch.execution.logprobs import Scored, take
from flexbatch.execution.masks import GrammarFollower
from flexbatch.execution.pass_batch import NOTHING_DECODED, DecodedTokens, LogitsChunk, NewestTokens, QueryTokens
from flexbatch.execution.sampling import NOT_FINITE, Sampled, finite_rows, sample
from flexbatch.execution.sequence import Fault, Sequence
from flexbatch.request import TokenLogprob


@dataclass
class SampledTokens:
    """What a pass gave one sequence: new tokens, their log-probabilities, and those of prompt tokens."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, TokenLogprob] | None] = field(default_factory=list)
    prompt_logprobs: list[dict[int, TokenLogprob]] = field(default_factory=list)
    """Entries for the prompt tokens after each row's own, in order."""
    path: tuple[int, ...] = ()
    """The accepted query tokens of a tree below token 0, to which all but the last of `token_ids` belong."""
    fault: Fault | None = None
    """With one there are no new tokens."""

    def append_to(self, sequence: Sequence) -> int:
        """Returns how many of the tokens a sequence keeps: none with a fault, and it may end with any of them."""
        sequence.fault = sequence.fault or self.fault
        if sequence.fault is not None:
            return 0
        kept = sequence.extend(self.token_ids)
        sequence.logprobs += [entry for entry in self.logprobs[:kept] if entry is not None]
        sequence.prompt_logprobs += self.prompt_logprobs
        return kept

    def mark_fault(self, num_output_tokens: int, grammar: GrammarFollower | None = None) -> None:
        """Turn a mark instead of the last token (`sampling.NOT_FINITE`, `sampling.ALL_BARRED`) into a fault.
        num_output_tokens: that the sequence had before the pass. grammar: that it follows."""
        if self.fault is not None or not self.token_ids or self.token_ids[-1] >= 0:
            return
        *path, mark = self.token_ids
        number = num_output_tokens + len(path) + 1
        if mark == NOT_FINITE:
            problem = f"the model's logits for generated token {number} are not finite numbers"
        elif grammar is not None:
            problem = f"structured_outputs: {grammar.problem or grammar.DEAD_END} as generated token {number}"
        else:
            problem = f"bias, suppressed words and other constraints bar every token as generated token {number}"
        self.fault = Fault(problem, mark == NOT_FINITE)
        self.token_ids, self.logprobs, self.path = [], [], ()

    def follow(self, query: QueryTokens) -> SampledTokens:
        """From a token after every query token of a tree to the path that plain decoding takes."""
        path = query.follow(self.token_ids)
        nodes = (0, *path)
        return SampledTokens(
            [self.token_ids[node] for node in nodes],
            [self.logprobs[node] for node in nodes],
            self.prompt_logprobs,
            path,
            self.fault,
        )


class Verifier(Protocol):
    """Decides about trees that are not simply followed; see `proposals.Proposer`."""

    def needs_verification(self, query: QueryTokens) -> bool: ...

    def verify(self, query: QueryTokens, logits: Tensor) -> SampledTokens: ...

    def follow(self, query: QueryTokens, sampled: SampledTokens) -> SampledTokens: ...


@dataclass(frozen=True)
class Draw:
    """A token after each of some query tokens, out of one chunk of logits. decoding: the sequences of the first of
    them, which bring one token each; queries: of the others."""

    decoding: list[int]
    queries: tuple[QueryTokens, ...]
    sampled: Sampled


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of the prompt tokens that follow rows of logits, on the way to the host."""

    rows: tuple[tuple[QueryTokens, int], ...]
    scored: Scored
    finite: Readback


class SampledPass:
    """What a pass has drawn. It is on the device until somebody reads it: the next pass may take its newest tokens
    there."""

    def __init__(self, sequences: Mapping[int, Sequence], verifier: Verifier | None = None) -> None:
        self.sequences, self.verifier = sequences, verifier
        self.draws: list[Draw] = []
        self.prompts: list[PromptScores] = []
        self.verified: dict[int, SampledTokens] = {}
        """Of trees about which the verifier has decided."""
        self.decoded = NOTHING_DECODED
        """Once they are read: the tokens of sequences that bring one each, where there is no more to say of them."""

    def end(self) -> None:
        """All is drawn: send it to the host, at once."""
        tokens = [draw.sampled.token_ids for draw in self.draws]
        self.token_ids = tokens[0] if len(tokens) == 1 else torch.cat(tokens) if tokens else None
        self.readback = None if self.token_ids is None else Readback(self.token_ids)

    @property
    def newest(self) -> NewestTokens | None:
        """For the next pass, of sequences without trees; None where nothing was drawn."""
        if self.token_ids is None:
            return None
        ids = [id for draw in self.draws for id in (*draw.decoding, *(each.sequence_id for each in draw.queries))]
        return NewestTokens(self.token_ids, dict(zip(ids, range(len(ids)), strict=True)))

    def read(self) -> dict[int, SampledTokens]:
        """What the pass gave every sequence that is not in `decoded`, by its id. Waits until the pass has run."""
        results, decoded = self.verified, DecodedTokens([], [])
        for scores in self.prompts:
            self.add_scores(results, scores)
        trees: dict[int, QueryTokens] = {}
        tokens = [] if self.readback is None else self.readback.take()[0].tolist()
        for draw in self.draws:
            ids = [*draw.decoding, *(query.sequence_id for query in draw.queries)]
            mine, tokens, plain = tokens[: len(ids)], tokens[len(ids) :], 0
            if draw.sampled.scored is None and min(mine) >= 0:
                # An object for each of 2,477 tokens took the host 3 ms a pass.
                more = results or any(query.parents is not None for query in draw.queries)
                plain = len(draw.decoding if more else ids)
                decoded.sequence_ids.extend(ids[:plain])
                decoded.token_ids.extend(mine[:plain])
            for id, token_id, entry in islice(zip(ids, mine, draw.sampled.logprobs, strict=True), plain, None):
                sampled = results.setdefault(id, SampledTokens())
                sampled.token_ids.append(token_id)
                sampled.logprobs.append(entry)
            trees |= {query.sequence_id: query for query in draw.queries if query.parents is not None}
        self.decoded = decoded
        for sequence_id, query in trees.items():
            sampled = results[sequence_id]
            follow = sampled.follow if self.verifier is None else partial(self.verifier.follow, sampled=sampled)
            results[sequence_id] = follow(query)
        for sequence_id, sampled in results.items():
            sequence = self.sequences[sequence_id]
            sampled.mark_fault(sequence.num_output_tokens, sequence.grammar)
        return results

    @staticmethod
    def add_scores(results: dict[int, SampledTokens], scores: PromptScores) -> None:
        """The log-probabilities of prompt tokens, or a fault where a row has none."""
        (finite,) = scores.finite.take()
        for (query, token), is_finite, entry in zip(scores.rows, finite.tolist(), scores.scored.read(), strict=True):
            assert entry is not None, "the tokens of a prompt are known"
            sampled = results.setdefault(query.sequence_id, SampledTokens())
            sampled.prompt_logprobs.append(entry)
            if not is_finite:
                number = query.start + token + 1
                problem = f"the model's logits for prompt token {number} (the first is 0) are not finite numbers"
                sampled.fault = sampled.fault or Fault(problem)


def sample_tokens(
    chunks: Iterable[LogitsChunk], sequences: Mapping[int, Sequence], verifier: Verifier | None = None
) -> SampledPass:
    """Sample the next token of every sequence whose newest token was in the pass, and score prompt tokens where that
    was asked for. Sequences go by their ids; rows of those that are not there any more are left out.

    Logits are consumed chunk by chunk, so that those of a long prompt never exist at once. Nothing waits for the
    device, but where ``verifier`` decides. Of a tree, every query token draws what plain decoding would draw there, and
    the path of matching tokens is the result; trees that need ``verifier`` are handed to it whole.
    """
    # By now, not a live view: who ends before the tokens are read is still counted by what it had.
    drawn = SampledPass(dict(sequences), verifier)
    verified: set[int] = set()
    incomplete: dict[int, Tensor] = {}
    for chunk in chunks:
        if chunk.token_ids is None:
            score_prompts(chunk, sequences, drawn)
        if verifier is not None:
            verified |= verify_trees(chunk, incomplete, drawn.verified, verifier)
        ids = [] if chunk.decoding is None else chunk.decoding.sequence_ids.tolist()
        # A sequence that runs still wants the token after its newest one, which is what it brought.
        here = [r for r, id in enumerate(ids) if id in sequences]
        wanted = [
            (r, query, token)
            for r, (query, token) in enumerate(chunk.rows, len(ids))
            if query.sequence_id not in verified
            and (sequence := sequences.get(query.sequence_id)) is not None
            and draws(query, token, sequence)
        ]
        if not here and not wanted:
            continue
        rows, decoding = [*here, *(r for r, _, _ in wanted)], [ids[r] for r in here]
        queries = tuple(query for _, query, _ in wanted)
        if chunk.token_ids is not None:
            sampled = Sampled(select(chunk.token_ids, rows))
        else:
            owners = [sequences[id] for id in (*decoding, *(query.sequence_id for query in queries))]
            drafted = [query.paths[token] if query.parents is not None else () for _, query, token in wanted]
            sampled = sample(select(chunk.logits, rows), owners, [() for _ in decoding] + drafted)
        drawn.draws.append(Draw(decoding, queries, sampled))
    drawn.end()
    return drawn


def verify_trees(
    chunk: LogitsChunk, incomplete: dict[int, Tensor], results: dict[int, SampledTokens], verifier: Verifier
) -> set[int]:
    """Have every tree verified whose last query token is in the chunk; returns the sequences of all trees that need
    it, now or later.

    incomplete: logits of a tree that goes on in the next chunk. They are copied: a view would keep the whole chunk
    beside the next one.
    """
    verified = set()
    for query, rows in groupby(range(len(chunk.rows)), key=lambda r: chunk.rows[r][0]):
        if query.parents is None or not verifier.needs_verification(query):
            continue
        verified.add(query.sequence_id)
        start, *_ = indices = list(rows)
        logits = chunk.logits[start : start + len(indices)]
        if query.sequence_id in incomplete:
            logits = torch.cat((incomplete.pop(query.sequence_id), logits))
        if len(logits) == query.num_tokens:
            results[query.sequence_id] = verifier.verify(query, logits)
        else:
            incomplete[query.sequence_id] = logits.clone()
    return verified


def select(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else take(logits, rows)[0]


def draws(query: QueryTokens, token: int, sequence: Sequence) -> bool:
    """Whether the row predicts a token that the sequence does not have yet (and wants)."""
    newest = query.parents is not None or query.start + token + 1 == len(sequence.token_ids)
    return newest and sequence.output.finish is None


def score_prompts(chunk: LogitsChunk, sequences: Mapping[int, Sequence], drawn: SampledPass) -> None:
    """Log-probabilities of the prompt tokens that follow the rows of sequences with ``prompt_logprobs``."""
    rows, targets, counts = [], [], []
    first = 0 if chunk.decoding is None else len(chunk.decoding)  # behind those that have read their prompts
    for r, (query, token) in enumerate(chunk.rows, first):
        sequence = sequences.get(query.sequence_id)
        if (
            sequence is not None
            and (wanted := sequence.params.prompt_logprobs) is not None
            and (following := query.start + token + 1) < sequence.num_prompt_tokens
        ):
            rows.append(r)
            targets.append(sequence.token_ids[following])
            counts.append(wanted)
    if rows:
        scored = Scored(chunk.logits, sent(targets, torch.int64, chunk.logits.device), counts, rows)
        finite = finite_rows(select(chunk.logits, rows))
        drawn.prompts.append(PromptScores(tuple(chunk.rows[r - first] for r in rows), scored, Readback(finite)))
