"""Jobs that lose their process, then what the machine had not written yet; resumed, they equal an undisturbed one."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest

from tests.apps_batch.helpers import parts_of, read_output, run_here, start, wait_for, write_input
from tests.apps_batch.power import POINTS, lose_power


def bytes_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill_lose_and_resume(tmp_path: Path, rows: int, kills: int, seed: int) -> None:
    """Kills in turns after some finished row, at a chosen point, and from outside; in a job of several partition
    folders."""
    chance, languages = random.Random(seed), 3
    prompts = [f"{row}: " + "word " * chance.randrange(18) for row in range(rows)]
    for position in range(languages):
        write_input(tmp_path / "in" / f"lang={position}" / "x.parquet", prompts[position::languages])
    source, out, side, counted = tmp_path / "in", tmp_path / "out", tmp_path / "syncs", tmp_path / "tokens"
    flags = ("--part-rows", 25, "--window-rows", 60)
    assert run_here(source, tmp_path / "whole", *flags) == 0
    history: list[str] = []
    settings = {"block": 12, "step_s": 0.002, "count_file": str(counted), "syncs": str(side)}
    points = chance.sample(POINTS, len(POINTS))
    for kill in range(kills):
        point = [points[kill // 3 % len(points)], chance.randint(1, 4), signal.SIGKILL]
        if kill % 3 == 0:
            point[:2] = "pipeline:Pipeline._finish", chance.randint(2, 2 * rows // kills)
        process = start(source, out, *flags, **settings, **({} if kill % 3 == 2 else {"signal_at": point}))
        if kill % 3 == 2:
            history.append("from outside")
            goal = bytes_of(counted) + chance.randint(1, 20 * rows // kills)
            wait_for(lambda goal=goal: bytes_of(counted) > goal, process)
            process.kill()
        else:
            history.append(str(point))
        _, err = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), err
        history += lose_power(out, side, chance)
        for path in parts_of(out) if out.exists() else ():
            assert len(pq.read_table(path)) > 0, history
        if process.returncode == 0:
            history.append("and it had come to its end")
    process = start(source, out, *flags, **settings)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, (err, history)
    assert read_output(out).equals(read_output(tmp_path / "whole")), history
    assert pds.dataset(out).count_rows() == rows
    left = sorted(path.name for path in (out / ".flexbatch").iterdir() if not path.name.startswith("writer-"))
    assert left == ["commits-0-of-1.log", "lock", "manifest.json"] and not list(out.rglob(".part-*")), history


def test_a_job_that_loses_power_is_resumed(tmp_path: Path) -> None:
    kill_lose_and_resume(tmp_path, 360, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_forty_losses_of_power(tmp_path: Path, seed: int) -> None:
    kill_lose_and_resume(tmp_path, 2400, 40, seed)
