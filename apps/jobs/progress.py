"""Reports how far a job is: a bar on a terminal, else a line every ten seconds, and a Prometheus text file. All on
stderr: stdout is data only."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from flexbatch.files.atomic import replacing

INTERVAL_S = 10.0
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

    def add(self, rows: int, errors: int, input_tokens: int, generated_tokens: int) -> None:
        """Adds rows that are finished, and what they hold."""
        self.rows_done += rows
        self.row_errors += errors
        self.input_tokens_total += input_tokens
        self.generated_tokens_total += generated_tokens


class JobProgress:
    """Shows `Counts` until closed. ``metrics_file`` is replaced atomically, every ten seconds and at the end."""

    def __init__(
        self,
        counts: Counts,
        *,
        metrics_file: str | None = None,
        labels: dict[str, str] | None = None,
        stream: TextIO | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.counts, self._first_rows = counts, counts.rows_done
        self._metrics = Path(metrics_file) if metrics_file else None
        self._labels = ",".join(f'{name}="{_escape(value)}"' for name, value in (labels or {}).items())
        self._stream = stream or sys.stderr
        self._interval_s, self._began = interval_s, time.monotonic()
        self._bar = None
        self._stop = threading.Event()
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=counts.rows_total, initial=counts.rows_done, unit="row", file=self._stream, dynamic_ncols=True
            )
        self._thread = threading.Thread(target=self._loop, name="progress", daemon=True)
        self._thread.start()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def line(self) -> str:
        """Returns one line: rows, tokens per second in and out, time left, errors."""
        counts, seconds = self.counts, max(self.elapsed_s, 1e-9)
        fresh = counts.rows_done - self._first_rows
        left = (counts.rows_total - counts.rows_done) * seconds / fresh if fresh else None
        percent = 100 * counts.rows_done / max(counts.rows_total, 1)
        return (
            f"{counts.rows_done:,}/{counts.rows_total:,} rows ({percent:.1f} %), "
            f"{counts.input_tokens_total / seconds:,.0f} input tok/s, "
            f"{counts.generated_tokens_total / seconds:,.0f} output tok/s, ETA {_duration(left)}, "
            f"{counts.row_errors:,} errors"
        )

    def say(self, message: str) -> None:
        """Prints a line of its own, beside the bar."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        else:
            print(message, file=self._stream, flush=True)

    def _loop(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(min(self._interval_s, 1.0)):
            self._show_bar()
            if time.monotonic() - last >= self._interval_s:
                last = time.monotonic()
                if self._bar is None:
                    self.say(f"flexbatch: {self.line()}")
                self.write_metrics()

    def _show_bar(self) -> None:
        if self._bar is not None:
            seconds = max(self.elapsed_s, 1e-9)
            self._bar.n = self.counts.rows_done
            rates = self.counts.input_tokens_total / seconds, self.counts.generated_tokens_total / seconds
            self._bar.set_postfix_str(
                f"in {rates[0]:,.0f} tok/s, out {rates[1]:,.0f} tok/s, {self.counts.row_errors} errors"
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
            self.say(f"flexbatch: metrics file {self._metrics} cannot be written, going on without it: {error}")
            self._metrics = None

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._show_bar()
        if self._bar is not None:
            self._bar.close()
        self.write_metrics()


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
