"""How far loading is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from flexbatch.policy.units import duration_text, size_text

logger = logging.getLogger("flexbatch")

SECONDS_PER_LINE = 5.0
"""Of loading that takes longer."""


class LoadMeter:
    """Bytes that are on their tiers, where they came from, and how fast. Told by several threads."""

    def __init__(
        self, total_bytes: float, clock: Callable[[], float] = time.monotonic, stream: TextIO | None = None
    ) -> None:
        """stream: where a bar is drawn if it is a terminal (default: stderr)."""
        self.total_bytes, self.clock = total_bytes, clock
        self.started = self.said = clock()
        self.stored_bytes = self.reused_bytes = 0.0
        self.read_bytes = self.filed_bytes = self.to_file_bytes = 0
        self._lock = threading.Lock()
        stream = stream or sys.stderr
        self._bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=round(total_bytes), desc="loading", unit="B", unit_scale=True, unit_divisor=1024, file=stream,
                dynamic_ncols=True, leave=False,
            )  # fmt: skip

    def loaded(self, stored_bytes: float, read_bytes: int) -> None:
        """``stored_bytes`` more are on their tier, for which ``read_bytes`` were read from the checkpoint."""
        with self._lock:
            self.read_bytes += read_bytes
            self._add(stored_bytes)

    def reused(self, stored_bytes: float) -> None:
        """So many more were found in the offload folder."""
        with self._lock:
            self.reused_bytes += stored_bytes
            self._add(stored_bytes)

    def filed(self, num_bytes: int) -> None:
        """A file of so many bytes was written to the offload folder."""
        with self._lock:
            self.filed_bytes += num_bytes
            self._add(0.0)

    def _add(self, stored_bytes: float) -> None:
        self.stored_bytes += stored_bytes
        now = self.clock()
        if self._bar is not None:
            self._bar.set_postfix_str(self.details(now - self.started), refresh=False)
            self._bar.update(round(self.stored_bytes) - self._bar.n)
            return
        if now - self.said < SECONDS_PER_LINE:
            return
        self.said = now
        logger.info("%s", self.line(now - self.started))

    def line(self, seconds: float) -> str:
        left = seconds * (self.total_bytes / self.stored_bytes - 1) if self.stored_bytes else 0.0
        return (
            f"loading: {size_text(self.stored_bytes)} of {size_text(self.total_bytes)} are on their tiers, "
            f"{self.details(seconds)}, {duration_text(left)} left"
        )

    def details(self, seconds: float) -> str:
        """Rates, and what of it is done."""
        texts = [f"{self.read_bytes / max(seconds, 1e-9) / 1e9:.2f} GB/s read"]
        if self.reused_bytes:
            texts.append(f"{size_text(self.reused_bytes)} found in the offload folder")
        if self.to_file_bytes:
            texts.append(f"{size_text(self.filed_bytes)} of {size_text(self.to_file_bytes)} written there")
        return ", ".join(texts)

    def check(self) -> None:
        """Invariant: no byte is counted twice."""
        assert self.stored_bytes <= self.total_bytes * (1 + 1e-6), (self.stored_bytes, self.total_bytes)
        assert self.filed_bytes <= self.to_file_bytes, (self.filed_bytes, self.to_file_bytes)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
