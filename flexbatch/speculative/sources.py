"""Where drafted tokens come from: what every draft does, and the one that needs no model."""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from typing import Protocol

from torch import Tensor

from flexbatch.execution.sequence import Sequence
from flexbatch.speculative.growth import TreePlan
from flexbatch.speculative.lookup import Lookup
from flexbatch.speculative.tree import TokenTree


class Source(Protocol):
    """A draft: a model or a lookup."""

    @property
    def name(self) -> str: ...

    @property
    def peak_bytes(self) -> int:
        """Most memory of the gpu tier that it held."""

    @property
    def levels(self) -> Many[tuple[int, float]]:
        """Tokens read and seconds of every level of the latest trees."""

    @property
    def distributions(self) -> dict[Sequence, dict[int, Tensor]]:
        """What the children of each node (-1: of the last committed token) were drawn from, [vocab], in the present
        stochastic trees."""

    def draft(self, sequences: Many[Sequence], plans: Many[TreePlan]) -> list[TokenTree]:
        """One tree per sequence, no larger or deeper than its plan; possibly empty."""

    def uncomputed_tokens(self, sequences: Many[Sequence]) -> int:
        """Committed tokens that it has to read before it can draft for these."""

    def release(self, sequence: Sequence) -> None: ...

    def forget(self) -> None:
        """Let go of all sequences and of what is kept of them, after a run that failed half-way."""

    def check(self) -> None: ...

    def close(self) -> None: ...


class LookupSource:
    """Drafts from the prompt and the text so far of each sequence."""

    name = "ngram"
    peak_bytes = 0

    def __init__(self) -> None:
        self.distributions: dict[Sequence, dict[int, Tensor]] = {}
        self.lookups: dict[Sequence, Lookup] = {}
        self.levels: list[tuple[int, float]] = []

    def draft(self, sequences: Many[Sequence], plans: Many[TreePlan]) -> list[TokenTree]:
        trees = []
        started = time.perf_counter()
        for sequence, plan in zip(sequences, plans, strict=True):
            lookup = self.lookups.setdefault(sequence, Lookup())
            lookup.extend(sequence.token_ids[len(lookup.tokens) :])
            nodes = plan.max_nodes if plan.shape is None else len(plan.shape)
            trees.append(lookup.propose(nodes, plan.num_levels) if nodes and plan.num_levels else TokenTree())
        levels = max((plan.num_levels for plan in plans), default=0)
        self.levels = [(len(sequences), (time.perf_counter() - started) / levels)] * levels
        return trees

    def uncomputed_tokens(self, sequences: Many[Sequence]) -> int:
        return 0

    def release(self, sequence: Sequence) -> None:
        self.lookups.pop(sequence, None)

    def forget(self) -> None:
        self.lookups.clear()

    def check(self) -> None:
        for sequence, lookup in self.lookups.items():
            lookup.check()
            assert lookup.tokens == sequence.token_ids[: len(lookup.tokens)], "a lookup does not follow its text"

    def close(self) -> None:
        self.lookups.clear()
