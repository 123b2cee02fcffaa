"""How long a job will take from here on: the passes that it still needs, by the lengths that are expected, at the times
that passes have taken."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from flexbatch.policy.affine import point_of
from flexbatch.policy.pass_load import Lengths, PassLoad
from flexbatch.policy.plan import Plan

if TYPE_CHECKING:
    from flexbatch.execution.watch import InFlight, PassSeen

PassCosts = tuple[float, float, float]
"""Seconds, or any unit, of a pass, of a prompt token in it, and of a sequence that decodes in it."""
UNPLANNED: dict[str, PassCosts] = {"cuda": (64.0, 1.0, 1.0), "cpu": (4.0, 1.0, 1.0)}
"""By device, where nothing was planned: everything is in fast memory, and a pass takes as long as its tokens and
some."""
KEPT = 0.995
"""Of the weight of earlier passes, at each new one: the last 200 count."""
SHORT_PASS = 0.3
"""Seconds. Shorter passes count as what they are of it: 200 passes of 30 ms are six seconds, in which somebody else's
compiler may have had the processors. The last minute counts."""
RECENT, RECENT_SECONDS = 8, 20.0
"""Passes that tell whether the machine is slower or faster now: eight, or those of twenty seconds if these are more."""
TIED = 0.003
"""How firmly the three costs are held together."""
STEPS = 200
"""Steps in which the rest of a job is walked through, at most."""
WALKED_BLOCKS = 3
"""What waits beyond these blocks takes its share of full passes; the end of a job is walked through."""
GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are spread evenly however many there are."""


def costs_of(plan: Plan) -> PassCosts:
    """What the plan says that a pass, a prompt token and a decoding sequence cost."""
    policy, lengths = plan.policy, Lengths.of(plan.workload, plan.policy)
    context = lengths.prompt + lengths.output / 2
    tokens = policy.num_gpu_batches * policy.prompt_tokens_per_micro_batch
    prompts = PassLoad.prefill(max(1.0, tokens / lengths.prompt), min(tokens, lengths.prompt))
    one, full = PassLoad.decode(1, context), PassLoad.decode(policy.block_size, context)
    empty, decoding, both = (
        float(plan.passes_like(load).pass_seconds(point_of(policy))) for load in (one, full, full + prompts)
    )
    least = 1e-3 * decoding
    return (
        max(least, empty),
        max(least, both - decoding) / float(prompts.prompt_tokens),
        max(least, decoding - empty) / policy.block_size,
    )


class PassTimes:
    """Seconds of a pass by what it carries: the costs that were expected, each times a factor that passes teach.

    Least squares over relative errors. Each factor is held near what they are together, as firmly as its own passes
    weigh: an offloaded model's passes may all be alike for an hour, and then say nothing about one of them.
    """

    def __init__(self, expected: PassCosts = UNPLANNED["cuda"]) -> None:
        self.expected = np.array(expected)
        self.matrix, self.vector = np.zeros((3, 3)), np.zeros(3)
        self.together, self.together_squared = 0.0, 0.0
        self.recent: deque[tuple[np.ndarray, float]] = deque()
        self.recent_terms, self.recent_seconds = np.zeros(3), 0.0

    def add(self, prompt_tokens: float, decoding: float, seconds: float) -> None:
        terms = self.expected * (1.0, prompt_tokens, decoding)
        shares = terms / max(seconds, 1e-9)
        whole = float(shares.sum())
        kept = KEPT ** min(1.0, seconds / SHORT_PASS)
        self.matrix = kept * self.matrix + np.outer(shares, shares)
        self.vector = kept * self.vector + shares
        self.together, self.together_squared = kept * self.together + whole, kept * self.together_squared + whole**2
        self._add_recent(terms, seconds)

    def _add_recent(self, terms: np.ndarray, seconds: float) -> None:
        self.recent.append((terms, seconds))
        self.recent_terms, self.recent_seconds = self.recent_terms + terms, self.recent_seconds + seconds
        while len(self.recent) > RECENT and self.recent_seconds - self.recent[0][1] >= RECENT_SECONDS:
            oldest, took = self.recent.popleft()
            self.recent_terms, self.recent_seconds = self.recent_terms - oldest, self.recent_seconds - took

    @property
    def factors(self) -> np.ndarray:
        common = self.together / self.together_squared
        tie = TIED * (np.diag(self.matrix) + 1e-6 * np.trace(self.matrix))
        found = np.linalg.solve(self.matrix + np.diag(tie), self.vector + tie * common)
        return np.maximum(found, 0.01 * common)

    @property
    def costs(self) -> np.ndarray:
        """Seconds of a pass, a prompt token and a decoding sequence, as they are now."""
        factors = self.factors
        expected = float(self.recent_terms @ factors)
        return self.expected * factors * min(2.0, max(0.5, self.recent_seconds / expected))


class AnswerSpread:
    """How long answers are: what ended before its limit, and what has got how far (the estimate of Kaplan and Meier);
    beyond the longest that ended, as many go on as go on in the mean. Nothing is taken for granted here: what is
    reserved by `execution.answer_lengths` leans to the limit until many were seen, which would be a wrong time."""

    MOST = 4096

    def __init__(self) -> None:
        self.seen: deque[tuple[int, bool]] = deque(maxlen=self.MOST)
        """Tokens of the latest answers, and whether their limit ended them."""

    def add(self, new_tokens: int, cut: bool) -> None:
        self.seen.append((new_tokens, cut))

    @property
    def end_early(self) -> bool:
        """Whether any has ended before its limit."""
        return not all(cut for _, cut in self.seen)

    def totals(self, now: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """The whole length of answers that have ``now`` tokens: spread as answers are, and no expectation for each."""
        if not self.end_early:
            return np.maximum(limits, now)
        events = np.sort([tokens for tokens, cut in self.seen if not cut])
        seen = np.sort(np.r_[[tokens for tokens, _ in self.seen], now[now > 0]])
        at_risk = len(seen) - np.searchsorted(seen, events, side="left")
        # One event at a time: of equal lengths each has one fewer at risk than the one before.
        tied = np.arange(len(events)) - np.searchsorted(events, events, side="left")
        survival = np.cumprod(1 - 1 / np.maximum(1, at_risk - tied))
        hazard = len(events) / float(seen.sum())
        reached = np.searchsorted(events, now, side="right")
        alive = np.where(reached > 0, survival[np.maximum(reached, 1) - 1], 1.0)
        # The middles of as many equal parts as there are answers, in an order that spreads them.
        spread = np.argsort(np.argsort(np.arange(len(now)) * GOLDEN % 1))
        target = np.maximum(alive, 1e-12) * (1 - (spread + 0.5) / max(1, len(now)))
        index = np.searchsorted(-survival, -target, side="left")
        last = float(survival[-1])
        beyond = np.maximum(events[-1], now) + np.maximum(0.0, np.log(np.maximum(last, 1e-12) / target)) / hazard
        length = np.where(index < len(events), events[np.minimum(index, len(events) - 1)], beyond)
        return np.clip(length, np.minimum(now + 1, limits), np.maximum(limits, now))


@dataclass(frozen=True)
class Rest:
    """What is left of a job, in tokens and seconds."""

    seconds: float
    prompt_tokens: float
    new_tokens: float


@dataclass(frozen=True)
class Waiting:
    """Sequences that wait: how many, and (prompt tokens, most new tokens) of them, or of some like them, in turn."""

    count: int
    lengths: Sequence[tuple[int, int]]
    first: int = 0

    def arrays(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        picked = [self.lengths[(self.first + i) % len(self.lengths)] for i in range(count)]
        prompts, limits = np.array(picked, dtype=float).reshape(-1, 2).T
        return prompts, limits


def rest_of(
    running: Sequence[InFlight],
    waiting: Waiting,
    last: PassSeen,
    times: PassTimes,
    answers: AnswerSpread,
    tokens_per_step: float = 1.0,
    prompt_share: float = 1.0,
    engines: int = 1,
) -> Rest:
    """``tokens_per_step``: new tokens of a sequence in a pass, more than one with drafts. ``prompt_share``: of prompts
    that is computed, less than one where they begin alike. ``engines``: that run passes like the last one side by side,
    each with its part of the sequences."""
    costs = times.costs / (1, engines, engines)
    last = replace(last, block_size=engines * last.block_size, prompt_budget=engines * last.prompt_budget)
    in_flight = np.array([(each.prompt_left, each.new_tokens, each.max_tokens) for each in running], dtype=float)
    reading, now, limits = in_flight.reshape(-1, 3).T
    waiting_prompts, waiting_limits = waiting.arrays(min(waiting.count, WALKED_BLOCKS * last.block_size))
    totals = answers.totals(np.r_[now, np.zeros(len(waiting_limits))], np.r_[limits, waiting_limits])
    left = totals - np.r_[now, np.zeros(len(waiting_limits))]
    prompts = np.r_[reading, prompt_share * waiting_prompts]
    seconds = walked(prompts, left, len(running), last, costs, tokens_per_step)
    prompt_tokens, new_tokens = float(prompts.sum()), float(left.sum())
    further = waiting.count - len(waiting_prompts)
    if further:
        prompt, answer = prompt_share * float(waiting_prompts.mean()), float(left[len(running) :].mean())
        seconds += further * steady_seconds(prompt, answer / tokens_per_step, last, costs)
        prompt_tokens, new_tokens = prompt_tokens + further * prompt, new_tokens + further * answer
    return Rest(seconds, prompt_tokens, new_tokens)


def steady_seconds(prompt: float, passes: float, last: PassSeen, costs: np.ndarray) -> float:
    """What one more sequence costs while the block is full: its share of the passes that it is in, or, where the budget
    of prompt tokens holds others up, that of the passes that read prompts."""
    stay = np.ceil(prompt / last.chunk) + passes
    share = max(stay / last.block_size, prompt / last.prompt_budget)
    return float(costs @ (last.parts * share, prompt, passes))


def walked(
    prompts: np.ndarray, answers: np.ndarray, running: int, last: PassSeen, costs: np.ndarray, tokens_per_step: float
) -> float:
    """Seconds of the passes that are needed, several of them in one step where there are many. The first ``running``
    sequences are in flight, the others enter as these end."""
    prompts, answers = prompts.copy(), answers / tokens_per_step
    whole = max(prompts.sum() / last.prompt_budget, answers.sum() / last.block_size, answers.max(initial=0.0))
    step = max(1.0, float(whole) / STEPS)
    seconds, entered = 0.0, max(running, min(len(prompts), last.block_size))
    active = np.arange(entered)
    while active.size:
        want = np.minimum(prompts[active], last.chunk * step)
        given = np.clip(last.prompt_budget * step - (np.cumsum(want) - want), 0, want)
        decoding = active[prompts[active] <= 0]
        # A sequence that ends within the step is in no more passes than it needs; the last one says how many these are.
        passes = step
        if not given.any() and entered == len(prompts):
            passes = min(step, max(1.0, float(answers[decoding].max(initial=1.0))))
        taken = np.minimum(answers[decoding], passes)
        prompts[active] -= given
        read = active[(given > 0) & (prompts[active] <= 0)]
        answers[decoding] -= taken
        answers[read] -= 1
        seconds += float(costs @ (last.parts * passes, given.sum(), taken.sum()))
        active = active[(prompts[active] > 0) | (answers[active] > 1e-9)]
        enters = min(len(prompts) - entered, last.block_size - active.size)
        if enters > 0:
            active = np.concatenate([active, np.arange(entered, entered + enters)])
            entered += enters
    return seconds
