"""The sizes of a layer of experts that the cost model needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexbatch.policy.limits import expert_workspace_elements, units_of_experts


@dataclass(frozen=True)
class ExpertShape:
    """Every token goes through ``top_k`` of ``count`` gated MLPs of ``width``, and through one of ``shared_width`` (0:
    none)."""

    count: int
    top_k: int
    width: int
    shared_width: int = 0

    @property
    def num_tensors(self) -> int:
        """Pieces that the experts of a layer are placed in, both matrices of some in each."""
        return len(units_of_experts(self.count))

    def elements(self, hidden_size: int) -> int:
        """Weights of one expert."""
        return 3 * hidden_size * self.width

    def hit(self, tokens: float | np.ndarray) -> np.ndarray:
        """Distinct experts that so many tokens go to, if each chooses at random: what a layer reads of weights that
        are in GPU memory. Real routers are less even, and reach fewer."""
        spared = (1 - self.top_k / self.count) ** np.asarray(tokens, dtype=float)
        return self.count * (1 - spared)

    def rows(self, tokens: float | np.ndarray) -> np.ndarray:
        """Tokens of one of the experts that are hit."""
        hit = self.hit(tokens)
        return np.asarray(tokens, dtype=float) * self.top_k / np.where(hit > 0, hit, 1.0)

    def workspace_elements(self, hidden_size: int) -> int:
        """What the engine keeps free for one token."""
        return expert_workspace_elements(hidden_size, self.top_k, self.width, self.shared_width)

    def tensors(self, hidden_size: int) -> tuple[int, ...]:
        """Elements of the router, the shared MLP and the experts as they are placed: both matrices together."""
        shared = (2 * hidden_size * self.shared_width, hidden_size * self.shared_width) if self.shared_width else ()
        units = [number for _, number in units_of_experts(self.count)]
        return (self.count * hidden_size, *shared, *(number * self.elements(hidden_size) for number in units))
