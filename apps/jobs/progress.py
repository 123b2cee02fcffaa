"""How far a batch job is: its rows beside the tokens and passes of `cli.progress`, and a Prometheus text file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from flexbatch.cli.progress import SECONDS_PER_LINE, JobMeter, Progress
from flexbatch.files.atomic import replacing
from flexbatch.policy.units import duration_text

METRICS = (
    ("rows_total", "gauge", "input rows of this shard"),
    ("rows_done", "gauge", "rows finished, those of earlier runs included"),
    ("row_errors", "gauge", "rows that ended in an error"),
    ("parts_committed", "gauge", "output parts in place"),
    ("input_tokens_total", "counter", "prompt tokens of the rows finished in this run"),
    ("generated_tokens_total", "counter", "generated tokens of the rows finished in this run"),
    ("elapsed_seconds", "counter", "seconds since this run began to generate"),
)


@dataclass
class Counts:
    """The counts of a shard. ``rows_done``, ``row_errors`` and ``parts_committed`` include earlier runs; tokens are
    of this run."""

    rows_total: int
    rows_done: int = 0
    row_errors: int = 0
    parts_committed: int = 0
    input_tokens_total: int = 0
    generated_tokens_total: int = 0
    rows_not_run: int = 0
    """Rows of this run that no engine was given: they had an error before."""

    def add(self, rows: int, errors: int, input_tokens: int, generated_tokens: int) -> None:
        """Adds rows that are finished, and what they hold."""
        self.rows_done += rows
        self.row_errors += errors
        self.input_tokens_total += input_tokens
        self.generated_tokens_total += generated_tokens


class JobProgress(Progress):
    """Shows `Counts` until closed. ``metrics_file`` is replaced atomically, every ten seconds and at the end.

    ``meter`` knows of the passes; without them (other processes run these) the time left follows from the rows alone.
    """

    unit = "row"

    def __init__(
        self,
        counts: Counts,
        meter: JobMeter | None = None,
        *,
        metrics_file: str | None = None,
        labels: dict[str, str] | None = None,
        stream: TextIO | None = None,
        interval_s: float = SECONDS_PER_LINE,
    ) -> None:
        self.counts, self._first_rows = counts, counts.rows_done
        self._sequences = meter.total if meter is not None else 0
        self._per_row = self._sequences / max(1, counts.rows_total - counts.rows_done)
        self._metrics = Path(metrics_file) if metrics_file else None
        self._labels = ",".join(f'{name}="{_escape(value)}"' for name, value in (labels or {}).items())
        self._began = time.monotonic()
        super().__init__(counts.rows_total, meter, initial=counts.rows_done, stream=stream, interval_s=interval_s)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def line(self) -> str:
        """Returns one line: rows, tokens done and expected, rates, time left, errors."""
        self._leave_out()
        counts = self.counts
        percent = 100 * counts.rows_done / max(counts.rows_total, 1)
        rows = f"{counts.rows_done:,}/{counts.rows_total:,} rows ({percent:.1f} %)"
        return f"{rows}, {self.meter.text() if self.meter.passes else self._by_rows()}, {counts.row_errors:,} errors"

    def _leave_out(self) -> None:
        self.meter.total = round(self._sequences - self._per_row * self.counts.rows_not_run)

    def _by_rows(self) -> str:
        counts, seconds = self.counts, max(self.elapsed_s, 1e-9)
        fresh, left = counts.rows_done - self._first_rows, self._seconds_left()
        if not fresh or left is None:
            return "none finished in this run yet"
        return (
            f"{counts.input_tokens_total / seconds:,.0f} in and {counts.generated_tokens_total / seconds:,.0f} out "
            f"tokens/s, {duration_text(left)} left"
        )

    def _seconds_left(self) -> float | None:
        counts, fresh = self.counts, self.counts.rows_done - self._first_rows
        return (counts.rows_total - counts.rows_done) * self.elapsed_s / fresh if fresh else None

    def bar_text(self) -> str:
        self._leave_out()
        text = super().bar_text() if self.meter.passes else self._by_rows()
        return f"{text}, {self.counts.row_errors:,} errors"

    def say(self, message: str) -> None:
        """Prints a line of its own, beside the bar."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        else:
            print(f"flexbatch: {message}", file=self._stream, flush=True)

    def _show_bar(self) -> None:
        self.done = self.counts.rows_done
        super()._show_bar()

    def tick(self) -> None:
        self.write_metrics()

    def ending(self) -> str:
        """The last line: what was done in this run."""
        counts, seconds = self.counts, max(self.elapsed_s, 1e-9)
        fresh = counts.rows_done - self._first_rows
        return (
            f"{counts.rows_done:,}/{counts.rows_total:,} rows, {fresh:,} of them in {duration_text(seconds)}: "
            f"{counts.input_tokens_total:,} prompt tokens and {counts.generated_tokens_total:,} new tokens, "
            f"{counts.generated_tokens_total / seconds:,.1f} tokens/s, {counts.row_errors:,} errors"
        )

    def write_metrics(self) -> None:
        """Replaces the metrics file. A file that cannot be written is reported once and then left alone, for it is
        not worth the job."""
        if self._metrics is None:
            return
        values = {**vars(self.counts), "elapsed_seconds": round(self.elapsed_s, 3)}
        label = f"{{{self._labels}}}" if self._labels else ""
        lines = [
            f"# HELP flexbatch_{name} {text}\n# TYPE flexbatch_{name} {kind}\nflexbatch_{name}{label} {values[name]}\n"
            for name, kind, text in METRICS
        ]
        try:
            with replacing(self._metrics, durable=False) as file:
                file.write("".join(lines).encode())
        except OSError as error:
            self.say(f"metrics file {self._metrics} cannot be written, going on without it: {error}")
            self._metrics = None


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
