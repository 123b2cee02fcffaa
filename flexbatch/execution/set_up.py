"""What happens at first use and not in every pass: kernels are compiled or loaded, CUDA graphs recorded.

No plan prices it: it happens once on a machine, or in a process. So what can come before a job does (`load_kernels`),
and what comes up in its passes is counted apart (`SetUp`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


COMPILED, LOADED, DECODE_GRAPHS, PIECE_GRAPHS, COMPARISONS = (
    *("compiled_kernels", "loaded_kernels", "decode_graphs", "piece_graphs", "plan_comparisons"),
)
"""Kinds of set-up: kernels that Triton compiled, or found compiled on the disk; graphs that were recorded, of whole
decode passes and of the pieces between two attentions; and how often a plan was compared with the lengths of answers,
which may end with another block."""


@dataclass(frozen=True)
class Made:
    """How often something was made, and the seconds that it took."""

    count: int = 0
    seconds: float = 0.0

    def __add__(self, other: Made) -> Made:
        return Made(self.count + other.count, self.seconds + other.seconds)


def variant_of(src: Any) -> str:
    """The name of a kernel of Triton, with the constants and the multiples of 16 that it is compiled for."""
    names: list[str] = list(getattr(getattr(src, "fn", None), "arg_names", ()))
    if not names:
        return str(getattr(src, "name", "a kernel"))
    constants = (f"{names[at]}={value}" for (at, *_), value in sorted(src.constants.items()))
    multiples = (names[at] for (at, *_), found in sorted(src.attrs.items()) if found)
    kinds = ", ".join(f"{name}: {kind}" for name, kind in src.signature.items() if kind != "constexpr")
    return f"{src.name}[{', '.join(constants)}]({kinds}; multiples of 16: {', '.join(multiples)})"


class SetUp:
    """Seconds of passes in which something was made that later ones find there, by kind."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made: dict[str, Made] = {}
        """Since the last `take`."""
        self.variants: list[str] = []
        """Kernels that were compiled since the last `take_variants`."""

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.made.values())

    def add(self, kind: str, seconds: float) -> None:
        self.made[kind] = self.made.get(kind, Made()) + Made(1, max(0.0, seconds))

    @contextlib.contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """The body makes one of a kind. What it makes on the way, as a graph's first run compiles kernels, is counted
        as what that is, and once."""
        started, before = time.perf_counter(), self.seconds
        try:
            yield
        finally:
            self.add(kind, time.perf_counter() - started - (self.seconds - before))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """What Triton compiles in the body, or finds compiled on the disk, is counted."""
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

    def compiled(self, *, times: Any, cache_hit: bool = False, src: Any = None, **told: Any) -> None:
        """As a `triton.knobs.CompilationListener`."""
        seconds = getattr(times, "total", 0) / 1e6
        self.add(LOADED if cache_hit else COMPILED, seconds)
        if not cache_hit:
            self.variants.append(variant_of(src))
            logger.info("compiled %s in the middle of a job: %s", self.variants[-1], duration_text(seconds))

    def take(self) -> dict[str, Made]:
        made, self.made = self.made, {}
        return made

    def take_variants(self) -> list[str]:
        variants, self.variants = self.variants, []
        return variants
