"""What happens at first use and not in every pass: kernels are compiled or loaded, CUDA graphs recorded.

No plan prices it: it happens once on a machine, or in a process. So what can come before a job does (`load_kernels`),
and what comes up in its passes is counted apart (`SetUp`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from flexbatch.kernels import ops
from flexbatch.policy.policy import Policy
from flexbatch.policy.units import duration_text

T = TypeVar("T")

logger = logging.getLogger("flexbatch")

SAID_SECONDS = 0.5
"""From which on the log says what set-up took: loading what is there takes 10 to 30 ms."""


def load_kernels(device: torch.device, policy: Policy) -> None:
    """Have the CPU's kernels ready where a policy uses them; again this takes no time."""
    if device.type != "cpu" and not policy.cpu_attention and not policy.cpu_experts:
        return
    started = time.perf_counter()
    ops.load_compiled()
    seconds = time.perf_counter() - started
    if seconds > SAID_SECONDS:
        logger.info("compiled the CPU's kernels in %s; later starts find them", duration_text(seconds))


def _knobs() -> Any:
    """Triton's; None before version 3.4, which had none."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs


class SetUp:
    """Seconds of passes in which something was made that later ones find there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        """Since the last `take`."""
        self._making = False

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """The body is of this kind, whatever it compiles on the way."""
        started, self._making = time.perf_counter(), True
        try:
            yield
        finally:
            self._making = False
            self.seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """What Triton compiles in the body, or finds compiled on the disk, is of this kind."""
        knobs = _knobs() if self.device.type == "cuda" else None
        if knobs is None:
            yield
            return
        before, knobs.compilation.listener = knobs.compilation.listener, self.compiled
        try:
            yield
        finally:
            knobs.compilation.listener = before

    def heard(self, work: Callable[[], T]) -> T:
        """The result of ``work``, while it is listened to."""
        with self.listening():
            return work()

    def compiled(self, *, times: Any, **told: Any) -> None:
        """As a `triton.knobs.CompilationListener`."""
        if not self._making:
            self.seconds += getattr(times, "total", 0) / 1e6

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds
