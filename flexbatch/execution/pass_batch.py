"""What a pass runs, as plain data: which query tokens of which sequences, and where their pages lie.

Nothing here refers to a live object, so a pass can be sent to another process as it is. `Scheduler.next_pass` makes a
`PassBatch`, `Executor.run` reads it, and what comes back is found by the ids of the sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from flexbatch.memory.pages import SequencePages

UNREAD = -1
"""In the place of a token that the pass before draws: the device has it, the host does not know it yet."""


@dataclass(frozen=True, eq=False)
class QueryTokens:
    """What one sequence brings to a pass: a chunk of its prompt, one token to decode, or a token tree to verify.

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


@dataclass(frozen=True)
class PassBatch:
    """The query tokens of one pass, by micro-batch; empty micro-batches are left out."""

    micro_batches: tuple[tuple[QueryTokens, ...], ...]

    def __iter__(self) -> Iterator[QueryTokens]:
        return (query for queries in self.micro_batches for query in queries)

    @property
    def num_prompt_tokens(self) -> int:
        """Query tokens that are part of a prompt."""
        return sum(max(0, min(query.num_tokens, query.num_prompt_tokens - query.start)) for query in self)

    @property
    def num_sequences(self) -> int:
        return sum(map(len, self.micro_batches))


@dataclass(frozen=True)
class NewestTokens:
    """What a pass drew, for the one that follows it: ``token_ids`` [n] int64 on the compute device, negative where
    there is none, and the row of each sequence by its id."""

    token_ids: Tensor
    rows: Mapping[int, int]


@dataclass(frozen=True)
class LogitsChunk:
    """Some rows of a pass's logits. rows[i] = (query, query token) of logits[i]; logits: [len(rows), vocab] float32
    on the compute device."""

    rows: tuple[tuple[QueryTokens, int], ...]
    logits: Tensor


Lead = Callable[[Iterator[LogitsChunk], PassBatch, NewestTokens | None], Iterator[LogitsChunk]]
"""Has other ranks run a pass, too: given what runs it here, and the same pass."""
