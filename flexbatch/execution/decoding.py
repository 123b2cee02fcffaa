"""The sequences of a block that decode, as arrays that are kept up by differences.

With 1,000 sequences in flight, 20 ms a pass went into asking each of them for its next token, its position and its
pages, and giving it what was drawn. Here that is a few operations on arrays; Python looks at those alone that come, go,
need a page or have something of their own to do with a token, such as stop strings.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from typing import Any

import numpy as np

from flexbatch.execution.pass_batch import UNREAD, DecodedTokens, DecodeTokens
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.pages import PageTable

STATE = np.dtype(
    [
        ("sequence_id", np.int64),
        ("token_id", np.int64),  # the newest, UNREAD where the host does not know it
        ("length", np.int32),  # tokens of prompt and output, the unread one among them
        ("limit", np.int32),  # the length with which its output ends
        ("pages", np.int32),
        ("prompt", np.int32),
        ("adapter", np.int32),
        ("micro_batch", np.int32),
        ("plain", np.bool_),  # whether nothing but its length and its last tokens decides when it ends
        ("greedy", np.bool_),  # whether it takes the most likely tokens as they are
    ]
)
FIRST_CAPACITY = 64


class Decoding:
    """One entry for each sequence on the gpu tier that has read its prompt, and brings one token to every pass."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.sequences: list[Sequence] = []
        self.texts: list[list[int]] = []
        """Their token ids, prompt and output: the very lists that they have."""
        self.tables: list[PageTable] = []
        self.ends: list[frozenset[int]] = []
        """The tokens that end each of them."""
        self.entries: dict[int, int] = {}
        """Of each sequence, by its id."""
        self.state = np.zeros(FIRST_CAPACITY, dtype=STATE)
        self.page_table = np.zeros((FIRST_CAPACITY, 1), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.sequences)

    @staticmethod
    def takes(sequence: Sequence) -> bool:
        """Whether a sequence that runs brings one token to every pass from now on, and nothing else."""
        return (
            sequence.pages.tier == "gpu"
            and sequence.num_cached >= sequence.num_prompt_tokens
            and sequence.num_uncached == 1
            and sequence.grammar is None
            and sequence.fault is None
            and sequence.output.finish is None
        )

    # Who is here

    def join(self, sequence: Sequence) -> None:
        count = len(self)
        if count == len(self.state):
            self.state = np.concatenate([self.state, np.zeros_like(self.state)])
            self.page_table = np.concatenate([self.page_table, np.zeros_like(self.page_table)])
        self.entries[sequence.sequence_id] = count
        self.sequences.append(sequence)
        self.texts.append(sequence.token_ids)
        self.tables.append(sequence.pages)
        self.ends.append(sequence.output.end_token_ids)
        self.state[count] = entry_of(sequence)
        self.state["pages"][count] = 0
        self.grow(sequence)

    def leave(self, sequence_id: int) -> None:
        """The last one takes the entry of a sequence that goes; nothing happens where it has none."""
        entry = self.entries.pop(sequence_id, None)
        if entry is None:
            return
        last = len(self) - 1
        columns: Many[list[Any]] = (self.sequences, self.texts, self.tables, self.ends)
        for column in columns:
            column[entry] = column[last]
            column.pop()
        if entry < last:
            self.entries[self.sequences[entry].sequence_id] = entry
            self.state[entry] = self.state[last]
            self.page_table[entry] = self.page_table[last]

    def grow(self, sequence: Sequence) -> None:
        """Take in the pages that a sequence has got, where it is here."""
        entry = self.entries.get(sequence.sequence_id)
        if entry is None:
            return
        pages, known = sequence.pages.pages, self.state["pages"][entry]
        if len(pages) > self.page_table.shape[1]:
            more = max(len(pages), 2 * self.page_table.shape[1]) - self.page_table.shape[1]
            self.page_table = np.pad(self.page_table, ((0, 0), (0, more)))
        self.page_table[entry, known : len(pages)] = pages[known:]
        self.state["pages"][entry] = len(pages)

    def short(self) -> list[Sequence]:
        """Those whose pages do not hold their newest token."""
        state = self.state[: len(self)]
        return [self.sequences[i] for i in np.flatnonzero(state["length"] > state["pages"] * self.page_tokens)]

    # Passes

    def tokens(self, micro_batch: int) -> DecodeTokens:
        """What those of a micro-batch bring to the next pass."""
        state = self.state[: len(self)]
        chosen: Any = np.flatnonzero(state["micro_batch"] == micro_batch)
        if len(chosen) == len(state):
            chosen = slice(None)
        mine = state[chosen].copy()
        widest = int(mine["pages"].max(initial=1))
        return DecodeTokens(
            mine["sequence_id"],
            mine["token_id"],
            mine["length"] - 1,
            mine["prompt"],
            mine["adapter"],
            mine["pages"],
            self.page_table[: len(self), :widest][chosen].copy(),
        )

    @property
    def greedy(self) -> bool:
        """Whether all take the most likely tokens as they are."""
        return bool(self.state["greedy"][: len(self)].all())

    def find(self, sequence_ids: Iterable[int]) -> np.ndarray:
        """The entries of these sequences, -1 where one has none."""
        found = list(map(self.entries.get, sequence_ids))
        if None in found:
            found = [-1 if each is None else each for each in found]
        return np.array(found, dtype=np.int64)

    def advance(self, running: Iterable[DecodeTokens]) -> list[Sequence]:
        """Count a pass that runs: each of these has drawn a token that nobody has read. Returns those that end with it,
        whatever it is."""
        entries = self.find(id for tokens in running for id in tokens.sequence_ids.tolist())
        entries = entries[entries >= 0]
        self.state["length"][entries] += 1
        self.state["token_id"][entries] = UNREAD
        for i in entries.tolist():
            self.sequences[i].num_unread = 1
            self.tables[i].num_tokens += 1
        ending = entries[self.state["length"][entries] >= self.state["limit"][entries]]
        return [self.sequences[i] for i in ending.tolist()]

    def append(self, decoded: DecodedTokens, counted: bool) -> tuple[set[int], list[tuple[int, int]]]:
        """Give sequences the tokens that were drawn for them. Returns the ids of those that have theirs, and (id,
        token) of the rest: those that it ends, that have something of their own to do with it, or are not here.
        counted: by `advance`."""
        ids, token_ids, state = decoded.sequence_ids, decoded.token_ids, self.state
        entries, drawn = self.find(ids), np.asarray(token_ids, dtype=np.int64)
        length = state["length"][entries] + (0 if counted else 1)
        takes = (entries >= 0) & state["plain"][entries] & (length < state["limit"][entries])
        for i, (entry, token_id) in enumerate(zip(entries.tolist(), token_ids, strict=True)):
            if entry >= 0 and token_id in self.ends[entry]:
                takes[i] = False
        mine, kept = entries[takes], drawn[takes].tolist()
        state["length"][mine], state["token_id"][mine] = length[takes], kept
        for entry, token_id in zip(mine.tolist(), kept, strict=True):
            self.texts[entry].append(token_id)
            if counted:
                self.sequences[entry].num_unread = 0
            else:
                self.tables[entry].num_tokens += 1
        taken = takes.tolist()
        left = [(id, token) for id, token, took in zip(ids, token_ids, taken, strict=True) if not took]
        return {id for id, took in zip(ids, taken, strict=True) if took}, left

    def refresh(self, sequence: Sequence) -> None:
        """Take in what was given to a sequence beside `append`, where it is here."""
        entry = self.entries.get(sequence.sequence_id)
        if entry is not None:
            self.state[entry] = entry_of(sequence)

    def check(self) -> None:
        """Invariants: every entry is what it would be if it were made now, of a sequence that belongs here."""
        assert len(self.entries) == len(self) == len(self.texts) == len(self.tables) == len(self.ends)
        for i, sequence in enumerate(self.sequences):
            pages = sequence.pages.pages
            assert self.entries[sequence.sequence_id] == i and self.takes(sequence), sequence.sequence_id
            assert self.texts[i] is sequence.token_ids and self.tables[i] is sequence.pages
            assert self.state[i] == np.array(entry_of(sequence), dtype=STATE), (self.state[i], entry_of(sequence))
            assert self.page_table[i, : len(pages)].tolist() == pages, (self.page_table[i], pages)
            assert self.ends[i] == sequence.output.end_token_ids


def entry_of(sequence: Sequence) -> tuple[Any, ...]:
    """Its fields of `STATE`."""
    output = sequence.output
    return (
        sequence.sequence_id,
        UNREAD if sequence.num_unread else sequence.token_ids[-1],
        len(sequence.token_ids) + sequence.num_unread,
        sequence.num_prompt_tokens + output.max_tokens,
        len(sequence.pages.pages),
        sequence.num_prompt_tokens,
        sequence.request.adapter,
        sequence.micro_batch,
        sequence.plain,
        sequence.unadjusted_greedy,
    )
