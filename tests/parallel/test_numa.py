"""The cores near a GPU, on made-up machines; and a process that runs on them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexbatch.parallel.numa import cores_in, cores_near, nodes, pci_name, run_on, threads_near
from flexbatch.planner import loader
from flexbatch.trace import Tracer

TWO_SOCKETS = {0: "0-3,8-11", 1: "4-7,12-15"}


def machine(folder: Path, cpulists: dict[int, str], gpus: dict[str, str]) -> Path:
    for node, cores in cpulists.items():
        place = folder / f"devices/system/node/node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(f"{cores}\n")
    (folder / "devices/system/node/possible").write_text("0-7\n")
    for pci, node in gpus.items():
        place = folder / "bus/pci/devices" / pci
        place.mkdir(parents=True)
        (place / "numa_node").write_text(f"{node}\n")
    return folder


@pytest.mark.parametrize(
    ("cpulists", "node", "wanted"),
    [
        (TWO_SOCKETS, "1", {4, 5, 6, 7, 12, 13, 14, 15}),
        (TWO_SOCKETS, "0", {0, 1, 2, 3, 8, 9, 10, 11}),
        (TWO_SOCKETS, "-1", set()),  # a virtual machine that does not say
        (TWO_SOCKETS, "x", set()),
        (TWO_SOCKETS, "7", set()),
        ({0: "0-15"}, "0", set()),  # one node: nothing to choose
        ({0: "0-15", 1: ""}, "1", set()),  # a node of memory alone
        ({0: "0-1", 2: "2-3", 9: ""}, "2", {2, 3}),
        ({}, "0", set()),
    ],
)
def test_the_cores_of_the_node_of_a_gpu(cpulists, node, wanted, tmp_path):
    (tmp_path / "devices/system/node").mkdir(parents=True)
    made = machine(tmp_path, cpulists, {"0000:4b:00.0": node})
    assert cores_near(pci_name(0, 0x4B, 0), made) == wanted
    assert not cores_near(pci_name(0, 0x4C, 0), made), "no such device"


def test_lists_of_cores_and_names_of_devices(tmp_path):
    assert cores_in("0-2,5,7-8\n") == {0, 1, 2, 5, 7, 8} and not cores_in("\n")
    assert pci_name(1, 0xC1, 2) == "0001:c1:02.0"
    assert nodes(machine(tmp_path, TWO_SOCKETS, {})).keys() == {0, 1}
    assert not cores_near("0000:4b:00.0", tmp_path / "none")


def test_a_process_runs_on_those_cores_that_it_may_and_on_all_again():
    before = os.sched_getaffinity(0)
    some = {min(before)}
    undo = run_on({*some, 10_000})
    try:
        assert os.sched_getaffinity(0) == some
    finally:
        undo()
    assert os.sched_getaffinity(0) == before
    run_on({10_000})()
    assert os.sched_getaffinity(0) == before, "none of them is its own"


@pytest.mark.parametrize(
    ("near", "number", "wanted"),
    [
        ([range(16), range(16, 32)], 1, 16),  # a node each
        ([range(16), range(16)], 1, 8),  # one node for both: 16 each would be two threads a core
        ([range(16), range(16), range(16, 32)], 2, 12),  # no more than its share of the host
        ([range(4)] * 8, 0, 1),
    ],
)
def test_ranks_on_one_node_share_its_cores(near, number, wanted):
    found = [frozenset(each) for each in near]
    share = 12 if len(near) == 3 else 16
    assert threads_near(found, number, share) == wanted


def test_other_ranks_are_started_before_this_one_keeps_to_its_cores(monkeypatch, tmp_path):
    """What a process starts inherits its cores, and may run on no others."""
    called: list[str] = []

    def noted(name):
        def note(*_):
            called.append(name)
            return lambda: called.append(f"undone {name}")

        return note

    closing = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(loader, "TransferQueues", lambda *_: closing)
    monkeypatch.setattr(loader, "open_engines", lambda _: called.append("engines") or closing)
    monkeypatch.setattr(loader, "lead", lambda _: called.append("ranks") or closing)
    monkeypatch.setattr(loader.numa, "run_near", noted("cores"))
    config = SimpleNamespace(offload_path=None)
    of_rank = {"rank": 0, "local_ranks": 4, "offload_dir": tmp_path, "device": torch.device("cuda", 0)}
    deployment = SimpleNamespace(config=config, budgets={"gpu": 1, "cpu": 1, "disk": 1}, **of_rank)
    model = loader.PlacedModel(deployment, Tracer())  # type: ignore[arg-type]
    assert called == ["engines", "ranks", "cores"]
    model.close()
    assert called[3:] == ["undone cores"]
