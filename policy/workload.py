"""The lengths of a job's sequences as the cost model counts them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flexbatch.policy.admission import num_pages
from flexbatch.policy.limits import PAGE_TOKENS


@dataclass(frozen=True)
class RequestLengths:
    """One sequence of a job. ``prompt``: tokens to read before the first one is generated. ``pages``: of its tier, for
    as long as it runs."""

    prompt: int
    output: int
    pages: int
    beginnings: tuple[int, ...] = ()
    """A number for each full page of the prompt, where these are known: the same for prompts that are alike up to that
    page's end, and no others."""

    @classmethod
    def of(cls, prompt: float, output: float) -> RequestLengths:
        """The last token that is generated needs no row of the cache."""
        prompt_tokens, output_tokens = max(1, round(prompt)), max(1, round(output))
        return cls(prompt_tokens, output_tokens, num_pages(prompt_tokens + output_tokens - 1))


def by_total(pairs: np.ndarray) -> np.ndarray:
    """[2, sequences] ordered by the sum of both lengths, then by the first. Whole numbers are sorted as one key each: a
    million take a tenth of the time."""
    total = pairs.sum(axis=0)
    base = pairs[0].max() + 1
    if total.max() * base >= 2**62 or not np.array_equal(pairs, np.floor(pairs)):
        return pairs[:, np.lexsort((pairs[1], pairs[0], total))]
    total, first = np.divmod(np.sort((total * base + pairs[0]).astype(np.int64)), int(base))
    return np.stack([first, total - first]).astype(float)


def slots_of(totals: np.ndarray) -> np.ndarray:
    """Cache slots (full pages) of sequences with so many tokens, the fewest first; the most first. The last token that
    is generated needs none."""
    return (np.ceil((totals - 1) / PAGE_TOKENS) * PAGE_TOKENS)[::-1]


@dataclass(frozen=True)
class Workload:
    """The lengths of the sequences of a job, as equally likely (prompt tokens, generated tokens) pairs.

    ``num_sequences`` None stands for a job without end: only the steady state counts. ``grows``: sequences take cache
    as they grow, and do not reserve all of it at first.
    """

    lengths: tuple[tuple[float, float], ...]
    num_sequences: int | None = None
    in_order: np.ndarray | None = field(default=None, compare=False)
    """[2, sequences] prompt and generated tokens in the order of arrival, where they are known: then the passes of the
    job can be counted one by one."""
    grows: bool = False
    whole_sequences: int | None = None
    """Of the whole job, where this is what one of several parts of a block runs."""
    descending_slots: np.ndarray | None = field(default=None, compare=False)
    """Cache slots (full pages) of every sequence, the most first, where the job is known: a block is made for its
    longest sequences, which the mean of many hides."""
    most_prompt: float | None = field(default=None, compare=False)
    """Tokens of the longest prompt, where the job is known."""
    most_output: float | None = field(default=None, compare=False)
    """Tokens that an answer may reach, where answers are expected to be shorter: what has outlived them is taken to."""

    MAX_PAIRS = 256
    MAX_IN_ORDER = 16_384
    """Of a longer job the beginning and the end, which the order decides, weigh little beside the rest."""

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("a workload needs at least one pair of lengths")
        for prompt, output in self.lengths:
            if prompt < 1 or output < 1:
                raise ValueError(f"lengths must be at least 1, got prompt={prompt:g} output={output:g}")
        if self.num_sequences is not None and self.num_sequences < 1:
            raise ValueError(f"num_sequences={self.num_sequences} must be at least 1")

    @functools.cached_property
    def columns(self) -> np.ndarray:
        """[2, sequences]: prompt and generated tokens. A search asks for it thousands of times."""
        columns = np.array(self.lengths).T
        columns.flags.writeable = False
        return columns

    @functools.cached_property
    def longest_prompt(self) -> float:
        return self.most_prompt or max(prompt for prompt, _ in self.lengths)

    @functools.cached_property
    def mean_prompt(self) -> float:
        return sum(prompt for prompt, _ in self.lengths) / len(self.lengths)

    @functools.cached_property
    def mean_output(self) -> float:
        return sum(output for _, output in self.lengths) / len(self.lengths)

    @functools.cached_property
    def longest_slots(self) -> np.ndarray:
        """Cache slots of every sequence, or of each of the equally likely ones; the most first."""
        return slots_of(np.sort(self.columns.sum(axis=0))) if self.descending_slots is None else self.descending_slots

    @functools.cached_property
    def requests(self) -> list[RequestLengths]:
        """Every sequence of a finite job, in the order of arrival where that is known, else in a random one."""
        assert self.num_sequences is not None, "a job without end has no last sequence"
        if self.in_order is None:
            return self.drawn(self.num_sequences)
        return list(map(RequestLengths.of, *self.in_order.tolist()))

    @functools.cached_property
    def longest_pages(self) -> list[int]:
        """Pages of every sequence, the largest first."""
        return sorted((request.pages for request in self.requests), reverse=True)

    def drawn(self, count: int) -> list[RequestLengths]:
        """``count`` sequences whose lengths are spread as the job's are, in random order."""
        kinds = len(self.lengths)
        indices = np.random.default_rng(0).permutation(((np.arange(count) + 0.5) * kinds / count).astype(int))
        return [RequestLengths.of(*self.lengths[index]) for index in indices.tolist()]

    @classmethod
    def uniform(cls, prompt_tokens: int, output_tokens: int, num_sequences: int | None = None) -> Workload:
        return cls(((float(prompt_tokens), float(output_tokens)),), num_sequences)

    @classmethod
    def from_lengths(
        cls, prompts: Sequence[int] | np.ndarray, outputs: Sequence[int] | np.ndarray, num_sequences: int | None = None
    ) -> Workload:
        """From the actual prompts; beyond MAX_PAIRS, pairs of similar total length are merged into their mean, which
        keeps the sums."""
        given = np.array([prompts, outputs], dtype=float)
        count = given.shape[1]
        pairs = by_total(given)
        whole = num_sequences in (None, count)
        slots, most = (slots_of(pairs.sum(axis=0)), float(given[0].max())) if whole else (None, None)
        if count > cls.MAX_PAIRS:
            cuts = np.array([count * i // cls.MAX_PAIRS for i in range(cls.MAX_PAIRS + 1)])
            pairs = np.add.reduceat(pairs, cuts[:-1], axis=1) / np.diff(cuts)
        return cls(
            tuple(map(tuple, pairs.T.tolist())),
            num_sequences or count,
            given.astype(int) if whole and count <= cls.MAX_IN_ORDER else None,
            descending_slots=slots,
            most_prompt=most,
        )
