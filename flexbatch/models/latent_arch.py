"""Latent attention as data (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Latent:
    """Keys and values of all heads come from one latent vector of ``rank`` elements, and ``rope`` further elements that
    rotate are the same for all heads: only these are cached. ``nope``: elements of a head's queries and keys that do
    not rotate. ``value``: elements of a head's values. query_rank: of the latent that queries come from, 0: they come
    from the hidden state. norm_eps: of the norms of both latents. bias: of what makes latents from the hidden state.
    """

    rank: int
    rope: int
    nope: int
    value: int
    query_rank: int = 0
    norm_eps: float = 1e-6
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "rope", "nope", "value"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of latent attention must be at least 1")
        if self.query_rank < 0:
            raise ValueError(f"query_rank={self.query_rank} must not be negative")

    @property
    def width(self) -> int:
        """Elements of what is cached of a token."""
        return self.rank + self.rope

    @property
    def head_width(self) -> int:
        """Elements of a head's query and value before and after they are in the space of the latent."""
        return self.nope + self.rope + self.value
