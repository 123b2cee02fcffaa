"""Fits, the hardware's JSON, and a real profile of the machine that runs the tests."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.calibrate import cache, measure
from flexbatch.calibrate.fits import fit_curve, fit_rate, mean_rate
from flexbatch.calibrate.links import Timer
from flexbatch.calibrate.phases import Phases, process_age
from flexbatch.policy.curve import Curve
from flexbatch.policy.hardware import Hardware, load_hardware


@settings(deadline=None)
@given(rate=st.floats(1e6, 1e12), fixed=st.floats(0, 1e-2), noise=st.floats(-0.02, 0.02))
def test_rate_and_fixed_cost_are_found(rate, fixed, noise):
    amounts = [rate * 1e-3 * 4**i for i in range(5)]
    seconds = [(a / rate + fixed) * (1 + noise * (-1) ** i) for i, a in enumerate(amounts)]
    fit = fit_rate(amounts, seconds)
    assert fit.rate == pytest.approx(rate, rel=0.15)
    assert fit.fixed_seconds == pytest.approx(fixed, rel=0.15, abs=2e-4)
    assert fit.error <= abs(noise) + 1e-6


def test_a_busy_machine_does_not_invent_a_rate():
    fit = fit_rate([1e6, 4e6, 16e6], [0.024, 0.024, 0.0239])
    assert fit.rate == pytest.approx(16e6 / 0.0239)
    assert fit.error > 0.5


def test_fit_refuses_what_it_cannot_fit():
    with pytest.raises(ValueError, match="at least two"):
        fit_rate([1.0], [1.0])


def test_the_rate_of_a_disk_is_that_of_all_readings() -> None:
    """Whatever the blocks: one that is read twice as fast as another counts by the time it took."""
    rate, error = mean_rate([8e6, 4e6, 1e6], [8e-3, 4e-3, 1e-3])
    assert rate == pytest.approx(1e9) and error == pytest.approx(0.0, abs=1e-12)
    rate, error = mean_rate([8e6, 1e6], [4e-3, 1e-3])
    assert rate == pytest.approx(2e9 / 1.5) and error == pytest.approx(1 / 3)


@given(st.lists(st.floats(1e9, 1e12), min_size=1, max_size=8))
def test_curve_does_not_fall(values):
    curve, error = fit_curve(range(1, len(values) + 1), values)
    assert np.all(np.diff(curve.values) >= -1e-3)
    if list(values) == sorted(values):
        assert curve.values == pytest.approx(values) and error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["t4", "h200", "cpu"])
def test_shipped_hardware_comes_back_from_json(name):
    hardware = load_hardware(name)
    assert Hardware.from_json(hardware.to_json()) == hardware
    assert hardware.source


def test_json_errors_name_the_field(tmp_path):
    data = json.loads(load_hardware("t4").to_json())
    with pytest.raises(ValueError, match="h2d"):
        Hardware.from_json(json.dumps({k: v for k, v in data.items() if k != "h2d"}))
    with pytest.raises(ValueError, match="warp"):
        Hardware.from_json(json.dumps({**data, "warp": 9}))
    with pytest.raises(ValueError, match="disk_read=0"):
        Hardware.from_json(json.dumps({**data, "disk_read": 0.0}))
    with pytest.raises(FileNotFoundError, match="h200"):
        load_hardware(tmp_path / "none.json")


def test_curves_are_checked():
    with pytest.raises(ValueError, match="increasing"):
        Curve((2.0, 1.0), (1.0, 1.0))


def test_the_seconds_of_all_parts_are_those_since_the_beginning():
    clock, said = iter([10.0, 13.0, 13.5, 13.5, 15.5, 16.0, 16.0, 17.0, 17.25]), []
    phases = Phases(said.append, lambda: next(clock), earlier_seconds=2.0)
    phases.passed("starting")
    with phases.of("links"):
        pass
    with phases.of("the compilers", "waiting for"):
        pass
    assert said == [
        "measuring links (starting 5.0 s, 5.5 s so far)",
        "waiting for the compilers (links 2.0 s, 8.0 s so far)",
    ]
    assert phases.text == "starting 5.0 s, links 2.0 s, the compilers 1.0 s, between these 1.2 s; 9.2 s in all"


def test_a_process_knows_since_when_it_runs():
    """To a hundredth of a second; what its parent has waited for it, at the most."""
    code = "from flexbatch.calibrate.phases import process_age; print(process_age())"
    started = time.monotonic()
    told = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0 < told < time.monotonic() - started + 0.02 and process_age() > told


@pytest.mark.parametrize("seconds, runs", [((5, 1, 1, 1, 1, 9), 5), ((5, 1, 2, 1, 3, 1, 4, 1, 9), 8)])
def test_a_timer_stops_when_its_fastest_runs_agree(seconds, runs, monkeypatch):
    """The warm-up does not count; on a machine where nothing agrees the time is up at some time."""
    timer, told = Timer(torch.device("cpu"), 60.0), []
    left = iter(seconds)
    monkeypatch.setattr(timer, "_once", lambda work, calls=1: told.append(next(left)) or told[-1])
    assert timer(lambda: None) == 1 and len(told) == runs
    timer, told = Timer(torch.device("cpu"), 0.0), []
    left = iter(range(9, 0, -1))
    monkeypatch.setattr(timer, "_once", lambda work, calls=1: told.append(next(left)) or told[-1])
    assert timer(lambda: None) == 7 and len(told) == 3


def test_what_was_there_before_is_left_out_of_collections_while_a_machine_is_measured(tmp_path, monkeypatch):
    """As in jobs, and no longer, whatever becomes of it."""
    frozen = []

    def links(*told):
        frozen.append(gc.get_freeze_count())
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_links", links)
    gc.unfreeze()
    try:
        with pytest.raises(KeyboardInterrupt):
            measure.measure("cpu", tmp_path)
        assert frozen[0] > 10_000 and not gc.get_freeze_count()
    finally:
        gc.freeze()


def test_this_machine_is_measured_and_cached(tmp_path, monkeypatch):
    """The whole profile on the CPU, then from the cache without measuring again."""
    pytest.importorskip("torch")
    # Of the processor: how long others make it wait says nothing.
    start = time.process_time()
    phases = Phases(say=lambda line: None)
    hardware = cache.cached(tmp_path / "cache", "cpu", tmp_path, phases=phases)
    elapsed = time.process_time() - start
    assert hardware.device == "cpu" and "in all" in hardware.source["took"]
    assert list(phases.seconds) == ["links and products", "the host's memory", "stand-ins for kernels", "the disk"]
    assert 0 <= phases.total - sum(phases.seconds.values()) < 1 + 0.1 * phases.total, "the lines are all that it took"
    # A disk that is busy gives one block size in its time, and nothing to fit.
    assert (
        {"h2d", "d2h", "gemm", "cpu_attention"}
        <= set(hardware.fit_error)
        <= {"h2d", "d2h", "gemm", "cpu_attention", "disk_read", "disk_write"}
    )
    assert hardware.cpu_attention_during_h2d <= hardware.cpu_attention.values[0]
    # The promise is 20 seconds on an idle machine; tests share theirs.
    assert elapsed < 60
    assert not list(tmp_path.glob("profile-*"))
    monkeypatch.setattr(cache, "measure", lambda *_: pytest.fail("measured again"))
    again = cache.cached(tmp_path / "cache", "cpu", tmp_path)
    assert again.with_memory(1, 1, 1) == hardware.with_memory(1, 1, 1)
