"""Kernels are compiled before they are measured: every call that is made for it can be made."""

from __future__ import annotations

import threading

import pytest
import torch

from flexbatch.calibrate import compiling
from flexbatch.calibrate.compiling import compile_ahead, small_pass_calls
from flexbatch.calibrate.kernels import attention_call, cache_rows, compile_kernels

CPU = torch.device("cpu")


def test_every_call_of_a_small_pass_can_be_made():
    for call in small_pass_calls(CPU):
        call()


def test_calls_are_made_once_each_and_one_that_fails_stops_no_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    made, lock = [], threading.Lock()

    def call_of(number):
        def call():
            with lock:
                made.append(number)
            if number in (0, 3):
                raise RuntimeError("no compiler")

        return call

    compile_ahead([call_of(number) for number in range(9)], CPU)
    assert sorted(made) == list(range(9)) and made[0] == 0


def test_all_that_a_gpu_measures_is_compiled(monkeypatch):
    """On a CPU the same calls run without a compiler; what needs a GPU's host memory is left out."""
    calls = []
    monkeypatch.setattr("flexbatch.calibrate.kernels.compile_ahead", lambda found, device: calls.extend(found))
    monkeypatch.setattr("flexbatch.calibrate.kernels.page_rates", lambda *sizes: calls.append(sizes))
    monkeypatch.setattr("flexbatch.calibrate.kernels.CONTEXT", 64)
    monkeypatch.setattr("flexbatch.calibrate.kernels.HEAD_DIM", 16)
    compile_kernels(CPU, torch.float32)
    assert len(calls) > len(small_pass_calls(CPU)) + 6
    for call in list(calls):
        call()
    assert (CPU, 4, 256) in calls


@pytest.mark.parametrize("bits", [16, 4])
def test_rows_of_a_cache_on_the_cpu_repeat_what_was_drawn(bits, monkeypatch):
    monkeypatch.setattr("flexbatch.calibrate.kernels.DRAWN_TOKENS", 48)
    rows = cache_rows(128, 2, torch.float32, CPU, bits)
    assert len(rows) == 128 and torch.equal(rows[48:96], rows[:48]) and torch.equal(rows[96:], rows[:32])
    assert len(rows[:48].flatten(1).unique(dim=0)) == 48
    assert attention_call(rows, 1, 32, (4, 2), torch.float32, bits)().isfinite().all()


@pytest.mark.gpu
def test_a_gpu_compiles_all_of_them(monkeypatch):
    failed = []
    monkeypatch.setattr(compiling.logger, "debug", lambda *told: failed.append(told))
    compile_kernels(torch.device("cuda", 0), torch.bfloat16)
    assert not failed, failed
