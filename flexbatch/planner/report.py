"""What the runs of an engine measured."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Sequenced
from dataclasses import asdict, dataclass, field
from typing import Any

from flexbatch.execution.aside import Preemptions
from flexbatch.execution.observer import RunObserver
from flexbatch.execution.pass_batch import PassBatch
from flexbatch.execution.runner import Runner
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence
from flexbatch.execution.set_up import COMPARISONS, Made, SetUp
from flexbatch.memory.tiers import Tiers
from flexbatch.planner import tables
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.speculative.speculator import Speculator

logger = logging.getLogger("flexbatch")

LOGGED_FAILURES = 3
PASSES_PER_LINE = 10
"""Of the log, at level DEBUG."""
LOADED = ("loaded_bytes", "reused_bytes")
OF_AN_ENGINE = (
    *("device", "budgets", "policy", "peak_bytes", "load_seconds", "seconds", "passes", "requests", "prompt_tokens"),
    *("generated_tokens", "generated_tokens_per_second", "resources"),
)
"""What the report of several engines has of each."""


class Report(dict[str, Any]):
    """What `LLM.report` gives: a dict of numbers under stable names, which prints as the tables that a run shows."""

    def __str__(self) -> str:
        return tables.whole(self)


@dataclass
class Statistics(RunObserver):
    """Sums over the runs of an engine."""

    seconds: float = 0.0
    set_up: dict[str, Made] = field(default_factory=dict)
    """Of these: what was made that later passes find there, by kind."""
    compiled: list[str] = field(default_factory=list)
    """The kernels that passes waited for, each with what it was compiled for."""
    passes: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    requests: int = 0
    preemptions: Preemptions = field(default_factory=Preemptions)
    """Sequences that stepped aside for others."""
    moved_bytes: dict[str, int] = field(default_factory=dict)

    def beside_set_up(self, seconds: float, set_up: SetUp) -> float:
        """What a turn of the loop took but for the set-up in it, which is counted here."""
        before = self.set_up_seconds
        for kind, made in set_up.take().items():
            self.set_up[kind] = self.set_up.get(kind, Made()) + made
        self.compiled += set_up.take_variants()
        return max(0.0, seconds - (self.set_up_seconds - before))

    @contextlib.contextmanager
    def replanning(self) -> Iterator[None]:
        """Between passes: the body compares the plan with what was learned of the job, and may make another block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.seconds += seconds
            self.set_up[COMPARISONS] = self.set_up.get(COMPARISONS, Made()) + Made(1, seconds)

    @property
    def set_up_seconds(self) -> float:
        return sum(made.seconds for made in self.set_up.values())

    @property
    def generated_tokens_per_second(self) -> float:
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def pass_seconds(self) -> float:
        """Of the average pass, beside set-up."""
        return (self.seconds - self.set_up_seconds) / self.passes if self.passes else 0.0

    @property
    def total_tokens_per_second(self) -> float:
        return (self.prompt_tokens + self.generated_tokens) / self.seconds if self.seconds else 0.0

    def after_pass(self, scheduler: Scheduler, batch: PassBatch, seconds: float) -> None:
        self.passes += 1
        if self.passes % PASSES_PER_LINE == 0:
            logger.debug("pass %d: %d sequences run, %.3f s", self.passes, len(scheduler.running), seconds)
        self.prefilled_tokens += batch.num_prompt_tokens
        self.preemptions += scheduler.aside.take_counts()

    def after_sequence(self, sequence: Sequence) -> None:
        self.requests += 1
        self.prompt_tokens += sequence.num_prompt_tokens
        self.generated_tokens += sequence.num_output_tokens

    def describe(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "set_up_seconds": self.set_up_seconds,
            "set_up": {kind: asdict(made) for kind, made in self.set_up.items()},
            "compiled_in_passes": list(self.compiled),
            "passes": self.passes,
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "prefilled_tokens": self.prefilled_tokens,
            "generated_tokens": self.generated_tokens,
            "generated_tokens_per_second": self.generated_tokens_per_second,
            "total_tokens_per_second": self.total_tokens_per_second,
            "preemptions": {"total": self.preemptions.total, **asdict(self.preemptions)},
            "moved_bytes": self.moved_bytes,
        }


def of_engines(own: Report, others: Sequenced[Mapping[str, Any]]) -> Report:
    """The report of several engines: what rank 0's says of itself holds for each of them, counts are sums over all, and
    the seconds are rank 0's, which waits for the others."""
    reports = [dict(own), *others]
    whole = Report(own)
    for name in ("requests", "passes", "prompt_tokens", "prefilled_tokens", "generated_tokens", *LOADED):
        whole[name] = sum(report[name] for report in reports)
    for name in ("preemptions", "moved_bytes"):
        kinds = dict.fromkeys(kind for report in reports for kind in report[name])
        whole[name] = {kind: sum(report[name].get(kind, 0) for report in reports) for kind in kinds}
    whole["load_seconds"] = max(report["load_seconds"] for report in reports)
    seconds = whole["seconds"]
    whole["generated_tokens_per_second"] = whole["generated_tokens"] / seconds if seconds else 0.0
    tokens = whole["prompt_tokens"] + whole["generated_tokens"]
    whole["total_tokens_per_second"] = tokens / seconds if seconds else 0.0
    whole["engines"] = [{name: report[name] for name in OF_AN_ENGINE} for report in reports]
    return whole


def describe_memory(
    engine_plan: EnginePlan, runner: Runner | None, tiers: Tiers, speculator: Speculator | None
) -> dict[str, Any]:
    """Where everything is, what the plan counts for it, and the most that there was (bytes by tier)."""
    return {
        "realized_percent": {
            "weights": engine_plan.weight_plan.realized_percent,
            "cache": runner.cache.realized_percent if runner else {},
            "activations": runner.activations.realized_percent if runner else {},
        },
        "cache": cache_of_a_sequence(runner) if runner else {},
        "memory": [asdict(row) for row in engine_plan.requirements(runner.sizes)] if runner else [],
        "without_graphs": engine_plan.graphs(runner.sizes).lack() if runner else "",
        "peak_bytes": {
            "gpu": tiers.gpu.peak_bytes + (speculator.peak_bytes if speculator is not None else 0),
            "cpu": tiers.cpu.peak_bytes,
            "disk": tiers.disk.peak_bytes,
        },
    }


def cache_of_a_sequence(runner: Runner) -> dict[str, Any]:
    """What the longest sequence takes of the cache between two passes, and which layers keep only their window."""
    cache, layout = runner.cache, runner.cache.layout
    short, pages = sum(cache.windowed), layout.num_pages(max(1, runner.sizes.longest))
    kept = (layout.num_layers - short) * pages + short * cache.sizes.in_windows(pages)
    return {
        "sequence_tokens": pages * layout.page_tokens,
        "bytes_per_token": kept * layout.page_bytes / (pages * layout.page_tokens),
        "window_layers": short,
        "window_tokens": layout.window.tokens if layout.window and short else None,
    }


class FailureLog(RunObserver):
    """Says in the log why sequences failed: of the first few, as all of them may."""

    def __init__(self) -> None:
        self.num_failed = 0

    def after_sequence(self, sequence: Sequence) -> None:
        if not sequence.error or sequence.table is None:
            return
        self.num_failed += 1
        if self.num_failed <= LOGGED_FAILURES:
            more = "; more failures are only in their completions" if self.num_failed == LOGGED_FAILURES else ""
            logger.error("%s%s", described_failure(sequence), more)


def described_failure(sequence: Sequence) -> str:
    """Which request failed, and why; empty for one that did not."""
    request = sequence.request
    sample = f", sample {request.sample}" if request.params.n > 1 else ""
    return f"prompt {request.index}{sample}: {sequence.error}" if sequence.error else ""
