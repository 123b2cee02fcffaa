"""Pages that are kept for sequences in flight: those that they are likely to take, and have not taken yet; and what
their micro-batches bring through staging."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from flexbatch.policy.admission import CacheSizes, can_all_move
from flexbatch.policy.policy import TIERS


class Promises:
    """By tier, and for layers that keep only their window beside the others."""

    def __init__(self, sizes: CacheSizes) -> None:
        self.sizes = sizes
        self.pages, self.in_windows = dict.fromkeys(TIERS, 0), dict.fromkeys(TIERS, 0)

    def add(self, tier: str, reserved: int, taken: int, sign: int = 1) -> None:
        """Of a sequence, which has ``taken`` pages of ``reserved`` ones; sign -1: not any more."""
        in_windows = self.sizes.in_windows
        self.pages[tier] += sign * max(0, reserved - taken)
        self.in_windows[tier] += sign * max(0, in_windows(reserved) - in_windows(taken))

    def replace(self, all_of_them: Iterable[tuple[str, int, int]]) -> None:
        """By those of (tier, reserved, taken) pages of every sequence."""
        for counts in (self.pages, self.in_windows):
            counts.update(dict.fromkeys(TIERS, 0))
        for tier, reserved, taken in all_of_them:
            self.add(tier, reserved, taken)

    def check(self, all_of_them: Iterable[tuple[str, int, int]]) -> None:
        """Invariant: the sums are those of all sequences."""
        other = Promises(self.sizes)
        other.replace(all_of_them)
        assert (self.pages, self.in_windows) == (other.pages, other.in_windows), (vars(self), vars(other))


class StagedPages:
    """By micro-batch, of its sequences off the gpu tier: the pages that are reserved for them and those that they have
    taken. Kept up by differences: each one that came had all others asked for theirs, and to fill a block with 2,477
    took the host 2.5 s of its first pass, where it takes 0.6."""

    def __init__(self, micro_batches: int) -> None:
        self.reserved, self.taken = [0] * micro_batches, [0] * micro_batches

    def add(self, micro_batch: int, reserved: int, taken: int, sign: int = 1) -> None:
        """Of a sequence; sign -1: not any more."""
        self.reserved[micro_batch] += sign * reserved
        self.taken[micro_batch] += sign * taken

    def replace(self, all_of_them: Iterable[tuple[int, int, int]]) -> None:
        """By those of (micro-batch, reserved, taken) pages of every sequence."""
        self.reserved, self.taken = [0] * len(self.reserved), [0] * len(self.taken)
        for each in all_of_them:
            self.add(*each)

    def check(self, all_of_them: Iterable[tuple[int, int, int]]) -> None:
        """Invariant: the sums are those of all sequences."""
        other = StagedPages(len(self.reserved))
        other.replace(all_of_them)
        assert (self.reserved, self.taken) == (other.reserved, other.taken), (vars(self), vars(other))


class Reach:
    """By tier, the pages that sequences reach at most, and those beside them in layers that keep only their window."""

    def __init__(self, sizes: CacheSizes, all_of_them: Iterable[tuple[str, int]] = ()) -> None:
        """all_of_them: (tier, pages) of every sequence."""
        self.sizes = sizes
        self.pages, self.in_windows = dict.fromkeys(TIERS, 0), dict.fromkeys(TIERS, 0)
        self.lengths = Counter[int]()
        """How many sequences reach so many pages."""
        for each in all_of_them:
            self.add(*each)

    def add(self, tier: str, pages: int, sign: int = 1) -> None:
        """Of a sequence; sign -1: not any more."""
        self.pages[tier] += sign * pages
        self.in_windows[tier] += sign * self.sizes.in_windows(pages)
        self.lengths[pages] += sign
        if not self.lengths[pages]:
            del self.lengths[pages]

    def can_all_move(self, others: Iterable[tuple[str, int]], pools: Mapping[str, int]) -> bool:
        """Whether these sequences and ``others``, (tier, pages) each, all come to their ends by moving alone. pools:
        pages of each tier."""
        whole = Reach(self.sizes, others)
        longest = max(*self.lengths, *whole.lengths, 0)
        pages, in_windows = (
            {tier: mine[tier] + more[tier] for tier in TIERS}
            for mine, more in ((self.pages, whole.pages), (self.in_windows, whole.in_windows))
        )
        in_window = self.sizes.in_windows(longest)
        return can_all_move(pages, longest, pools) and can_all_move(in_windows, in_window, self.sizes.quotas)

    def check(self, all_of_them: Iterable[tuple[str, int]]) -> None:
        """Invariant: the sums are those of all sequences."""
        other = Reach(self.sizes, all_of_them)
        assert vars(self) == vars(other), (vars(self), vars(other))
