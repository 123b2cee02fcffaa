"""Settings are planned, and their kernels compiled, before they run: what a run announces, and each kernel once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmark import plans_ahead
from benchmark.observed import open_engine
from benchmark.policy_settings import Setting
from flexbatch.execution.kernels_ahead import compiled_ahead, marker_of
from flexbatch.kernels.imagined_gpu import GpuTraits
from flexbatch.models.shapes import SHAPES
from flexbatch.planner.loader import planned_kernels
from tests.execution.test_kernels_ahead import GPU, TRAITS, norms
from tests.policy.test_policy_runs import SMALL, TINY

pytest.importorskip("triton")


@pytest.fixture
def begun(tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("bits", [16, 4])
def test_a_run_announces_what_was_compiled_for_its_plan(monkeypatch, bits):
    """Also where its share of the cache or of the weights is elsewhere."""
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["opt-125m"] | SMALL)
    for percent in ([100, 0, 100, 0, 100, 0], [40, 60, 0, 100, 100, 0]):
        bit_sizes = {"weight_bits": bits, "cache_bits": bits}
        setting = dataclasses.replace(TINY, memory=(0.01, 0.01), fixed=TINY.fixed | bit_sizes)
        plan = plans_ahead.chosen_here(setting, "cpu")
        fixed = plans_ahead.settings_in(plan) | {"percent": percent}
        with open_engine(setting, "cpu", fixed) as llm:
            ran = planned_kernels(llm.engine_plan)
        assert str(plans_ahead.announced_by(setting, "cpu", fixed)) == str(ran)


def test_kernels_are_compiled_by_who_begins_first(monkeypatch, begun):
    compiled = []
    monkeypatch.setattr(plans_ahead.Launch, "compile", lambda self: compiled.append(self.name) or 1 / 0)
    monkeypatch.setattr(plans_ahead.DriverOfTriton, "compile", lambda self: compiled.append("driver"))
    code = f"""
from pathlib import Path
from benchmark import plans_ahead
from tests.execution.test_kernels_ahead import TRAITS, norms
plans_ahead.Launch.compile = plans_ahead.DriverOfTriton.compile = lambda self: None
kernels = plans_ahead.Announced(norms, (512, 1024))
print(plans_ahead.compile_not_begun(kernels, TRAITS, Path({str(begun)!r})))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
    assert int(told.stdout) == 3, "two kernels and the driver"
    again = code.replace("(512, 1024)", "(512, 1024, 2048)")
    told = subprocess.run([sys.executable, "-c", again], env=environment, stdout=subprocess.PIPE, check=True)
    assert int(told.stdout) == 1, "the others were begun"
    assert len(list(begun.iterdir())) == 4 and not compiled


@pytest.mark.slow
def test_runs_of_plans_compile_nothing(monkeypatch, tmp_path, capfd):
    """Two settings of one model: what both need is compiled once, and neither starts a compiler."""
    cache = tmp_path / "cache"
    for name, value in (("TRITON_CACHE_DIR", str(cache)), ("TRITON_INTERPRET", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(cache))
    monkeypatch.setattr(GpuTraits, "of", classmethod(lambda cls, device: TRAITS))
    monkeypatch.setattr(plans_ahead, "gpu_traits", lambda: TRAITS)
    settings = {
        "short": Setting("opt-125m", (2, 2), 7, (16, 32), (4, 4)),
        "long": Setting("opt-125m", (2, 2), 29, (16, 32), (8, 8)),
    }
    plans = tmp_path / "plans.json"
    assert plans_ahead.write_plans(plans, settings, "h100", 2) == 0
    assert "kernels compiled in 2 processes" in capfd.readouterr().err
    made = len(list(cache.rglob("*.cubin")))
    assert made > 5 and len(list(cache.glob("flexbatch-compiled-*"))) in (1, 2)
    for name, plan in json.loads(plans.read_text()).items():
        announced = plans_ahead.announced_by(settings[name], "h100", plans_ahead.settings_in(plan))
        with compiled_ahead(GPU, announced, lambda compiled: pytest.fail(f"compiled {compiled}")):
            pass
    assert len(list(cache.rglob("*.cubin"))) == made


def test_a_process_that_is_ended_leaves_no_plan_marked(monkeypatch, tmp_path):
    """What it had begun nobody compiles: runs look for themselves."""
    marked = []

    class Future:
        def __init__(self, error=None):
            self.error = error

        def result(self):
            if self.error:
                raise self.error
            plan = dict.fromkeys(plans_ahead.NOT_SETTINGS, 1.0)
            return plans_ahead.PlanAhead(plan, plans_ahead.Announced(norms, (512,)), 1)

    left: list[Exception | None] = []

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, *_):
            return Future(left.pop())

    monkeypatch.setattr(plans_ahead, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(plans_ahead, "as_completed", list)
    monkeypatch.setattr(plans_ahead, "gpu_traits", lambda: TRAITS)
    monkeypatch.setattr(plans_ahead, "mark", lambda compiled: marked.extend(compiled))
    for errors, count in (([None, None], 2), ([None, ValueError("does not fit")], 1), ([None, BROKEN], 0)):
        left[:] = errors
        marked.clear()
        refused = plans_ahead.write_plans(tmp_path / "plans.json", {"one": TINY, "two": TINY}, "h100", 2)
        assert len(marked) == count and refused == sum(error is not None for error in errors)


BROKEN = plans_ahead.BrokenExecutor("a process was ended")


def test_what_is_marked_is_where_runs_look(monkeypatch, tmp_path):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(GpuTraits, "of", classmethod(lambda cls, device: TRAITS))
    kernels = plans_ahead.Announced(norms, (512,))
    marker = marker_of(torch.device("cuda", 0), kernels)
    assert marker is not None and not marker.exists()
    plans_ahead.mark([kernels])
    assert marker.exists()
