"""What a pass is made of: sequences, their query tokens, and the logits that come back."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from flexbatch.execution.request_state import RequestState
from flexbatch.memory.pages import PageTable
from flexbatch.request import TokenLogprob
from flexbatch.text.detokenize import OutputText


def num_uncomputed(output: OutputText, num_prompt_tokens: int) -> int:
    """1 for a prompt that is only scored: its last token is predicted, and what follows it is not asked for. It may
    stand past the context's end."""
    return int(output.max_tokens == 0 and num_prompt_tokens > 1)


@dataclass(frozen=True)
class Fault:
    """Why a sequence cannot go on. ``in_model``: the model's own logits are not finite, whatever was asked of them."""

    problem: str
    in_model: bool = True


@dataclass(eq=False)
class Sequence:
    """One request in flight: its tokens, its cache, and the micro-batch it belongs to for life."""

    state: RequestState
    output: OutputText
    table: PageTable
    micro_batch: int
    token_ids: list[int]
    """Prompt and generated tokens."""
    logprobs: list[dict[int, TokenLogprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, TokenLogprob] | None] = field(default_factory=list)
    fault: Fault | None = None
    """Why it cannot go on. It stays until its prompt is read: others may wait for the pages that they share with it."""
    plain: bool = False
    """Nothing is drafted for it any more."""
    # Attributes, as they never change and are asked for several times a pass by every sequence.
    num_prompt_tokens: int = field(init=False)
    num_uncomputed: int = field(init=False)
    """Tokens of the prompt that are never read; see `num_uncomputed`."""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.state.request.prompt_token_ids)
        self.num_uncomputed = num_uncomputed(self.output, self.num_prompt_tokens)

    @property
    def num_cached(self) -> int:
        """Leading tokens whose keys and values are in the cache."""
        return self.table.num_tokens

    @property
    def num_uncached(self) -> int:
        """Tokens that still have to be read."""
        return len(self.token_ids) - self.num_uncomputed - self.table.num_tokens

    def check(self) -> None:
        """Invariants: the cache never holds more than the tokens, and never the newest one."""
        assert self.num_cached <= len(self.token_ids), (self.num_cached, len(self.token_ids))
        assert self.token_ids[self.num_prompt_tokens :] == self.output.token_ids == self.state.output_token_ids
        self.state.check()


@dataclass(frozen=True, eq=False)
class QueryTokens:
    """What one sequence brings to a pass: a chunk of its prompt, one token to decode, or a token tree to verify.

    ``parents`` is None for consecutive tokens. For a tree, token 0 is the last committed token and ``parents[i]``
    the query token that token i continues (-1 for token 0). Logits are wanted for query tokens ``first_logit`` and
    later.
    """

    sequence: Sequence
    token_ids: tuple[int, ...]
    start: int
    """Tokens in the cache before this pass: the position of the first query token."""
    first_logit: int
    parents: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def positions(self) -> Many[int]:
        """Of every query token in the text; those of a tree that continue the same token stand at the same place."""
        if self.parents is None:
            return range(self.start, self.start + len(self.token_ids))
        positions: list[int] = []
        for parent in self.parents:
            positions.append(self.start if parent < 0 else positions[parent] + 1)
        return positions

    def follow(self, token_ids: Many[int]) -> tuple[int, ...]:
        """The path that plain decoding takes through the tree: query tokens from below token 0 down, given the token
        drawn after every query token."""
        assert self.parents is not None
        places = {
            (parent, token): i
            for i, (parent, token) in reversed(list(enumerate(zip(self.parents, self.token_ids, strict=True))))
        }
        path: list[int] = []
        place = 0
        while (following := places.get((place, token_ids[place]))) is not None:
            path.append(following)
            place = following
        return tuple(path)

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """For every query token of a tree, the drafted tokens from below token 0 down to it."""
        paths: list[tuple[int, ...]] = []
        for parent, token in zip(self.parents or (), self.token_ids, strict=True):
            paths.append(() if parent < 0 else (*paths[parent], token))
        return tuple(paths)

    @property
    def tentative(self) -> int:
        """Trailing query tokens that may be taken back after verification."""
        return 0 if self.parents is None else len(self.token_ids) - 1


@dataclass(frozen=True)
class PassWork:
    """The query tokens of one pass, by micro-batch; empty micro-batches are left out."""

    micro_batches: tuple[tuple[QueryTokens, ...], ...]

    @property
    def num_prompt_tokens(self) -> int:
        """Query tokens that are part of a prompt."""
        return sum(
            max(0, min(query.num_tokens, query.sequence.num_prompt_tokens - query.start))
            for queries in self.micro_batches
            for query in queries
        )

    @property
    def num_sequences(self) -> int:
        return sum(len(queries) for queries in self.micro_batches)


@dataclass(frozen=True)
class LogitsChunk:
    """Some rows of a pass's logits. rows[i] = (query, query token) of logits[i]; logits: [len(rows), vocab] float32
    on the compute device."""

    rows: tuple[tuple[QueryTokens, int], ...]
    logits: Tensor
