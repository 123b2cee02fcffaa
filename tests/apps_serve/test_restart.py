"""Servers that are killed, stopped and started again: every batch goes on, and its results have the bytes of an
undisturbed run."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import httpx
import pytest

from flexbatch.validation.errors import HUNG_UP
from tests.apps_serve.helpers import PLACED, Server, begin_batch, content, ended, records, some_lines, undated, wait_for

LINES = [*some_lines(40, 24), "no JSON", *some_lines(20, 12, first=40)]


def results(server: Server, batch_id: str) -> tuple[bytes, bytes]:
    client = server.client()
    batch = ended(client, batch_id)
    assert batch.status == "completed" and batch.request_counts.total == len(LINES), batch
    return undated(content(client, batch.output_file_id)), undated(content(client, batch.error_file_id))


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> tuple[bytes, bytes]:
    found = results(server, begin_batch(server.client(), LINES))
    assert len(records(found[0])) == 60 and len(records(found[1])) == 1
    return found


def test_a_batch_goes_on_after_kill_and_after_sigterm(tmp_path: Path, undisturbed: tuple[bytes, bytes]) -> None:
    state = tmp_path / "state"
    server = Server(state, *PLACED)
    file = server.client().files.create(file=("left.jsonl", b"{}\n"), purpose="batch")
    batch_id = begin_batch(server.client(), LINES)
    client = server.client()
    wait_for(lambda: client.batches.retrieve(batch_id).request_counts.completed > 5)
    server.kill()
    second = Server(state, *PLACED)
    client = second.client()
    wait_for(lambda: client.batches.retrieve(batch_id).request_counts.completed > 20)
    refused = Server(state, *PLACED, wait=False)
    assert refused.process.wait(60) == 2
    assert "belongs to a server that runs (process" in refused.process.communicate()[1]
    said = second.stop(signal.SIGHUP)
    assert second.process.returncode == HUNG_UP and "Traceback" not in said, said
    assert "batches that have not ended go on with the next start" in said
    wrong = Server(state, *PLACED, "--seed", "1", wait=False)
    assert wrong.process.wait(60) == 2 and "1 batches that have not ended" in wrong.process.communicate()[1]
    third = Server(state, *PLACED)
    assert results(third, batch_id) == undisturbed
    assert third.client().files.retrieve(file.id).filename == "left.jsonl"
    third.stop(signal.SIGINT)
    assert third.process.returncode == 0 and not list((state / "batches").iterdir())


@pytest.mark.slow
def test_twenty_kills_during_three_batches(tmp_path: Path, undisturbed: tuple[bytes, bytes]) -> None:
    """At any moment: while a model loads, lines are read, rows are journaled, results are written."""
    state, chance = tmp_path / "state", random.Random(0)
    server = Server(state, *PLACED)
    batches = [begin_batch(server.client(), LINES) for _ in range(3)]
    done, most = 0, 0
    for kill in range(20):
        until = time.monotonic() + chance.uniform(0.0, 2.5)
        while time.monotonic() < until:
            time.sleep(0.02)
        server.kill()
        server = Server(state, *PLACED, wait=kill % 4 != 3)
        if kill % 4 == 3:
            time.sleep(chance.uniform(0.0, 1.0))  # in the start
            server.kill()
            server = Server(state, *PLACED)
        counts = [server.client().batches.retrieve(each).request_counts for each in batches]
        done, most = sum(each.completed for each in counts), max(most, done)
        assert done >= most, "rows that were counted are gone"
    assert [results(server, each) for each in batches] == [undisturbed] * 3
    server.stop()


def test_a_stop_tells_those_who_wait(tmp_path: Path) -> None:
    server = Server(tmp_path / "state", *PLACED)
    body = {
        "model": "demo",
        "prompt": ["x"] * 40,
        "max_tokens": 1500,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)
        last = [each for each in lines if each][-1]
    assert '"code": "stopping"' in last, last
    assert server.process.wait(60) == 0
