"""The lengths of a job's sequences as the cost model counts them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Workload:
    """The lengths of the sequences of a job, as equally likely (prompt tokens, generated tokens) pairs.

    ``num_sequences`` None stands for a job without end: only the steady state counts.
    """

    lengths: tuple[tuple[float, float], ...]
    num_sequences: int | None = None

    MAX_PAIRS = 256

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
        return max(prompt for prompt, _ in self.lengths)

    @functools.cached_property
    def mean_output(self) -> float:
        return sum(output for _, output in self.lengths) / len(self.lengths)

    @classmethod
    def uniform(cls, prompt_tokens: int, output_tokens: int, num_sequences: int | None = None) -> Workload:
        return cls(((float(prompt_tokens), float(output_tokens)),), num_sequences)

    @classmethod
    def from_lengths(cls, prompts: Sequence[int], outputs: Sequence[int], num_sequences: int | None = None) -> Workload:
        """From the actual prompts; beyond MAX_PAIRS, pairs of similar total length are merged into their mean, which
        keeps the sums."""
        pairs = sorted(zip(prompts, outputs, strict=True), key=sum)
        count = len(pairs)
        if count > cls.MAX_PAIRS:
            cuts = [count * i // cls.MAX_PAIRS for i in range(cls.MAX_PAIRS + 1)]
            pairs = [
                tuple(sum(column) / (end - begin) for column in zip(*pairs[begin:end], strict=True))
                for begin, end in itertools.pairwise(cuts)
            ]
        return cls(tuple((float(p), float(o)) for p, o in pairs), num_sequences or count)

    @classmethod
    def from_quantiles(
        cls, prompt_quantiles: Iterable[float], output_quantiles: Iterable[float], num_sequences: int | None = None
    ) -> Workload:
        """Every prompt quantile with every output quantile: the two lengths are taken as independent."""
        outputs = tuple(output_quantiles)
        return cls(tuple((float(p), float(o)) for p in prompt_quantiles for o in outputs), num_sequences)
