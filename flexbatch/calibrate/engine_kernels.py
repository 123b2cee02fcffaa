"""What runs in the engine's own kernels, as `measure` has it: compiled first, while what measures them is imported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from flexbatch.calibrate.compiling import profile_kernels
from flexbatch.calibrate.phases import Phases
from flexbatch.execution.kernels_ahead import Compiled, compiled_ahead
from flexbatch.kernels import ops


class EngineKernels:
    """For `measure.measure`: the engine's own kernels, and what its Python costs."""

    def __init__(self, device: str) -> None:
        self.device = torch.empty(0, device=device).device  # with its number
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.made = Compiled()
        self.ahead = contextlib.ExitStack()
        self.native: Future[Any] | None = None
        self.pages: dict[str, float] = {}

    def begin(self) -> None:
        """Have kernels compiled from here on, those of the host, too, with a GPU: they would come in the middle of what
        is measured; and import what measures. Whoever does not go on to `compiled` exits ``ahead``."""
        if self.device.type == "cuda" and self.native is None:
            pool = self.ahead.enter_context(ThreadPoolExecutor(1, thread_name_prefix="flexbatch-profile"))
            self.ahead.enter_context(compiled_ahead(self.device, profile_kernels(self.dtype), self.note))
            self.native = pool.submit(ops.load_compiled)
        import flexbatch.calibrate.rates  # noqa: F401

    @contextlib.contextmanager
    def compiled(self, phases: Phases) -> Iterator[None]:
        with self.ahead:
            self.begin()
            yield
            if self.native is not None:
                from flexbatch.calibrate.kernels import page_rates

                # Waits for the link, as what came before; its few short kernels are compiled long before the last.
                with phases.of("pages over the link"):
                    self.pages = page_rates(self.device)
                with phases.of("the compilers", "waiting for"):
                    self.native.result()
                    self.ahead.close()

    def note(self, compiled: Compiled) -> None:
        self.made = compiled

    @property
    def text(self) -> str:
        """What the compilers did by the clock, beside what was measured meanwhile; empty where there was nothing."""
        made = self.made
        if not made.count:
            return ""
        return (
            f"{made.count} kernels compiled: imports {made.imports_seconds:.1f} s, listing {made.listing_seconds:.1f} "
            f"s, compiling {made.compiling_seconds:.1f} s; {made.processor_seconds:.1f} s of processors"
        )

    def rates(self, phases: Phases) -> dict[str, Any]:
        from flexbatch.calibrate.rates import kernel_rates

        return kernel_rates(self.device, self.dtype, phases) | self.pages
