"""What runs in the engine's own kernels, measured part by part."""

from __future__ import annotations

import math
from typing import Any

import torch

from flexbatch.calibrate.coded import coded_curves
from flexbatch.calibrate.experts import expert_curves
from flexbatch.calibrate.host import ALONE, host_rates
from flexbatch.calibrate.kernels import attention_rates, cpu_attention_rates
from flexbatch.calibrate.phases import Phases
from flexbatch.kernels import native
from flexbatch.policy.curve import Curve


def kernel_rates(dev: torch.device, dtype: torch.dtype, phases: Phases) -> dict[str, Any]:
    """Fields of `policy.hardware.Hardware`. What is not compiled by now is where it is launched."""
    with torch.no_grad():
        with phases.of("attention"):
            rates = attention_rates(dev, dtype)
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
