"""Ranks that wait for others: who does not come is named, in the log and in the error, and a signal ends the wait."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import PrefixStore

from flexbatch.parallel import meeting
from flexbatch.parallel.channel import gloo_group, open_store
from flexbatch.parallel.links import link_to_rank_0
from flexbatch.parallel.meeting import wait_for_members, wait_for_store
from flexbatch.parallel.mesh import Mesh
from flexbatch.validation.errors import LostRankError


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def mesh_of(rank: int, size: int, port: int = 0) -> Mesh:
    return Mesh(rank, size, f"127.0.0.1:{port}", rank, size, hosts_store=rank == 0)


@pytest.mark.parametrize(("there", "named"), [((1,), "rank 2 of 3"), ((), "ranks 1, 2 of 3")])
def test_members_that_do_not_come_are_named(there, named):
    store = open_store(mesh_of(0, 3))
    for rank in there:
        with pytest.raises(LostRankError):
            wait_for_members(store, "control", rank, 3, seconds=0.05)
    with pytest.raises(LostRankError, match=rf"rank 0 waited 0\.1 s for {named} \(control\)"):
        wait_for_members(store, "control", 0, 3, seconds=0.1)


def test_members_of_another_group_do_not_count():
    store = open_store(mesh_of(0, 2))
    with pytest.raises(LostRankError):
        wait_for_members(store, "tensor 0", 1, 2, seconds=0.05)
    for other in (store, PrefixStore("engine 1", store)):
        with pytest.raises(LostRankError, match="rank 1 of 2"):
            wait_for_members(other, "tensor 1", 0, 2, seconds=0.05)


def test_a_late_rank_makes_the_group_whole():
    store, groups = open_store(mesh_of(0, 2)), []

    def come_late():
        time.sleep(0.3)
        own = open_store(mesh_of(1, 2, store.port))
        groups.append(gloo_group(own, "control", 1, 2))

    thread = threading.Thread(target=come_late)
    thread.start()
    groups.append(gloo_group(store, "control", 0, 2))
    thread.join()
    assert sorted(group.rank() for group in groups) == [0, 1]


@pytest.mark.parametrize(
    ("host", "reason"), [("127.0.0.1", "Connection refused"), ("no-such-host.invalid", "not known|resolution|address")]
)
def test_a_store_that_nobody_opens_is_named(host, reason):
    mesh = Mesh(1, 2, f"{host}:{free_port()}", 1, 2, hosts_store=False)
    with pytest.raises(LostRankError, match=rf"rank 1 waited .* {host}:\d+ \(.*({reason})"):
        wait_for_store(mesh, seconds=0.1)


def test_a_store_that_goes_while_ranks_wait():
    store = open_store(mesh_of(0, 2))
    own, errors = open_store(mesh_of(1, 2, store.port)), []

    def wait():
        with pytest.raises(LostRankError, match="waited for the others") as error:
            wait_for_members(own, "control", 1, 2, seconds=60)
        errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    del store
    thread.join(20)
    assert errors


def test_an_engine_whose_rank_0_does_not_come(monkeypatch):
    monkeypatch.setattr(meeting, "MEETING", meeting.timedelta(seconds=0.1))
    store = open_store(mesh_of(0, 2))
    with pytest.raises(LostRankError, match=r"engine 1 waited 0\.1 s for rank 0"):
        link_to_rank_0(mesh_of(1, 2, store.port), store, 1)


@pytest.mark.parametrize(
    ("rank", "named", "number"),
    [(0, "rank 0 waits for rank 1 of 2", signal.SIGTERM), (1, "rank 1 waits for the store", signal.SIGINT)],
)
def test_a_signal_ends_the_wait_for_a_rank_that_nobody_started(rank, named, number):
    """Inside torch a rank that waited heeded neither, for nine minutes, and said nothing."""
    launcher = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-m", "flexbatch.run", "--tensor-parallel-size", "2", "--device", "cpu"]
    environ = os.environ | {name: str(value) for name, value in (launcher | address).items()}
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if named in line:
                break
        assert named in lines[-1], lines
        process.send_signal(number)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
