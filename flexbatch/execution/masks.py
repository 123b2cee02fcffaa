"""Answers that follow a grammar: which tokens may come next in a sequence, told on CPU threads while a pass runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Many
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexbatch.execution.pass_batch import QueryTokens
from flexbatch.text.grammars import Grammar, State, one_line

if TYPE_CHECKING:
    from flexbatch.execution.sequence import Sequence

WORKERS = 4
"""Threads that compute masks, at most; the library lets go of Python's lock meanwhile."""


class GrammarFollower:
    """Where one answer stands in its grammar.

    A mask is asked for with the drafted tokens after the answer: every node of a token tree has what plain decoding
    would have there. Masks that `prepare` has computed, in another thread, are waited for.
    """

    DEAD_END = "the form of the answer, and other constraints, leave no token of the vocabulary"

    def __init__(self, grammar: Grammar, ends: Collection[int]) -> None:
        """ends: tokens that end the answer, which may come where the grammar is at an end and nowhere else."""
        self._grammar, self._matcher, self._state = grammar, grammar.matcher(), grammar.root
        size = len(grammar.vocabulary.bytes)
        self._ends = np.array(sorted(token for token in ends if token < size), dtype=np.int64)
        self._is_text = any(grammar.vocabulary.bytes[token] for token in self._ends)
        self._ahead: dict[tuple[int, ...], State] = {}
        self._pending: Future[None] | None = None
        self._num_taken = 0
        self.problem = ""
        """Why nothing can follow any more: a limit of the library, or a token that the grammar does not have."""

    def mask(self, path: tuple[int, ...] = ()) -> np.ndarray:
        """A bit for every token that may follow the answer and ``path``, lowest first, uint8. All may where the path
        leaves the grammar, or goes on behind an end: the row before bars the one, and what follows the other is not
        kept. None may once there is a `problem`."""
        self._wait()
        state = self._at(path)
        if self.problem:
            return np.zeros_like(state.mask)
        assert state.mask is not None
        if not len(self._ends) or not (state.accepting or self._is_text):
            return state.mask
        mask, bits = state.mask.copy(), np.left_shift(1, self._ends % 8).astype(np.uint8)
        if state.accepting:
            np.bitwise_or.at(mask, self._ends // 8, bits)
        else:
            np.bitwise_and.at(mask, self._ends // 8, ~bits)
        return mask

    def begin(self, pending: Future[None]) -> None:
        """``pending`` calls `prepare` in another thread; until it has, nothing else touches the matcher."""
        self._wait()
        self._pending = pending

    def prepare(self, paths: Iterable[tuple[int, ...]]) -> None:
        """Compute the masks after these paths."""
        for path in paths:
            self._at(path)

    def advance(self, token: int) -> None:
        """Take in one more token of the answer."""
        self._wait()
        self._num_taken += 1
        if token in self._ends and (self._state.accepting or not self._is_text):
            return
        state = self._ahead.get((token,)) or self._grammar.child(self._state, token)
        self._state, self._ahead = state, {}
        if not self.problem and not self._matcher.consume_token(token):
            self.problem = one_line(self._matcher.get_error()) or f"token {token} does not follow it"

    def forced(self) -> list[int]:
        """Tokens of which each is the only one that can come, in their order; [] where there is a choice, or the answer
        may end."""
        self._wait()
        if self.problem or not self._matcher.compute_ff_bytes():  # 1 us, where the tokens cost 60
            return []
        return list(self._matcher.compute_ff_tokens())

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing more can follow."""
        self._wait()
        return not self.problem and self._matcher.is_stopped()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _at(self, path: tuple[int, ...]) -> State:
        """The state after a path, with its mask."""
        state = self._state if not path else self._ahead.get(path)
        if state is None:
            state = self._state
            for token in path:
                state = self._grammar.child(state, token)
            self._ahead[path] = state
        if state.mask is None:
            self._fill(state, path)
        return state

    def _fill(self, state: State, path: tuple[int, ...]) -> None:
        matcher = self._matcher
        count = matcher.try_consume_tokens(list(path)) if path and not self.problem else 0
        if count == len(path) and not self.problem:
            self._grammar.fill(state, matcher)
        else:
            state.mask = np.full_like(self._grammar.root.mask, 255)
        if count:
            matcher.rollback(count)
        if matcher.is_error():
            self.problem = self.problem or one_line(matcher.get_error())

    def check(self, num_tokens: int) -> None:
        """Invariant: every token of the answer was taken in."""
        assert self._num_taken == num_tokens, (self._num_taken, num_tokens)


class MaskWorkers:
    """Threads that compute the masks of a pass while it runs; there are none between runs."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, batch: Iterable[QueryTokens], sequences: Mapping[int, Sequence]) -> None:
        """Begin with the masks that sampling will ask for after this pass. It needs the newest token of every sequence
        that follows a grammar (`Sequence.needs_host`)."""
        work = [
            (sequence.grammar, ((),) if query.parents is None else query.paths)
            for query in batch
            if (sequence := sequences[query.sequence_id]).grammar is not None and sequence.is_decoded_by(query)
        ]
        if not work:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(WORKERS, "flexbatch-masks")
        for start in range(WORKERS):
            share = work[start::WORKERS]
            if share:
                pending = self._pool.submit(_prepare, share)
                for follower, _ in share:
                    follower.begin(pending)

    def end(self) -> None:
        """Let the threads go, after a run."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


def _prepare(share: Many[tuple[GrammarFollower, Many[tuple[int, ...]]]]) -> None:
    for follower, paths in share:
        follower.prepare(paths)


def masked(logits: Tensor, masks: Mapping[int, np.ndarray]) -> Tensor:
    """Logits [N, vocab] with -inf for every token of a row that its mask bars. masks: packed bits, by row."""
    if not masks:
        return logits
    vocab = logits.shape[1]
    packed = torch.from_numpy(np.stack(list(masks.values()))).to(logits.device)
    bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=logits.device)
    barred = (packed[:, :, None] & bits).eq(0).view(len(masks), -1)[:, :vocab]
    if len(masks) == len(logits):
        return logits.masked_fill(barred, -torch.inf)
    rows = torch.tensor(list(masks), device=logits.device)
    return logits.index_put((rows,), logits[rows].masked_fill(barred, -torch.inf))
