"""Pages that sequences are expected to take, where admission goes by the likely length of an answer: the scheduler's
rule, on numbers, for answers that are spread as a job's are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexbatch.policy.limits import LOOKAHEAD_TOKENS, PAGE_TOKENS, RESERVED_DEVIATIONS
from flexbatch.policy.survival import PASSES_AHEAD, Survival


class ExpectedPages:
    """What is reserved for sequences in flight: what all of them together are expected to have when that is the most,
    with a margin, each its share."""

    def __init__(
        self, answers: Sequence[int] | np.ndarray, page_tokens: int = PAGE_TOKENS, limit: float | None = None
    ) -> None:
        """limit: the tokens that an answer may reach, which those that are seen need not come near (default: the most
        of them)."""
        self.page_tokens = page_tokens
        lengths = np.asarray(answers, dtype=float)
        self.limit = int(max(lengths.max(), limit or 0))
        self.survival = Survival.of(lengths, lengths < self.limit)

    def occupied(self, rows: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the token rows of each sequence after some passes: [times, sequences]."""
        left = np.maximum(0, self.limit - generated)
        ahead = PASSES_AHEAD[: 1 + np.searchsorted(PASSES_AHEAD, left.max())]
        grown = np.minimum(ahead[:, None], left)
        # Those that reach the limit have all of its rows until then, and end there.
        reached = np.minimum(generated + grown, self.limit - 1)
        alive = self.survival.at(reached) / self.survival.at(generated)
        alive[1:][ahead[:-1, None] >= left] = 0
        later = rows + grown
        return later * alive, later**2 * alive * (1 - alive)

    def of_one(self, prompt: int, in_flight: int) -> int:
        """Pages of a sequence that is about to join others, ``in_flight`` with it."""
        means, variances = self.occupied(np.array([prompt]), np.array([0]))
        likely = (means + RESERVED_DEVIATIONS * np.sqrt(variances / max(1, in_flight))).max()
        return int(self.pages(np.array([likely]), np.array([prompt]), np.array([0]))[0])

    def together(self, rows: np.ndarray, generated: np.ndarray) -> np.ndarray:
        """Pages of each sequence in flight. rows: tokens that it has, prompt and answer."""
        means, variances = self.occupied(rows, generated)
        deviations = np.maximum(np.sqrt(variances.sum(axis=1)), 1e-9)
        most = int((means.sum(axis=1) + RESERVED_DEVIATIONS * deviations).argmax())
        return self.pages(means[most] + RESERVED_DEVIATIONS * variances[most] / deviations[most], rows, generated)

    def pages(self, likely: np.ndarray, rows: np.ndarray, generated: np.ndarray) -> np.ndarray:
        """For its next tokens at least, and for no more than it may reach."""
        wanted = np.maximum(np.ceil(likely), rows + LOOKAHEAD_TOKENS)
        most = rows - generated + self.limit - 1
        return -(-np.maximum(np.minimum(wanted, most), rows).astype(int) // self.page_tokens)
