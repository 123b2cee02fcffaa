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


def dealt(head: Sequence[float], embedding: Sequence[float], layers: Sequence[float], split: Split) -> list[int]:
    """The tier, as a number, of every weight of a model, in this order: shares are met within one tensor of a layer,
    and by all layers alike.

    The head stays on the gpu tier where its share holds it: a head has up to five times the bytes of a layer
    (Llama-3.2-1B), and working slabs would have to be as large. Layers have what head and embedding leave of each
    share.
    """
    asked, whole = split.fractions, sum(head) + sum(embedding) + sum(layers)
    resident = sum(head) <= asked[0] * whole
    placed = [sum(head) if resident else 0.0, 0.0, 0.0]
    ends = [0] * len(head) if resident else _spread(head, asked, placed)
    ends += _spread(embedding, asked, placed)
    left = [max(0.0, share * whole - there) for share, there in zip(asked, placed, strict=True)]
    return ends + _spread(layers, [each / sum(left) for each in left] if layers else asked, [0.0] * len(TIERS))


def _spread(sizes: Sequence[float], asked: Sequence[float], placed: list[float]) -> list[int]:
    """Deal to tiers that hold what was ``placed`` already, which grows."""
    tiers = [tier for tier, share in enumerate(asked) if share > 0]
    total, found = sum(placed), []
    for size in sizes:
        total += size
        # Thousands of tensors, in every plan that a search prices: `max` with a key takes three times as long.
        tier, behind = tiers[0], asked[tiers[0]] * total - placed[tiers[0]]
        for other in tiers[1:]:
            if (missing := asked[other] * total - placed[other]) > behind:
                tier, behind = other, missing
        placed[tier] += size
        found.append(tier)
    return found
