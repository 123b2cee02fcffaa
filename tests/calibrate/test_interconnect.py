"""What is measured between GPUs, over Gloo, and what it is used for."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from flexbatch.calibrate import interconnect, machine, profile
from flexbatch.calibrate.interconnect import lacks_interconnect
from flexbatch.calibrate.machine import this_machine  # tests/conftest.py has all others find another one
from flexbatch.parallel.channel import open_store
from flexbatch.parallel.mesh import Mesh
from flexbatch.policy.curve import Curve
from flexbatch.policy.hardware import load_hardware, read_hardware
from flexbatch.policy.shared_host import OF_A_LINK, shared_by
from flexbatch.validation.errors import LostRankError

FOUND = {"interconnect": 3e11, "interconnect_seconds": 2e-5, "interconnect_send": 2e11}
FOUND |= {"links_together": Curve((1.0, 2.0), (1.0, 0.75)), "fit_error": {"interconnect": 0.1}}
HOST = "cpu_attention_together", "cpu_attention_together_during_h2d", "h2d_together_during_cpu_attention"
FOUND |= dict.fromkeys(HOST, Curve((1.0, 2.0), (1.0, 0.8)))


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_measure_together_and_find_the_same(size, monkeypatch):
    """In a thread each: two processes would spend ten seconds importing torch."""
    monkeypatch.setattr(interconnect, "SECONDS", 0.003)
    monkeypatch.setattr(interconnect, "SHORTER", 1024)
    first = Mesh(0, size, "127.0.0.1:0", 0, size, hosts_store=True)
    store = open_store(first)
    stores = [store, *(open_store(Mesh(k, size, f"127.0.0.1:{store.port}", k, size, False)) for k in range(1, size))]
    meshes = [dataclasses.replace(first, rank=k, local_rank=k, hosts_store=not k) for k in range(size)]
    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(interconnect.measured, meshes, stores, ["cpu"] * size))
    assert all(each == found[0] for each in found)
    together = found[0]["links_together"]
    assert together.points == tuple(map(float, range(1, size + 1))) and together.values[0] == 1.0
    hardware = dataclasses.replace(load_hardware("h200"), **found[0])
    assert min(hardware.interconnect, hardware.interconnect_send) > 0 <= hardware.interconnect_seconds
    assert 0 < hardware.tell_seconds < 1
    assert not lacks_interconnect(hardware, size) and lacks_interconnect(hardware, size + 1)
    assert lacks_interconnect(dataclasses.replace(hardware, cpu_attention_together=None), size), "an older profile"
    assert all(found[0][name].points == (1.0, size) and found[0][name].values[0] == 1.0 for name in HOST)


def test_links_that_slow_each_other_are_planned_with():
    whole = dataclasses.replace(load_hardware("h200"), links_together=Curve((1.0, 2.0, 4.0), (1.0, 0.9, 0.5)))
    assert shared_by(whole, 1) == whole
    for ranks, share in ((2, 0.9), (3, 0.7), (4, 0.5), (8, 0.5)):
        rank = shared_by(whole, ranks)
        assert all(getattr(rank, name) == pytest.approx(share * getattr(whole, name)) for name in OF_A_LINK)
        assert rank.host_bandwidth == pytest.approx(whole.host_bandwidth / ranks) and rank.gemm == whole.gemm
    assert shared_by(load_hardware("h200"), 4).h2d == load_hardware("h200").h2d, "where nobody has measured it"


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """A machine of two GPUs, whose first one has been measured; notes what is measured between them."""
    path, calls = tmp_path / "machine.json", []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "profile_path", lambda *_: path)
    known = load_hardware("h200")
    monkeypatch.setattr(machine, "of_one_gpu", lambda *_: read_hardware(path) if path.exists() else known)

    def measure(device, count, ranks=None):
        calls.append((device, count))
        return dict(FOUND)

    monkeypatch.setattr(interconnect, "measure_interconnect", measure)
    return path, calls


def test_what_is_between_gpus_is_measured_when_it_is_first_needed(two_gpus, tmp_path, monkeypatch):
    (path, calls), cuda = two_gpus, torch.device("cuda", 0)
    assert this_machine(cuda, tmp_path, tmp_path, gpus=1) == load_hardware("h200") and not calls
    assert this_machine(cuda, tmp_path, tmp_path, measure=False, gpus=2) == load_hardware("h200") and not calls
    found = this_machine(cuda, tmp_path, tmp_path, gpus=8)  # of which this process sees two
    assert calls == [("cuda", 2)] and found.links_together == FOUND["links_together"]
    assert found.source["interconnect"] == "measured on 2 GPUs of this host, a process each"
    assert found == this_machine(cuda, tmp_path, tmp_path, gpus=2) == read_hardware(path) and len(calls) == 1


def test_where_it_cannot_be_measured_a_line_says_so(two_gpus, tmp_path, monkeypatch, caplog):
    def lost(device, count, ranks=None):
        raise LostRankError("rank 1 ended with exit code 1")

    monkeypatch.setattr(interconnect, "measure_interconnect", lost)
    found = this_machine(torch.device("cuda", 0), tmp_path, tmp_path, gpus=2)
    assert found == load_hardware("h200") and "counts as the bus: rank 1 ended with exit code 1" in caplog.text


def test_a_profile_has_what_is_between_the_gpus_of_its_host(two_gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("flexbatch.calibrate.measure.measure", lambda *_: load_hardware("h200"))
    monkeypatch.setattr(profile, "check", lambda options: None)
    closed = []
    started = lambda *told: SimpleNamespace(close=lambda: closed.append(told))  # noqa: E731
    monkeypatch.setattr(interconnect, "WaitingRanks", started)
    for device, there in (("auto", True), ("cuda:1", False)):
        words = ["--output", str(tmp_path / "out.json"), "--device", device, "--kernels", "none"]
        assert profile.main(words) == 0
        written = json.loads((tmp_path / "out.json").read_text())
        assert bool(written["links_together"]) == there, device
    assert closed == [("cuda", 2)], "processes of the other GPUs, where there are any"


def test_ranks_wait_until_all_of_them_measure(monkeypatch):
    """Started while something else is measured; those that never get to measure end as well."""
    for measures in (True, False):
        ranks = interconnect.WaitingRanks("cpu", 2)
        (process,) = ranks.processes.processes
        try:
            if measures:
                assert ranks.measured()["interconnect"] > 0
        finally:
            ranks.close(measures)
            ranks.close()
        assert process.returncode == (0 if measures else -signal.SIGKILL) and not ranks.processes.lost


def test_a_profile_is_written_where_a_rank_has_gone_meanwhile(two_gpus, tmp_path, monkeypatch, capsys):
    """Everything else of it has been measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profile, "check", lambda options: None)
    monkeypatch.setattr(interconnect, "measure_interconnect", lambda kind, count, ranks: ranks.measured())
    ranks = interconnect.WaitingRanks("cpu", 2)
    monkeypatch.setattr(interconnect, "WaitingRanks", lambda *told: ranks)

    def measure(*told):
        (process,) = ranks.processes.processes
        process.kill()
        process.wait()
        until = time.monotonic() + 10
        while not ranks.processes.lost and time.monotonic() < until:
            time.sleep(0.01)
        return load_hardware("h200")

    monkeypatch.setattr("flexbatch.calibrate.measure.measure", measure)
    words = ["--output", str(tmp_path / "out.json"), "--device", "auto", "--kernels", "none"]
    assert profile.main(words) == 0 and read_hardware(tmp_path / "out.json") == load_hardware("h200")
    assert "counts as the bus: rank 1 was killed by SIGKILL" in capsys.readouterr().err
