"""Kernels are compiled beside what does not need them, and waited for once; a profile's lines say so."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys

import pytest
import torch

from flexbatch.calibrate import engine_kernels
from flexbatch.calibrate.engine_kernels import EngineKernels
from flexbatch.calibrate.phases import Phases
from flexbatch.execution.kernels_ahead import Compiled

PAGES = {"gather": 5e10, "scatter": 5e10, "expand": 1e12}


@pytest.fixture
def events(monkeypatch):
    """Of a machine with a GPU, in their order."""
    events = []

    @contextlib.contextmanager
    def ahead(device, announced, note):
        events.append("compilers begin")
        yield
        events.append("compilers end")
        note(Compiled(17, 0.5, 12.0, "", 2.5, 1.0, 3.0))

    monkeypatch.setattr(engine_kernels, "compiled_ahead", ahead)
    monkeypatch.setattr(engine_kernels.ops, "load_compiled", lambda: events.append("C"))
    monkeypatch.setattr("flexbatch.calibrate.kernels.page_rates", lambda device: events.append("pages") or PAGES)
    monkeypatch.setattr("flexbatch.calibrate.rates.kernel_rates", lambda *told: {"attention_decode": 2e12})
    return events


def test_kernels_are_compiled_beside_what_is_measured_without_them(events):
    engine = EngineKernels("cpu")
    engine.device = torch.device("cuda", 0)
    phases = Phases(events.append)
    with engine.compiled(phases), phases.of("links"):
        pass
    assert events[0] == "compilers begin" and events[-1] == "compilers end"
    assert [line.split(" (")[0] for line in events if " (" in line] == [
        *("measuring links", "measuring pages over the link", "waiting for the compilers")
    ]
    assert events.count("pages") == 1, "before the compilers are waited for"
    assert engine.rates(phases) == {"attention_decode": 2e12, **PAGES} and events.count("pages") == 1
    assert events.count("C") == 1 and events.index("C") < len(events) - 1
    told = "17 kernels compiled: imports 2.5 s, listing 1.0 s, compiling 3.0 s; 12.0 s of processors"
    assert engine.text == told


def test_compilers_begin_once_where_they_begin_before_what_measures_is_there(events):
    engine = EngineKernels("cpu")
    engine.device = torch.device("cuda", 0)
    engine.begin()
    assert events[0] == "compilers begin"
    with engine.compiled(Phases(events.append)):
        assert events.count("compilers begin") == 1 and "compilers end" not in events
    assert events.count("compilers end") == events.count("C") == 1
    engine = EngineKernels("cpu")
    engine.device = torch.device("cuda", 0)
    with pytest.raises(KeyboardInterrupt), contextlib.ExitStack() as stack:
        stack.push(engine.ahead)
        engine.begin()
        raise KeyboardInterrupt
    assert events.count("compilers begin") == 2 and events.count("compilers end") == 1, "nor is one waited for"


def test_what_breaks_off_waits_for_no_compiler(events):
    engine = EngineKernels("cpu")
    engine.device = torch.device("cuda", 0)
    with pytest.raises(KeyboardInterrupt), engine.compiled(Phases(events.append)):
        raise KeyboardInterrupt
    assert not {"compilers end", "pages"} & {*events} and "waiting" not in " ".join(events)


def test_without_a_gpu_nothing_is_compiled_before(events):
    engine = EngineKernels("cpu")
    with engine.compiled(Phases()):
        pass
    assert not events and not engine.text
    assert engine.rates(Phases()) == {"attention_decode": 2e12}


@pytest.mark.gpu
@pytest.mark.alone
def test_lines_of_a_profile_are_all_that_it_took(tmp_path, monkeypatch):
    """Of a machine that has compiled nothing. Run with -s this shows them: they are what the profile's time goes to."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["profile", "-o", str(tmp_path / "hardware.json"), "--device", "cuda:0", "--offload-dir", str(tmp_path)]
    told = subprocess.run(
        [sys.executable, "-m", "flexbatch", *words], stderr=subprocess.PIPE, text=True, check=True
    ).stderr
    print(told)
    (total,) = re.findall(r"measured, ([\d.]+) s in all", told)
    (line,) = [line for line in told.splitlines() if line.strip().startswith("starting ") and ", " in line]
    parts = dict(re.findall(r"(\w[^,]*?) ([\d.]+) s(?:,|$)", line))
    assert abs(sum(map(float, parts.values())) - float(total)) < 1 and float(parts["between these"]) < 1
    assert {"links and products", "the compilers", "passes of small models", "layers in graphs and in pieces"} < {
        *parts
    }
    assert re.search(r"[1-9][0-9] kernels compiled: imports [\d.]+ s", told)
