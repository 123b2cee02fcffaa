"""Jobs as processes of their own, with real signals, full disks and inputs that vanish."""

from __future__ import annotations

import json
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest

from tests.apps_batch.helpers import (
    ROOT,
    benchmark_prompts,
    command,
    journal_bytes,
    kill_at,
    parts_of,
    read_output,
    run_here,
    start,
    wait_for,
    write_input,
)
from tests.processes import Forked


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill_and_resume(tmp_path: Path, rows: int, kills: int, step_s: float, *flags: object) -> None:
    """A job killed at random moments, resumed each time, against an undisturbed one."""
    source, out, counted = (
        write_input(tmp_path / "in.parquet", benchmark_prompts(rows)),
        tmp_path / "out",
        tmp_path / "tokens",
    )
    assert run_here(source, tmp_path / "whole", *flags, count_file=str(tmp_path / "once")) == 0
    once = size_of(tmp_path / "once")
    settings = {"block": 16, "step_s": step_s, "count_file": str(counted)}
    chance = random.Random(7)

    def moments() -> Iterator[Callable[[], bool]]:
        for _ in range(kills):
            goal = size_of(counted) + chance.random() * once / kills
            yield lambda goal=goal: size_of(counted) > goal
            check_readable(out)

    kill_at(moments(), lambda: start(source, out, *flags, **settings))
    process = start(source, out, *flags, **settings)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert read_output(out).equals(read_output(tmp_path / "whole"))
    assert once < size_of(counted) <= 1.15 * once
    left = sorted(path.name for path in (out / ".flexbatch").iterdir())
    assert left[:3] == ["commits-0-of-1.log", "lock", "manifest.json"] and not list(out.rglob(".part-*"))
    assert left[3:] == [f"writer-{kills + 1:08d}-0-of-1"], "one grant, the latest"


def check_readable(out: Path) -> None:
    """Whatever is there reads as a data set, whole parts only."""
    for path in parts_of(out):
        assert len(pq.read_table(path)) > 0
    if parts_of(out):
        assert pds.dataset(out).count_rows() > 0


def test_killed_and_resumed_jobs_give_every_row_once(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 400, 3, 0.002, "--part-rows", 40, "--window-rows", 100)


@pytest.mark.slow
def test_five_thousand_rows_killed_twenty_times(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 5000, 20, 0.003)


def test_two_shards_killed_and_resumed_independently(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.parquet", benchmark_prompts(300)), tmp_path / "out"
    flags = ("--part-rows", 20, "--window-rows", 50)
    assert run_here(source, tmp_path / "whole", *flags) == 0
    first, second = (start(source, out, *flags, "--shard", f"{shard}/2", block=8, step_s=0.005) for shard in (0, 1))
    wait_for(lambda: journal_bytes(out) > 3000, first)
    first.kill()
    first.communicate()
    again = start(source, out, *flags, "--shard", "0/2", block=8)
    wait_for(lambda: len(parts_of(out)) > 3, second)
    second.kill()
    second.communicate()
    assert again.communicate(timeout=60) and again.returncode == 0
    assert len(parts_of(out)) < 15
    ranks = [
        start(
            source,
            out,
            *flags,
            environ={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, err = rank.communicate(timeout=60)
        assert rank.returncode == 0, err
    assert read_output(out).equals(read_output(tmp_path / "whole"))


@pytest.mark.slow
def test_ranks_of_torchrun_take_their_shards(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", [f"p{i}" for i in range(90)])
    budgets = ("--cpu-memory", "6GiB", "--gpu-memory", "3GiB", "--offload-dir", tmp_path / "offload", "--device", "cpu")
    job = command(source, tmp_path / "out", "--part-rows", 10, *budgets, config_file=str(tmp_path / "configs"))
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", *job[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read_output(tmp_path / "out")["id"].to_pylist() == list(range(90))
    assert len(list((tmp_path / "out" / ".flexbatch").glob("commits-*-of-3.log"))) == 3
    configs = [json.loads(line) for line in (tmp_path / "configs").read_text().splitlines()]
    assert {(config["cpu_memory"], config["gpu_memory"]) for config in configs} == {(2 * 2**30, 2**30)}
    assert sorted(config["offload_dir"] for config in configs) == [
        str(tmp_path / "offload" / f"rank-{rank}") for rank in range(3)
    ]


def begun(tmp_path: Path, rows: int = 400, **settings: float) -> tuple[Forked, Path]:
    source, out = write_input(tmp_path / "in.parquet", [f"prompt {i}" for i in range(rows)]), tmp_path / "out"
    process = start(source, out, "--part-rows", 25, "--window-rows", 50, **{"block": 10, "step_s": 0.006, **settings})
    wait_for(lambda: journal_bytes(out) > 2000, process)
    return process, out


@pytest.mark.slow  # `tests/cli/test_interrupt.py` asks the same of a real engine
def test_the_first_interrupt_finishes_the_rows_in_flight_and_the_resume_command_works(tmp_path: Path) -> None:
    process, out = begun(tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "sequences in flight are being finished, no others begin" in err, err
    done = re.search(r"interrupted: (\d+) of 400 rows are done and kept", err)
    assert done is not None and 0 < int(done[1]) < 400 and len(parts_of(out)) < 16, err
    resume = shlex.split(err.rsplit("resume with: ", 1)[1])
    assert subprocess.run(resume, cwd=ROOT, capture_output=True, timeout=60).returncode == 0
    assert read_output(out)["id"].to_pylist() == list(range(400))


@pytest.mark.parametrize(
    "signals", [(signal.SIGINT, signal.SIGINT), pytest.param((signal.SIGTERM,), marks=pytest.mark.slow)]
)
def test_the_second_interrupt_and_sigterm_stop_at_once_and_keep_finished_rows(
    tmp_path: Path, signals: tuple[int, ...]
) -> None:
    process, out = begun(tmp_path, step_s=0.04)
    kept = journal_bytes(out)
    for number in signals:
        process.send_signal(number)
        # Two that come at one moment are one.
        wait_for(lambda: "are being finished" in process.said(), process)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; resume with: " in err, err
    assert "rows are done and kept" not in err, "those in flight were finished"
    assert journal_bytes(out) >= kept and "Traceback" not in err


def test_an_interrupt_while_the_model_loads_stops_at_once(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", ["a"])
    process = start(source, tmp_path / "out", load_s=300)
    wait_for((tmp_path / "out" / ".flexbatch" / "manifest.json").exists, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "resume with: " in err


@pytest.mark.slow  # 8 s, most of them spent waiting
def test_an_input_that_is_deleted_mid_job(tmp_path: Path) -> None:
    for name in "abcd":
        write_input(tmp_path / "in" / f"{name}.parquet", [f"{name}{i}" for i in range(100)])
    out = tmp_path / "out"
    process = start(tmp_path / "in", out, "--part-rows", 20, "--window-rows", 20, block=10, step_s=0.005)
    wait_for(lambda: journal_bytes(out) > 500, process)
    (tmp_path / "in" / "d.parquet").unlink()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "d.parquet: row group 0 cannot be read" in err and "resume with: " in err, err
    assert read_output(out)["prompt"].to_pylist() == [f"{name}{i}" for name in "abc" for i in range(100)]


def test_a_full_disk_costs_no_committed_part(tmp_path: Path, small_disk: Path) -> None:
    noise = np.random.default_rng(0).bytes(300 * 10_000)
    payload = [noise[i * 10_000 : (i + 1) * 10_000] for i in range(300)]
    source, out = (
        write_input(tmp_path / "in.parquet", [f"p{i}" for i in range(300)], payload=payload),
        small_disk / "out",
    )
    process = start(source, out, "--part-rows", 20, "--window-rows", 20)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4 and "No space left on device" in err and "resume with: " in err, err
    names = [path.name for path in parts_of(out)]
    assert 3 < len(names) < 15 and not list(out.rglob(".part-*"))
    rows = read_output(out)["id"].to_pylist()
    assert len(rows) == 20 * len(names)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert run_here(source, out, "--part-rows", 20, "--window-rows", 20) == 0
    assert read_output(out).select(["id", "payload"]).equals(pq.read_table(source, columns=["id", "payload"]))


def test_a_disk_without_room_for_a_journal(tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * (2 * 2**20 - 20 * 4096))
    source = write_input(tmp_path / "in.parquet", benchmark_prompts(400))
    process = start(source, small_disk / "out", "--max-tokens", 300, "--part-rows", 400)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4 and "No space left on device" in err, err
    (small_disk / "filler").unlink()
    process = start(source, small_disk / "out", "--max-tokens", 300, "--part-rows", 400)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "resuming: " in err, err
    assert read_output(small_disk / "out")["id"].to_pylist() == list(range(400))


def test_a_read_only_output_is_found_before_the_model_loads(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    source = write_input(tmp_path / "in.parquet", ["a"])
    process = start(source, small_disk / "out", load_s=60)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2 and "nothing can be made in" in err and "Read-only file system" in err, err


def test_a_second_process_on_the_same_output_is_refused(tmp_path: Path) -> None:
    process, out = begun(tmp_path)
    other = start(tmp_path / "in.parquet", out, "--part-rows", 25, "--window-rows", 50)
    _, err = other.communicate(timeout=20)
    process.kill()
    process.communicate()
    assert other.returncode == 2 and "being written by another process" in err


@pytest.mark.slow  # 13 s, most of them spent waiting
def test_readers_see_whole_parts_during_the_job(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    process, out = begun(tmp_path)
    looked = 0
    while process.poll() is None:
        if parts_of(out):
            table = pds.dataset(out).to_table()
            assert len(table) % 25 == 0 and pa.types.is_string(table.schema.field("generated_text").type)
            assert len(table) <= len(pd.read_parquet(out)) <= 400
            if not looked:
                loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]
                assert len(table) <= len(loaded) and len(loaded) % 25 == 0 and process.poll() is None
            looked += 1
        time.sleep(0.05)
    process.communicate()
    assert looked > 3 and process.returncode == 0
