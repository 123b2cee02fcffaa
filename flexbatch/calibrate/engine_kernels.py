"""What runs in the engine's own kernels, as `measure` has it: compiled first, and then measured part by part."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from flexbatch.calibrate.coded import coded_curves
from flexbatch.calibrate.compiling import profile_kernels
from flexbatch.calibrate.experts import expert_curves
from flexbatch.calibrate.host import ALONE, host_rates
from flexbatch.calibrate.kernels import attention_rates, cpu_attention_rates, page_rates
from flexbatch.calibrate.phases import Phases
from flexbatch.execution.kernels_ahead import Compiled, compiled_ahead
from flexbatch.kernels import native, ops
from flexbatch.policy.curve import Curve


class EngineKernels:
    """For `measure.measure`: the engine's own kernels, and what its Python costs."""

    def __init__(self, device: str) -> None:
        self.device = torch.empty(0, device=device).device  # with its number
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.made = Compiled()

    @contextlib.contextmanager
    def compiled(self, phases: Phases) -> Iterator[None]:
        """Those of the host, too, with a GPU: they would come in the middle of what is measured."""
        if self.device.type != "cuda":
            yield
            return
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="flexbatch-profile"))
            stack.enter_context(compiled_ahead(self.device, profile_kernels(self.dtype), self.note))
            native_kernels = pool.submit(ops.load_compiled)
            yield
            with phases.of("the compilers", "waiting for"):
                native_kernels.result()
                stack.close()

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
        return kernel_rates(self.device, self.dtype, phases)


def kernel_rates(dev: torch.device, dtype: torch.dtype, phases: Phases) -> dict[str, Any]:
    """Fields of `policy.hardware.Hardware`. What is not compiled by now is where it is launched."""
    with torch.no_grad():
        with phases.of("attention"):
            rates = attention_rates(dev, dtype)
        if dev.type == "cuda":
            with phases.of("pages over the link"):
                rates |= page_rates(dev)
        with phases.of("attention on the CPU"):
            rates |= cpu_attention_rates(dev, dtype)
        rates |= host_rates(dev, phases)
        if dev.type == "cpu":
            with phases.of("products with quantized weights"):
                rates |= coded_curves(dtype)
        if native.library() is not None:
            with phases.of("experts on the CPU"):
                rates |= expert_curves(dev, dtype)
        # As in passes of the engine, where less of the machine is left to attention than beside nothing.
        share = min(1.0, rates.pop(ALONE, math.inf) / rates["cpu_attention"].values[0])
        for name in ("cpu_attention", "cpu_attention_8", "cpu_attention_4"):
            rates[name] = Curve(rates[name].points, tuple(share * rate for rate in rates[name].values))
        rates["cpu_attention_during_h2d"] = min(rates["cpu_attention_during_h2d"], rates["cpu_attention"].values[0])
        return rates
