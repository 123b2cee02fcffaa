"""Which tree every pass gets: from what passes, drafting and acceptance have been in this run, down to none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flexbatch.speculative.acceptance import AcceptanceStatistics, Group, ShapeChoice, choose_shapes
from flexbatch.speculative.costs import MAX_PATIENCE, PATIENCE, MeasuredCosts
from flexbatch.speculative.growth import TreePlan
from flexbatch.speculative.shapes import fixed_widths

AUTO_DEPTH, AUTO_RANKS = 8, 4
MAX_WAIT = 32
"""Passes between two choices, at most, while the choice stays the same; after a change they begin few and double."""
TRIED_PASSES = 3
"""That a new tree is tried, at least, before it is judged: one slow pass says little."""
CHOOSING_SHARE = 0.02
"""The share of the time that choosing may take: a choice takes about a millisecond, a pass of a small model hardly
more."""
PROBED_SHARE = 16
"""Drafting is measured on one sequence of so many first: reading all prompts with a draft that does not pay would
cost as much as several passes."""
FIRST_PROBES, COLD_SECONDS = 2, 0.05
"""Before drafting is found too dear, each of other sequences, where every level took that long: the first probe
loads and compiles the draft's kernels (1.65 s on an H200, where a level takes 2 ms), and a job of 8 sequences that
believed it was decoded plainly to the end, at half the speed."""
MEASURING_SHARE = 0.01
"""The share of the time that may go to measuring again what has lost: drafting where plain decoding has won, and plain
decoding where trees have."""
START_GAIN, KEPT_GAIN, WARY_GAIN = 0.2, 0.1, 0.4
"""Predicted gain from which speculation begins, down to which it goes on, and from which it begins where it has lost
more than it saved. Not all of what is predicted shows in a whole job: every job has prompts that the draft must read
first, and with trees sequences end at different passes, so that the last ones run with few others. With the demo
pair in memory (CPU, 4 to 64 sequences) predicted gains of 10 to 15 % were losses of 5 to 9 %.
"""
LOSING_SHARE = 0.01
"""The share of the time that may be lost before that."""
NONE = TreePlan(0, 0)


@dataclass(frozen=True)
class Situation:
    """The coming pass. groups: of every sequence that decodes; unread_tokens: that drafts must read before they can
    propose for all of them; tokens_left: that these sequences may still generate."""

    groups: tuple[str, ...]
    other_query_tokens: int
    uncomputed_tokens: int
    tokens_left: int

    @property
    def live(self) -> int:
        return len(self.groups)

    @property
    def plain_query_tokens(self) -> int:
        return self.live + self.other_query_tokens


class Controller:
    """Chooses by expected tokens per second. Exploring is bounded: a first plain pass, drafting for a few sequences
    only, then the tree that is best by all that is known, corrected after every pass at first and ever more rarely
    later. A plain pass now and then keeps its cost known, and where plain decoding has won, a few sequences are
    drafted for now and then: a slow moment must not decide for good.
    """

    def __init__(self, max_nodes: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.max_nodes, self.clock = max_nodes, clock
        self.costs = MeasuredCosts()
        """The costs of the target's passes by query tokens, prompts included."""
        self.drafting = MeasuredCosts()
        """The costs of one level of drafting by the tokens that the draft reads."""
        self.statistics: dict[str, AcceptanceStatistics] = {}
        self.plans: dict[str, TreePlan] = {}
        self.decoded = False
        """Whether a pass with decoding sequences has been measured."""
        self.passes = 0
        self.wait = self.next_choice = self.chosen_for = 0
        self.chosen_at, self.choosing_seconds = 0.0, 0.0
        self.probing = False
        """Whether the present pass drafts only to measure that."""
        self.probes = 0
        """Such passes so far, without those in which no sequence could be drafted for."""
        self.next_probe = 0.0
        self.winning = False
        """Whether the last choice was trees."""
        self.plain_loss = self.next_plain = 0.0
        """What a plain pass costs where trees win, in seconds; and the earliest time of the next one."""
        self.seconds = self.saved = 0.0
        """The time of all passes with their drafting; and what those with trees have saved against plain decoding (less
        than 0: lost), by measured costs."""
        self.situation: Situation | None = None

    def plan(self, now: Situation) -> list[TreePlan]:
        """One plan per sequence."""
        self.passes += 1
        self.situation = now
        names = sorted(set(now.groups))
        for name in names:
            self.statistics_of(name)
        # Without the cost of a pass there is nothing to weigh.
        if self.decoded and self.due(now, names):
            if self.may_be_cold(now, names) or (not self.drafting.known and self.clock() >= self.next_probe):
                if self.promising(now, names):
                    probe, count = TreePlan(2, 2, fixed_widths((1, 1))), -(-now.live // PROBED_SHARE)
                    first = self.probes * count % now.live
                    return [probe if (i - first) % now.live < count else NONE for i in range(now.live)]
            elif self.drafting.points:
                self.choose(now, names)
        return [self.plans.get(group, NONE) for group in now.groups]

    def may_be_cold(self, now: Situation, names: list[str]) -> bool:
        """Whether drafting has been measured once only, took as long as kernels take to load, and looks too dear."""
        long = (
            0 < self.probes < FIRST_PROBES
            and min(point.seconds for point in self.drafting.points.values()) > COLD_SECONDS
        )
        return long and not any(map(len, self.best(now, names, drafted=True).shapes))

    def promising(self, now: Situation, names: list[str]) -> bool:
        """Whether drafting is worth measuring: whether trees would gain anything if it cost nothing. Plain decoding
        until that is known."""
        started = self.clock()
        promising = any(map(len, self.best(now, names, drafted=False).shapes))
        self.apply(started, now, dict.fromkeys(names, NONE), changed=promising)
        if promising:
            self.probing = True
        return promising

    @property
    def least_gain(self) -> float:
        """That trees must promise."""
        if self.winning:
            return KEPT_GAIN
        return WARY_GAIN if self.saved < -LOSING_SHARE * self.seconds else START_GAIN

    def due(self, now: Situation, names: list[str]) -> bool:
        """Whether to choose again: the block has changed, or it is time. Never so often that choosing itself costs."""
        moment = self.clock()
        if moment - self.chosen_at < self.choosing_seconds / CHOOSING_SHARE:
            return False
        changed = abs(now.live - self.chosen_for) > self.chosen_for // 8 or not set(names) <= set(self.plans)
        return changed or self.passes >= self.next_choice

    def choose(self, now: Situation, names: list[str]) -> None:
        """New plans for every group."""
        started = self.clock()
        if self.winning and started >= self.next_plain and self.costs.doubted(now.plain_query_tokens):
            self.next_plain = started + self.plain_loss / MEASURING_SHARE
            self.apply(started, now, dict.fromkeys(names, NONE), changed=True)
            return
        choice = self.best(now, names, drafted=True)
        won = any(map(len, choice.shapes))
        plans = {
            name: TreePlan(shape.max_depth, len(shape), shape) for name, shape in zip(names, choice.shapes, strict=True)
        }
        self.apply(started, now, plans, changed=plans != {name: self.plans.get(name) for name in names})
        if won:
            plain_seconds = self.costs.curve(now.plain_query_tokens)(now.plain_query_tokens)
            self.plain_loss = max(0.0, plain_seconds - now.live / choice.tokens_per_second)
            if not self.winning:
                self.next_plain = started + self.plain_loss / MEASURING_SHARE
        self.winning = won

    def apply(self, started: float, now: Situation, plans: dict[str, TreePlan], changed: bool) -> None:
        self.plans, self.chosen_for = plans, now.live
        trees = any(plan.num_levels for plan in plans.values())
        self.wait = (TRIED_PASSES if trees else 1) if changed else min(2 * self.wait, MAX_WAIT)
        self.next_choice = self.passes + self.wait
        self.chosen_at = self.clock()
        self.choosing_seconds = self.chosen_at - started

    def best(self, now: Situation, names: list[str], drafted: bool) -> ShapeChoice:
        """The best trees by what is known. ``drafted=False``: as if drafting cost nothing."""
        drafting = self.drafting.curve() if drafted else None

        def draft_seconds(levels: int, nodes: float) -> float:
            if drafting is None:
                return 0.0
            # A chain stays in the draft's cache and every level reads one token of each sequence; a wider tree is read
            # anew at every level.
            reads = now.live + (nodes if nodes <= levels * now.live else nodes * levels / 2)
            return levels * drafting(reads / levels)

        extra = now.uncomputed_tokens - 4 * now.live
        # Of the tokens that a sequence may still generate it will generate half, for all one knows: EOS may come.
        starting = (
            (drafting(extra), max(1.0, now.tokens_left / 2)) if drafting is not None and extra > 0 else (0.0, 1.0)
        )
        return choose_shapes(
            [Group(now.groups.count(name), self.statistics[name].table()) for name in names],
            self.costs.hopeful_curve(now.plain_query_tokens),
            draft_seconds,
            other_query_tokens=now.other_query_tokens,
            max_nodes=self.max_nodes,
            least_gain=self.least_gain,
            starting=starting,
        )

    # What was measured

    def statistics_of(self, group: str) -> AcceptanceStatistics:
        return self.statistics.setdefault(group, AcceptanceStatistics(AUTO_DEPTH, AUTO_RANKS, weight=4.0))

    def observe_pass(
        self, query_tokens: int, seconds: float, decoded: bool, drafting_seconds: float = 0.0, new_tokens: int = 0
    ) -> None:
        """A pass of the target. decoded: some of its sequences were past their prompts, and drew ``new_tokens``
        tokens."""
        if self.probing:
            self.probing, self.probes = False, self.probes + bool(self.drafting.points)
            self.next_probe = self.clock() + drafting_seconds / MEASURING_SHARE
        self.costs.elapse()
        self.drafting.elapse()
        self.costs.observe(query_tokens, seconds, PATIENCE if decoded else MAX_PATIENCE)
        self.seconds += seconds + drafting_seconds
        now = self.situation
        if now is not None and decoded and query_tokens > now.plain_query_tokens:
            curve = self.costs.curve(now.plain_query_tokens)
            plain_seconds = curve(now.plain_query_tokens) + (new_tokens / now.live - 1) * curve(now.live)
            # Not the seconds of this very pass: plain decoding would have had its slow moments, too.
            self.saved += plain_seconds - curve(query_tokens) - drafting_seconds
        self.decoded = self.decoded or decoded

    def report(self) -> dict[str, object]:
        """What was learned."""
        return {"pass_seconds": self.costs.report(), "draft_level_seconds": self.drafting.report()}
