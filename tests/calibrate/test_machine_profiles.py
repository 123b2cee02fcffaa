"""Profiles that cannot be used: the machine's own is measured again, a named one is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.calibrate import machine
from flexbatch.calibrate.cache import cache_path, cached
from flexbatch.calibrate.machine import known_machine, this_machine
from flexbatch.calibrate.phases import Phases
from flexbatch.calibrate.profile_file import write_hardware
from flexbatch.policy.hardware import Hardware, load_hardware
from flexbatch.validation.devices import named_machine
from flexbatch.validation.errors import ConfigurationError

GOOD = json.loads(load_hardware("cpu").to_json())
CURVE = {"points": [1, 4], "values": [1e9, 2e9]}
BAD = {
    "nothing": "",
    "half": json.dumps(GOOD)[: len(json.dumps(GOOD)) // 2],
    "zeros": "\0" * 4096,
    "no text": b"\xff\xfe\x00",
    "a list": "[1, 2]",
    "a number": "7",
    "null": "null",
    "deep": "[" * 100_000,
    "an older version": json.dumps({key: value for key, value in GOOD.items() if key != "gather"}),
    # Python's float() and isfinite() raise OverflowError for it.
    "an integer that no float holds": json.dumps({**GOOD, "h2d": 10**400}),
    "bytes that no float holds": json.dumps({**GOOD, "disk_bytes": -(10**400)}),
    "a newer version": json.dumps({**GOOD, "warp_drive": 9}),
    **{
        f"{name}={value}": json.dumps({**GOOD, name: value})
        for name in ("h2d", "gpu_memory_bytes")
        for value in (float("nan"), float("inf"), -1, "9", None, True, [1])
    },
    "no rate": json.dumps({**GOOD, "disk_read": 0}),
    "negative cost": json.dumps({**GOOD, "pass_seconds": -1e-6}),
    "infinite cost": json.dumps({**GOOD, "pass_seconds": float("inf")}),
    **{
        f"curve {number}": json.dumps({**GOOD, "gemm": {**CURVE, **change}})
        for number, change in enumerate(
            (
                {"values": [1e9, float("nan")]},
                {"values": [1e9]},
                {"values": [1e9, -1]},
                {"points": [4, 1]},
                {"points": []},
                {"points": None},
                {"values": ["a", 1]},
            )
        )
    },
    "no curve": json.dumps({**GOOD, "gemm": 1e9}),
    "device": json.dumps({**GOOD, "device": "abacus"}),
    "name": json.dumps({**GOOD, "name": 5}),
}


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements, which take a moment and not seconds."""
    calls = []

    def measure(device, disk_folder, engine=None, phases=None):
        calls.append(device)
        with (phases or Phases()).of("the disk"):
            pass
        return load_hardware("cpu")

    monkeypatch.setattr("flexbatch.calibrate.machine.known_machine", known_machine)  # all others know none
    monkeypatch.setattr("flexbatch.calibrate.cache.measure", measure)
    monkeypatch.setattr("flexbatch.calibrate.rates.kernel_rates", lambda *told: {})
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    return calls


def profile(folder, text):
    path = cache_path(folder, "cpu", folder)
    path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
    return path


@pytest.mark.parametrize("kind", BAD)
def test_a_profile_that_cannot_be_used_is_measured_again_with_a_line(kind, tmp_path, measured, caplog):
    caplog.set_level(logging.INFO, "flexbatch")
    path = profile(tmp_path, BAD[kind])
    assert this_machine(torch.device("cpu"), tmp_path, tmp_path) == load_hardware("cpu")
    assert len(measured) == 1 and f"the profile of this machine, {path}, cannot be used and is made anew" in caplog.text
    assert this_machine(torch.device("cpu"), tmp_path, tmp_path) == load_hardware("cpu")
    assert len(measured) == 1, "and then read"
    profile(tmp_path, BAD[kind])
    cached(tmp_path, "cpu", tmp_path)
    assert len(measured) == 2
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no temporary files stay"


@pytest.mark.parametrize("kind", ["half", "an older version", "h2d=nan", "no rate"])
def test_where_nothing_is_measured_a_shipped_machine_serves(kind, tmp_path, measured, caplog):
    profile(tmp_path, BAD[kind])
    assert this_machine(torch.device("cpu"), tmp_path, tmp_path, measure=False) == load_hardware("cpu")
    assert not measured and "cannot be used" in caplog.text and "planned with the shipped cpu.json" in caplog.text


@pytest.mark.parametrize("kind", BAD)
def test_a_named_profile_that_cannot_be_used_is_refused_by_its_name(kind, tmp_path):
    path = profile(tmp_path, BAD[kind])
    with pytest.raises(ConfigurationError, match=f"--hardware {path}: "):
        named_machine(str(path))


def test_errors_name_the_field():
    for change, message in (
        ({"h2d": float("nan")}, "h2d=nan must be a finite, positive number"),
        ({"gemm": {"points": [1], "values": [0]}}, "gemm: a curve"),
    ):
        with pytest.raises(ValueError, match=message):
            Hardware.from_json(json.dumps({**GOOD, **change}))


def test_a_profile_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "machine.json"
    write_hardware(load_hardware("cpu"), path)
    before = path.read_text()
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_hardware(load_hardware("t4"), path)
    assert path.read_text() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_profiles_lie_in_an_absolute_folder():
    assert machine.default_profile_dir().is_absolute()


def test_a_profile_that_cannot_be_kept_is_used_all_the_same(tmp_path, measured, caplog):
    folder = tmp_path / "cache"
    folder.write_text("a file where the folder should be")
    assert cached(folder, "cpu", tmp_path) == load_hardware("cpu") and len(measured) == 1
    assert "cannot be kept" in caplog.text


def test_a_start_on_a_known_machine_measures_nothing(tmp_path, measured, monkeypatch):
    """Neither the machine as a whole nor a part of it, whoever of a run asks for its rates."""
    monkeypatch.setattr("flexbatch.calibrate.machine.this_machine", this_machine)  # others are told of one
    monkeypatch.setattr("flexbatch.calibrate.machine.default_profile_dir", lambda: tmp_path)
    profile(tmp_path, load_hardware("cpu").to_json())

    def refused(*arguments, **options):
        raise AssertionError("something is measured")

    for name in (
        "rates.kernel_rates",
        "engine_kernels.EngineKernels.compiled",
        "cache.measure",
        "measure.begin_disk",
        "measure.measure_disk",
        "host.host_rates",
    ):
        monkeypatch.setattr(f"flexbatch.calibrate.{name}", refused)
    with LLM("demo", device="cpu", gpu_memory="64MiB", cpu_memory="64MiB", offload_dir=str(tmp_path)) as llm:
        llm.generate([{"prompt_token_ids": [7, 8]}], SamplingParams(max_tokens=2))
        assert llm.planner.hardware.h2d == load_hardware("cpu").h2d
    assert not measured


def test_what_is_measured_is_said_while_it_is(tmp_path, measured, caplog):
    caplog.set_level(logging.INFO, "flexbatch")
    this_machine(torch.device("cpu"), tmp_path, tmp_path)
    said = [message for message in caplog.messages if "measur" in message]
    assert said[0].startswith("measuring this machine's links, processors and disk once, about 10")
    assert said[1] == "measuring the disk (0.0 s so far)"
    assert "(the disk 0.0 s, between these 0.0 s; 0.0 s in all)" in said[2]
    caplog.clear()
    this_machine(torch.device("cpu"), tmp_path, tmp_path)
    assert not [message for message in caplog.messages if "measur" in message], "a known machine"
