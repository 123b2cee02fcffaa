"""Kernels are compiled before they are measured: every call that is made for it can be made."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from flexbatch.calibrate.compiling import make, small_pass_calls
from flexbatch.calibrate.kernels import attention_call, cache_rows, calls_of_a_profile

CPU = torch.device("cpu")


def test_every_call_of_a_small_pass_can_be_made():
    for call in small_pass_calls(CPU):
        call()


def test_a_call_that_fails_stops_no_other():
    made = []
    for call in (lambda: made.append(1), lambda: 1 / 0, lambda: made.append(2)):
        make(call)
    assert made == [1, 2]


def test_all_that_a_gpu_measures_is_compiled(monkeypatch):
    """On a CPU the same calls run without a compiler; what needs a GPU's host memory is left out."""
    calls = []
    monkeypatch.setattr("flexbatch.calibrate.kernels.page_calls", lambda *sizes: calls.append(sizes) or {})
    monkeypatch.setattr("flexbatch.calibrate.kernels.CONTEXT", 64)
    monkeypatch.setattr("flexbatch.calibrate.kernels.HEAD_DIM", 16)
    found = calls_of_a_profile(CPU, torch.float32)
    assert len(found) > len(small_pass_calls(CPU)) + 6
    for call in found:
        call()
    assert calls == [(CPU, 4, 256)]


@pytest.mark.parametrize("bits", [16, 4])
def test_rows_of_a_cache_on_the_cpu_repeat_what_was_drawn(bits, monkeypatch):
    monkeypatch.setattr("flexbatch.calibrate.kernels.DRAWN_TOKENS", 48)
    rows = cache_rows(128, 2, torch.float32, CPU, bits)
    assert len(rows) == 128 and torch.equal(rows[48:96], rows[:48]) and torch.equal(rows[96:], rows[:32])
    assert len(rows[:48].flatten(1).unique(dim=0)) == 48
    assert attention_call(rows, 1, 32, (4, 2), torch.float32, bits)().isfinite().all()


def test_all_of_them_can_be_made_on_an_imagined_gpu():
    """In a process of its own, in which Triton does not interpret."""
    code = (
        "import torch; from flexbatch.calibrate import compiling; from flexbatch.kernels import imagined_gpu as gpu\n"
        "compiling.logger.debug = lambda *told: print(told)\n"
        "with gpu.imagined_gpu(gpu.GpuTraits(90, 132, 232448)) as found: compiling.launch_calls(torch.bfloat16)\n"
        "print(sorted({each.name for each in found}))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    names = ("copy", "dequantize", "gated", "norm", "quantize", "rotary", "store")
    kernels = [*(f"_{name}_kernel" for name in names), "attention_kernel", "decode_kernel"]
    assert told.stdout.splitlines() == [str(kernels)]
