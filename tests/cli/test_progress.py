"""How far a job is: tokens, rates and the time left, for simulated jobs whose truth is known."""

from __future__ import annotations

import io
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from flexbatch.cli import eta
from flexbatch.cli.eta import AnswerSpread, PassCosts, PassTimes
from flexbatch.cli.progress import JobMeter, Progress
from flexbatch.execution.watch import InFlight, PassSeen, SequenceSeen

TOLERANCE = 0.25
"""Of the time that is really left, from a tenth of a job on."""


@dataclass
class Machine:
    """Seconds of a pass: weights that stream whatever is in it, or computing if that takes longer; and the cache."""

    streaming: float = 0.0
    prompt_token: float = 0.0
    new_token: float = 0.0
    context: float = 0.0
    launch: float = 1e-3
    noise: float = 0.05
    bursts: float = 0.0
    """Share of the time in which somebody else has most of the processors, for a second or so each time."""
    burst_left: float = 0.0

    def seconds(self, prompts: float, decoding: int, context: float, chance: random.Random) -> float:
        work = max(self.streaming, self.prompt_token * prompts + self.new_token * decoding)
        alone = (self.launch + work + self.context * context) * chance.uniform(1 - self.noise, 1 + self.noise)
        if self.burst_left <= 0 and chance.random() < alone * self.bursts / (1 - self.bursts):
            self.burst_left = chance.uniform(0.5, 1.5)
        seconds = alone * (3.0 if self.burst_left > 0 else 1.0)
        self.burst_left -= seconds
        return seconds


@dataclass
class Job:
    """``lengths``: (prompt tokens, most new tokens, new tokens in truth); ``known`` is what the meter is told of
    them."""

    machine: Machine
    lengths: list[tuple[int, int, int]]
    block: int
    budget: int = 2048
    chunk: int = 512
    known: list[tuple[int, int]] = field(default_factory=list)
    costs: PassCosts = eta.UNPLANNED["cuda"]
    last: float = 0.03
    """Of the whole job: what the estimate may be off by at its very end."""
    clock: float = 0.0

    def run(self, look: Callable[[int, JobMeter], None] = lambda number, meter: None) -> tuple[float, int]:
        """Lets ``look`` see the meter after every pass, by its number; returns the time at the end, and the passes."""
        chance = random.Random(1)
        meter = JobMeter(len(self.lengths), self.known or [each[:2] for each in self.lengths], lambda: self.clock)
        meter.times, meter.answers = PassTimes(self.costs), AnswerSpread()
        self.clock = 0.0
        waiting = [[prompt, 0, most, truth, prompt] for prompt, most, truth in self.lengths]
        running: list[list[int]] = []
        while waiting or running:
            while waiting and len(running) < self.block:
                running.append(waiting.pop(0))
            budget, read, new = self.budget, 0, 0
            decoding = [each for each in running if not each[0]]
            context = sum(each[4] + each[1] for each in decoding)
            for each in [each for each in running if each[0]]:
                count = min(each[0], self.chunk, budget)
                each[0], budget, read = each[0] - count, budget - count, read + count
                if count and not each[0]:
                    each[1], new = 1, new + 1
            for each in decoding:
                each[1], new = each[1] + 1, new + 1
            seconds = self.machine.seconds(read, len(decoding), context, chance)
            self.clock += seconds
            ended = [each for each in running if not each[0] and each[1] >= each[3]]
            running = [each for each in running if each[0] or each[1] < each[3]]
            left = tuple(InFlight(each[0], each[1], each[2]) for each in running)
            meter.pass_seen(PassSeen(seconds, read, new, len(decoding), self.block, self.budget, self.chunk, left))
            for each in ended:
                meter.sequence_seen(SequenceSeen(each[4], each[1], each[1] >= each[2]))
            look(meter.passes, meter)
        return self.clock, meter.passes


def uniform(count: int, prompts: tuple[int, int], new: tuple[int, int]) -> list[tuple[int, int, int]]:
    chance = random.Random(3)
    drawn = [(chance.randint(*prompts), chance.randint(*new)) for _ in range(count)]
    return [(prompt, most, most) for prompt, most in drawn]


def early(count: int, mean: int, most: int) -> list[tuple[int, int, int]]:
    """Answers of geometric length, nearly all far below the limit. When the last few of them end is chance."""
    chance = random.Random(4)
    return [(chance.randint(50, 400), most, min(most, 1 + int(chance.expovariate(1 / mean)))) for _ in range(count)]


OFFLOADED, IN_MEMORY = Machine(streaming=1.0, context=2e-6), Machine(prompt_token=2e-5, new_token=1e-4, context=1e-8)
PREFILL = Machine(prompt_token=1e-3, new_token=1e-3)


def resumed() -> Job:
    """What is left of a job that was two thirds through: fewer rows, of which a sample is known, the longest first."""
    rest = sorted(uniform(170, (50, 900), (16, 200)), reverse=True)
    return Job(OFFLOADED, rest, block=24, known=[each[:2] for each in random.Random(5).sample(rest, 40)])


JOBS: dict[str, Callable[[], Job]] = {
    "one block, nothing ends before the end": lambda: Job(OFFLOADED, uniform(48, (100, 500), (180, 200)), block=48),
    "waves of an offloaded model": lambda: Job(OFFLOADED, uniform(300, (100, 500), (20, 90)), block=40),
    "long prompts, short answers": lambda: Job(PREFILL, uniform(60, (1500, 4000), (4, 16)), block=60),
    "answers that end early": lambda: Job(OFFLOADED, early(900, 60, 512), block=48, last=0.08),
    "resumed, the longest first": resumed,
    "all in memory, ragged": lambda: Job(
        IN_MEMORY, uniform(200, (10, 800), (5, 300)), block=32, costs=eta.UNPLANNED["cpu"]
    ),
    "a plan that was wrong by three": lambda: Job(
        OFFLOADED, uniform(200, (100, 500), (20, 90)), block=40, costs=(0.33, 1e-6, 1e-6)
    ),
    "a wave of ten at the end": lambda: Job(OFFLOADED, uniform(130, (256, 256), (64, 64)), block=40),
    "one long answer on a busy machine": lambda: Job(
        Machine(new_token=0.01, noise=0.3, bursts=0.3), [(10, 6000, 6000)], block=1, costs=eta.UNPLANNED["cpu"]
    ),
    "waves of short passes on a busy machine": lambda: Job(
        Machine(prompt_token=1e-4, new_token=1e-3, noise=0.3, bursts=0.3), uniform(500, (50, 400), (20, 90)), block=16
    ),
    "scoring, no answers": lambda: Job(PREFILL, uniform(100, (300, 2000), (0, 0)), block=30),
}


@pytest.mark.parametrize("name", JOBS)
def test_the_time_left_is_true_from_a_tenth_of_a_job_on(name: str) -> None:
    job = JOBS[name]()
    _, passes = job.run()
    told: list[tuple[float, float | None]] = []

    def look(number: int, meter: JobMeter) -> None:
        if number % max(1, passes // 25) == 0:
            told.append((job.clock, meter.seconds_left))

    total, _ = job.run(look)
    late = [(now, left) for now, left in told if now >= 0.1 * total]
    assert len(late) > 8
    for now, left in late:
        assert left is not None
        assert abs(left - (total - now)) <= TOLERANCE * (total - now) + job.last * total, (
            now / total,
            left,
            total - now,
        )


def test_after_ctrl_c_what_is_left_is_what_is_in_flight() -> None:
    """Of 200 sequences of at most 90 tokens, in passes of a second."""
    job = Job(OFFLOADED, uniform(200, (100, 500), (20, 90)), block=40)
    told: list[tuple[float | None, float | None, str]] = []

    def look(number: int, meter: JobMeter) -> None:
        if number == 100:
            before = meter.seconds_left
            meter.draining = True
            told.append((before, meter.seconds_left, meter.text()))

    job.run(look)
    ((before, after, text),) = told
    assert before is not None and after is not None and before > 150 and 30 < after < 100
    assert re.search(r"read ([\d,]+) of about \1 prompt tokens", text), text


def test_the_time_left_follows_a_machine_that_gets_slower() -> None:
    job = Job(OFFLOADED, uniform(200, (100, 500), (20, 90)), block=40)
    told: list[tuple[float, float | None]] = []

    def look(number: int, meter: JobMeter) -> None:
        if number == 100:
            job.machine = Machine(streaming=1.6, context=2e-6)
        if number == 140:
            told.append((job.clock, meter.seconds_left))

    total, _ = job.run(look)
    ((now, left),) = told
    assert left == pytest.approx(total - now, rel=0.15)


def test_costs_are_told_apart_where_passes_differ() -> None:
    times, truth = PassTimes((1.0, 1e-3, 1e-3)), np.array([0.4, 2e-3, 5e-4])
    for prompts, decoding in [(0, 10), (500, 10), (2000, 0), (0, 400), (1000, 200)] * 20:
        times.add(prompts, decoding, float(truth @ (1, prompts, decoding)))
    assert times.costs == pytest.approx(truth, rel=0.15)
    alike = PassTimes((1.0, 1e-3, 1e-3))
    for _ in range(50):
        alike.add(0, 100, 3.0)
    assert alike.costs @ (1, 0, 100) == pytest.approx(3.0) and (alike.costs > 0).all()


def test_lengths_of_answers_are_learned_with_those_that_run() -> None:
    answers, chance = AnswerSpread(), np.random.default_rng(0)
    waiting, limits = np.zeros(2000), np.full(2000, 1000.0)
    assert (answers.totals(waiting, limits) == 1000).all()
    drawn = 1 + chance.geometric(1 / 120, size=800)
    now = np.minimum(drawn, 90)  # all are in flight for 90 passes: only the short ones have ended
    for tokens in drawn[drawn <= 90]:
        answers.add(int(tokens), False)
    running = now[drawn > 90].astype(float)
    learned = answers.totals(np.r_[running, waiting], np.r_[np.full(len(running), 1000.0), limits])
    assert learned[len(running) :].mean() == pytest.approx(120, rel=0.15)
    assert (learned[: len(running)] - running).mean() == pytest.approx(120, rel=0.2)
    assert (learned[: len(running)] > running).all() and (learned <= 1000).all()


def test_rates_are_those_of_the_last_minute() -> None:
    now = [0.0]
    meter = JobMeter(10, [(100, 50)], lambda: now[0])
    meter.times, meter.answers = PassTimes(), AnswerSpread()
    for count in (1000, *[10] * 20):
        now[0] += 10
        meter.pass_seen(PassSeen(10.0, count, 5, 5, 8, 512, 512, (InFlight(0, 3, 50),)))
    assert meter.rates == (pytest.approx(1.0), pytest.approx(0.5))
    assert meter.prompt_tokens == 1200 and meter.passes == 21
    text = meter.text()
    assert text.startswith("pass 21; read 1,200 of about") and "1 in and 0 out tokens/s" in text and "left" in text


def test_prompts_that_begin_alike_are_expected_to_be_read_once() -> None:
    job = Job(PREFILL, uniform(100, (1000, 1000), (4, 4)), block=10)
    meter = JobMeter(100, [(1000, 4)])
    meter.times, meter.answers = PassTimes(), AnswerSpread()
    for number in range(50):
        meter.pass_seen(PassSeen(0.1, 1000 if not number else 50, 1, 1, 10, 2048, 512, ()))
        meter.sequence_seen(SequenceSeen(1000, 4, True))
    rest = meter.rest()
    assert rest is not None and rest.prompt_tokens == pytest.approx(50 * 1000 * (1000 + 49 * 50) / 50_000)
    assert job.block == 10


def test_a_line_after_the_first_pass_and_a_bar_on_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    meter = JobMeter(4, [(10, 5)])
    meter.times, meter.answers = PassTimes(), AnswerSpread()
    with caplog.at_level("INFO"), Progress(4, meter, terminal=False) as progress:
        assert "first pass under way" in progress.line()
        meter.pass_seen(PassSeen(0.5, 40, 4, 0, 4, 512, 512, (InFlight(0, 1, 5),) * 4))
        deadline = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.05)
    assert caplog.messages[0].startswith(
        "0 of 4 completions; pass 1; read 40 of about 40 prompt tokens, wrote 4 of about 20"
    )
    assert caplog.messages[-1].startswith("0 of 4 completions in ") and "40 prompt tokens read" in caplog.messages[-1]

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with Progress(4, meter, stream=screen) as progress:
        progress.done = 3
        progress.say("a message")
    assert "3/4 completions" in screen.getvalue() and "a message" in screen.getvalue() and "left" in screen.getvalue()


@pytest.mark.parametrize("draft", [None, ("ngram",)])
def test_what_is_watched_adds_up_to_what_was_run(model_folder: Path, draft: tuple[str, ...] | None) -> None:
    """With drafts the tokens of a pass are no number of its queries."""
    from flexbatch import LLM, SamplingParams
    from flexbatch.execution.watch import Watch

    passes: list[PassSeen] = []
    sequences: list[SequenceSeen] = []
    with LLM(str(model_folder), device="cpu", gpu_memory="64MiB", cpu_memory="64MiB", draft=draft) as llm:
        llm.watch(Watch(passes.append, sequences.append))
        prompts = [[5 + i, 6, 7, 5 + i, 6, 7] * (1 + i % 3) for i in range(7)]
        llm.generate(prompts, [SamplingParams(max_tokens=3 + i, temperature=0, ignore_eos=True) for i in range(7)])
        report = llm.report()
    assert len(passes) == report["passes"] and len(sequences) == 7
    assert sum(seen.prompt_tokens for seen in passes) == report["prefilled_tokens"]
    assert sum(seen.new_tokens for seen in passes) == report["generated_tokens"] == sum(range(3, 10))
    assert sum(seen.new_tokens for seen in sequences) == report["generated_tokens"]
    assert all(seen.cut and not seen.failed for seen in sequences)
    assert passes[0].in_flight is not None and len(passes[0].in_flight) == 7
