"""What those who look after a server see: Prometheus metrics, and the state of everything as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from flexbatch.apps.serve.answers import Answers
from flexbatch.apps.serve.batches import Batches
from flexbatch.apps.serve.serving import Serving

REPORT_SECONDS, REPORT_WAIT_SECONDS = 5.0, 1.0
"""How old a report of the engine may be, and how long a new one is waited for: a pass may take long."""
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
HIDDEN = ("model", "prediction")
"""Parts of the report that are shown in another form: the model's name may be a path."""


class Monitoring:
    """The metrics and the status of one server."""

    def __init__(self, serving: Serving, answers: Answers, batches: Batches) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._serving, self._answers, self._batches = serving, answers, batches
        self._began, self._began_clock = time.time(), time.monotonic()
        self._report: dict[str, Any] = {}
        self._reported = 0.0
        self.registry = CollectorRegistry()
        self.registry.register(self)  # a collector by its methods
        name = "flexbatch_requests_total"
        self.requests = Counter(name, "HTTP requests that were answered", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "flexbatch_answer_seconds",
            "from a request to its whole answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first = Histogram(
            "flexbatch_first_token_seconds",
            "from a request to the first of a stream",
            buckets=SECONDS,
            registry=self.registry,
        )

    def describe(self) -> Iterator[Any]:
        """Tells prometheus_client that nothing has to be collected to know the names."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        seen = self._serving.load.look()
        gauges = {
            "flexbatch_running_sequences": ("sequences in flight", seen.running),
            "flexbatch_aside_sequences": ("sequences that have stepped aside", seen.aside),
            "flexbatch_block_sequences": ("sequences that the block holds", seen.block),
            "flexbatch_interactive_sequences": (
                "answers that interactive requests wait for",
                self._answers.num_waiting,
            ),
            "flexbatch_uptime_seconds": ("since the server began", time.monotonic() - self._began_clock),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        counters = {
            "flexbatch_passes": ("passes of the block", seen.passes),
            "flexbatch_prompt_tokens": ("prompt tokens read", seen.prompt_tokens),
            "flexbatch_generated_tokens": ("tokens generated", seen.generated_tokens),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value)
        batches = self._batches.status()
        by_status = GaugeMetricFamily("flexbatch_batches", "batches that have not ended", labels=["status"])
        lines = GaugeMetricFamily("flexbatch_batch_lines", "lines of batches that have not ended", labels=["state"])
        for status in ("validating", "in_progress", "finalizing", "cancelling"):
            by_status.add_metric([status], sum(batch["status"] == status for batch in batches))
        for state in ("total", "completed", "failed"):
            lines.add_metric([state], sum(batch["request_counts"][state] for batch in batches))
        yield by_status
        yield lines

    def metrics(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def status(self) -> dict[str, Any]:
        """Waits for the engine at most a second, and shows what it said last where that does not do."""
        self._look()
        report, prediction = self._report, self._report.get("prediction", {})
        names, seen = self._answers.names, self._serving.load.look()
        from flexbatch import __version__

        return {
            "version": __version__,
            "model": names.model,
            "adapters": list(names.adapters),
            "started_at": int(self._began),
            "uptime_seconds": time.monotonic() - self._began_clock,
            "tokens_per_second": self._serving.load.rates(),
            "tokens": {"prompt": seen.prompt_tokens, "generated": seen.generated_tokens},
            "passes": {"count": seen.passes, "last_seconds": seen.pass_seconds},
            "sequences": {
                **self._serving.load.describe(),
                "interactive": self._answers.num_waiting,
                "interactive_limit": self._answers.max_waiting,
                "batch": self._serving.num_of_batches,
            },
            "batches": self._batches.status(),
            "limits": {
                "resource": prediction.get("limiting_resource"),
                "resources": prediction.get("resources", {}),
                "predicted_pass_seconds": prediction.get("predicted_pass_seconds"),
                "measured_pass_seconds": prediction.get("measured_pass_seconds"),
                "bound_tokens_per_second": prediction.get("bound_tokens_per_second"),
            },
            "engine": {name: value for name, value in report.items() if name not in HIDDEN},
        }

    def _look(self) -> None:
        if time.monotonic() - self._reported < REPORT_SECONDS and self._report:
            return
        report = self._serving.snapshot(REPORT_WAIT_SECONDS)
        if report is not None:
            self._report, self._reported = report, time.monotonic()
