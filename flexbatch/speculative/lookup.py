"""Drafting without a model: what followed the last few tokens when they came before, in the prompt or in the text so
far."""

from __future__ import annotations

from collections.abc import Sequence

from flexbatch.speculative.tree import TokenTree, chain, merge

MAX_CANDIDATES = 32
"""Most recent occurrences that are compared; older ones of a frequent n-gram cost time and are rarely the better
guess."""
MAX_MATCH = 32
"""Longer matches are not told apart."""


class Lookup:
    """Where every n-gram of one sequence occurred (Saxena, "Prompt lookup decoding", 2023, with several
    continuations instead of one)."""

    def __init__(self, tokens: Sequence[int] = (), ngram: int = 2) -> None:
        """ngram: fewest tokens that must match. One more token of text costs one dictionary entry."""
        if ngram < 1:
            raise ValueError(f"ngram={ngram} must be at least 1")
        self.ngram = ngram
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in committed tokens, the prompt first."""
        for token in tokens:
            self.tokens.append(token)
            if len(self.tokens) >= self.ngram:
                self._ends.setdefault(tuple(self.tokens[-self.ngram :]), []).append(len(self.tokens))

    def propose(self, max_nodes: int, max_depth: int) -> TokenTree:
        """Continuations of the longest matches of the present suffix, the longest first and of equal ones the latest,
        merged into one tree.

        A continuation that reaches the end of the text goes on with itself, so that a loop is drafted to full depth.
        Empty where the suffix is new.
        """
        here = len(self.tokens)
        ends = self._ends.get(tuple(self.tokens[-self.ngram :]), []) if here >= self.ngram else []
        candidates = [end for end in ends[-MAX_CANDIDATES - 1 :] if end < here]
        candidates.sort(key=lambda end: (-self._match(end), -end))
        return merge([chain(self._continuation(end, max_depth)) for end in candidates], max_nodes)

    def _continuation(self, end: int, length: int) -> list[int]:
        period = self.tokens[end : end + length]
        return (period * -(-length // len(period)))[:length]

    def _match(self, end: int) -> int:
        """Tokens before ``end`` that equal the last ones of the text."""
        length = self.ngram
        while length < min(end, MAX_MATCH) and self.tokens[end - 1 - length] == self.tokens[-1 - length]:
            length += 1
        return length

    def check(self) -> None:
        """Raises AssertionError when the index does not hold every n-gram of the text exactly once."""
        grams = max(0, len(self.tokens) - self.ngram + 1)
        assert sum(map(len, self._ends.values())) == grams, (
            f"{sum(map(len, self._ends.values()))} n-grams indexed, the text has {grams}"
        )
        for gram, ends in self._ends.items():
            assert all(tuple(self.tokens[end - self.ngram : end]) == gram for end in ends), (
                f"n-gram {gram} is indexed at a wrong position"
            )
