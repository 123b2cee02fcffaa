"""Bias and penalties of one request, kept as arrays that grow with its output."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from flexbatch.request import Request, SamplingParams

SMALLEST_PENALTY = 1e-30


class Adjustments:
    """For every token that a bias or a penalty concerns: bias, whether repetition counts it, and how often the output
    holds it.

    Updated in constant time per token, so that a pass over many long histories costs no loop over their tokens.
    """

    def __init__(self, request: Request) -> None:
        params = request.params
        bias = params.logit_bias or {}
        prompt = dict.fromkeys(request.prompt_token_ids) if params.repetition_penalty != 1.0 else {}
        self._params: SamplingParams = params
        self._rows = {token: row for row, token in enumerate({**bias, **prompt})}
        self._tokens = np.array(list(self._rows), dtype=np.int64)
        self._bias = np.array([bias.get(token, 0.0) for token in self._rows], dtype=np.float32)
        self._repeated = np.array([token in prompt for token in self._rows], dtype=bool)
        self._counts = np.zeros(len(self._rows), dtype=np.int32)

    def add(self, token: int) -> None:
        """Count one more token of the output."""
        row = self._rows.setdefault(token, len(self._rows))
        if row >= len(self._tokens):
            for name in ("_tokens", "_bias", "_repeated", "_counts"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(len(old) + 16, old.dtype)]))
        self._tokens[row] = token
        self._repeated[row] = True
        self._counts[row] += 1

    def extended(self, tokens: Iterable[int]) -> Adjustments:
        """A copy that also counts `tokens`."""
        copy = object.__new__(Adjustments)
        copy._params, copy._rows = self._params, dict(self._rows)
        copy._tokens, copy._bias = self._tokens.copy(), self._bias.copy()
        copy._repeated, copy._counts = self._repeated.copy(), self._counts.copy()
        for token in tokens:
            copy.add(token)
        return copy

    @property
    def token_ids(self) -> np.ndarray:
        """[n] int64, distinct."""
        return self._tokens[: len(self._rows)]

    @property
    def terms(self) -> np.ndarray:
        """[n, 3] float32: bias to add, repetition penalty, frequency and presence penalty to subtract."""
        size, params = len(self._rows), self._params
        counts = self._counts[:size]
        # Within float32, whose 0 would divide.
        penalty = min(max(params.repetition_penalty, SMALLEST_PENALTY), 1 / SMALLEST_PENALTY)
        repetition = np.where(self._repeated[:size], penalty, 1.0)
        subtract = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        return np.stack([self._bias[:size], repetition, subtract], axis=1).astype(np.float32)

    def counts(self) -> dict[int, int]:
        """token -> occurrences in the output."""
        return {token: int(self._counts[row]) for token, row in self._rows.items() if self._counts[row]}
