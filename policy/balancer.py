"""Balancing: choose the tier of each piece so that a split is met everywhere and not only in the sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flexbatch.policy.policy import TIERS, Split


class TierBalancer:
    """Assigns pieces to tiers one after another by error diffusion.

    Every piece goes to the tier that is furthest behind its share of all that was placed so far, this piece
    included; so at any moment each tier holds its share to within the largest piece, and of any run of pieces to
    within two of them (1.26 was seen with three tiers).
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self.placed = dict.fromkeys(TIERS, 0.0)

    def choose(self, size: float, allowed: Sequence[str] = TIERS) -> str:
        """The tier for a piece of ``size``; ``allowed`` leaves out tiers that are full. Does not place it."""
        total = sum(self.placed.values()) + size
        deficits = {
            tier: fraction * total - self.placed[tier]
            for tier, fraction in zip(TIERS, self.split.fractions, strict=True)
            if tier in allowed
        }
        # A tier with share zero may tie at deficit zero: it must never win over one that was asked for.
        return max(deficits, key=lambda tier: (deficits[tier], self.split.fractions[TIERS.index(tier)]))

    def place(self, tier: str, size: float) -> None:
        self.placed[tier] += size

    def remove(self, tier: str, size: float) -> None:
        self.placed[tier] -= size

    def check(self) -> None:
        """Invariant: nothing is removed that was not placed."""
        assert min(self.placed.values()) >= 0, self.placed


def spread(sizes: Iterable[int], split: Split) -> list[str]:
    """The tier of every piece: the realized shares are within one (largest) piece of the split."""
    balancer = TierBalancer(split)
    tiers = []
    for size in sizes:
        tier = balancer.choose(size)
        balancer.place(tier, size)
        tiers.append(tier)
    return tiers
