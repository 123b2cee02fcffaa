"""What a pass runs, as plain data: which query tokens of which sequences, and where their pages lie.

Nothing here refers to a live object, so a pass can be sent to another process as it is. `Scheduler.next_pass` makes a
`PassBatch`, `Executor.run` reads it, and what comes back is found by the ids of the sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain

import numpy as np
from torch import Tensor

from flexbatch.memory.pages import SequencePages

UNREAD = -1
"""In the place of a token that the pass before draws: the device has it, the host does not know it yet."""


@dataclass(eq=False)
class QueryTokens:
    """What one sequence brings to a pass: a chunk of its prompt, one token to decode, or a token tree to verify. Nobody
    changes it; a frozen one takes 1.1 us to make instead of 0.3, and a pass may need 2,500.

    ``parents`` is None for consecutive tokens. For a tree, token 0 is the last committed token and ``parents[i]`` the
    query token that token i continues (-1 for token 0). Logits are wanted for query tokens ``first_logit`` and later.
    The one token to decode may be `UNREAD`.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    start: int
    """Tokens in the cache before this pass: the position of the first query token."""
    first_logit: int
    pages: SequencePages
    num_prompt_tokens: int
    """Tokens of the sequence's whole prompt."""
    parents: tuple[int, ...] | None = None
    adapter: int = 0
    """Its LoRA adapter by number, 0 for none."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def positions(self) -> Many[int]:
        """The position of every query token in the text; tree nodes that continue the same token share one."""
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
        children = {
            (parent, token): i
            for i, (parent, token) in reversed(list(enumerate(zip(self.parents, self.token_ids, strict=True))))
        }
        path: list[int] = []
        node = 0
        while (following := children.get((node, token_ids[node]))) is not None:
            path.append(following)
            node = following
        return tuple(path)

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """For every query token of a tree, the drafted tokens from below token 0 down to it."""
        paths: list[tuple[int, ...]] = []
        for parent, token in zip(self.parents or (), self.token_ids, strict=True):
            paths.append(() if parent < 0 else (*paths[parent], token))
        return tuple(paths)

    @property
    def num_tentative(self) -> int:
        """Trailing query tokens that may be taken back after verification."""
        return 0 if self.parents is None else len(self.token_ids) - 1


@dataclass(frozen=True, eq=False)
class DecodeTokens(Many[QueryTokens]):
    """The one token of each of some sequences that decode, with their cache on the gpu tier, as arrays: with 1,000 of
    them, a `QueryTokens` of each would cost the host 20 ms a pass. As a sequence it makes these one by one."""

    sequence_ids: np.ndarray
    """[n] int64."""
    token_ids: np.ndarray
    """[n] int64, `UNREAD` where the host does not know it."""
    starts: np.ndarray
    """[n] int32, tokens in the cache before this pass."""
    num_prompt_tokens: np.ndarray
    adapters: np.ndarray
    num_pages: np.ndarray
    """[n] int32 each."""
    page_table: np.ndarray
    """[n, at least the most of num_pages] int32; what is behind a sequence's own pages is any number."""

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def part(self, start: int, end: int) -> DecodeTokens:
        """The tokens from ``start`` to ``end``."""
        return DecodeTokens(*(getattr(self, field.name)[start:end] for field in fields(self)))

    def __getitem__(self, index: int) -> QueryTokens:  # type: ignore[override]
        return QueryTokens(
            int(self.sequence_ids[index]),
            (int(self.token_ids[index]),),
            int(self.starts[index]),
            0,
            SequencePages("gpu", tuple(self.page_table[index, : self.num_pages[index]].tolist())),
            int(self.num_prompt_tokens[index]),
            adapter=int(self.adapters[index]),
        )

    def __iter__(self) -> Iterator[QueryTokens]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, eq=False)
class MicroBatchTokens(Many[QueryTokens]):
    """The query tokens of a micro-batch, of which the first are arrays."""

    decoding: DecodeTokens
    others: tuple[QueryTokens, ...]

    def __len__(self) -> int:
        return len(self.decoding) + len(self.others)

    def __getitem__(self, index: int) -> QueryTokens:  # type: ignore[override]
        behind = index - len(self.decoding)
        return self.decoding[index] if behind < 0 else self.others[behind]

    def __iter__(self) -> Iterator[QueryTokens]:
        return chain(self.decoding, self.others)


def parts_of(queries: Many[QueryTokens]) -> tuple[DecodeTokens | None, Many[QueryTokens]]:
    """What a micro-batch has as arrays, and the rest of its query tokens."""
    return (queries.decoding, queries.others) if isinstance(queries, MicroBatchTokens) else (None, queries)


@dataclass(frozen=True)
class PassBatch:
    """The query tokens of one pass, by micro-batch; empty micro-batches are left out. greedy: all that is wanted of any
    logits is which is the largest."""

    micro_batches: tuple[Many[QueryTokens], ...]
    greedy: bool = False

    def __iter__(self) -> Iterator[QueryTokens]:
        return (query for queries in self.micro_batches for query in queries)

    @property
    def decoding(self) -> list[DecodeTokens]:
        """What micro-batches have as arrays."""
        return [queries.decoding for queries in self.micro_batches if isinstance(queries, MicroBatchTokens)]

    @property
    def num_decoding(self) -> int:
        """Sequences whose token is in arrays."""
        return sum(map(len, self.decoding))

    @property
    def others(self) -> Iterator[QueryTokens]:
        """All that are not in arrays."""
        return (query for queries in self.micro_batches for query in parts_of(queries)[1])

    @property
    def sequence_ids(self) -> list[int]:
        """Of all that bring something, those in arrays first."""
        ids = [id for tokens in self.decoding for id in tokens.sequence_ids.tolist()]
        return ids + [query.sequence_id for query in self.others]

    @property
    def num_prompt_tokens(self) -> int:
        """Query tokens that are part of a prompt."""
        prompts = [query for query in self.others if query.start < query.num_prompt_tokens]
        return sum(min(query.num_tokens, query.num_prompt_tokens - query.start) for query in prompts)

    @property
    def num_sequences(self) -> int:
        return sum(map(len, self.micro_batches))


@dataclass(frozen=True)
class DecodedTokens:
    """Tokens that were drawn for sequences that decode, one each, on the host."""

    sequence_ids: list[int]
    token_ids: list[int]


NOTHING_DECODED = DecodedTokens([], [])


@dataclass(frozen=True)
class NewestTokens:
    """What a pass drew, for the one that follows it: ``token_ids`` [n] int64 on the compute device, negative where
    there is none, and the row of each sequence by its id."""

    token_ids: Tensor
    rows: Mapping[int, int]


@dataclass(frozen=True)
class LogitsChunk:
    """Some rows of a pass's logits: those of ``decoding``, and then (query, query token) of each other one. logits:
    [rows, vocab] float32 on the compute device; token_ids: [rows] int64 there instead, where they are drawn."""

    rows: tuple[tuple[QueryTokens, int], ...]
    logits: Tensor
    decoding: DecodeTokens | None = None
    token_ids: Tensor | None = None


Lead = Callable[[Iterator[LogitsChunk], PassBatch, NewestTokens | None], Iterator[LogitsChunk]]
"""Has other ranks run a pass, too: given what runs it here, and the same pass."""
