"""A rank that ends ends all the others, with its own error shown, whatever they wait for."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexbatch.parallel.channel import RankChannel
from flexbatch.parallel.processes import PACKAGE_ROOT
from flexbatch.parallel.rank_links import RankLinks
from flexbatch.planner.follower import aborting
from flexbatch.planner.leader import Leader
from flexbatch.planner.rank_commands import Leave
from flexbatch.validation.errors import LostRankError
from tests.parallel.meshes import PROMPTS, engine, free_port, start
from tests.processes import Forked
from tests.tiny_models import make_model

SECONDS = 300
"""In which all have to end, on a machine that has other work, too: ranks that wait in vain do so for ever."""


def wait_for_all(ranks: list[Forked]) -> list[str]:
    end = time.monotonic() + SECONDS
    return [rank.communicate(max(0.1, end - time.monotonic()))[1] for rank in ranks]


@pytest.mark.parametrize("stages", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_error_in_one_rank_ends_all_and_is_shown(stages, tmp_path):
    """In its third pass, in whose middle the others are."""
    sizes = {"num_attention_heads": 3, "hidden_size": 36}
    ranks = start(tmp_path, 3, [engine(tmp_path, "opt", sizes, fails_at=3, stages=stages)])
    said = wait_for_all(ranks)
    assert all(rank.returncode for rank in ranks), said
    assert "Traceback" in said[2] and "ArithmeticError: this rank cannot count any further" in said[2]
    assert "LostRankError" in said[0] and "Traceback" not in said[1] and "has lost another rank" in said[1]


def torchrun(module: str, words: list[str], size: int) -> list[Forked]:
    """The processes that torchrun would start."""
    port, environ = str(free_port()), {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [Forked(module, words, {**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)]


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


@pytest.mark.slow  # 20 s, most of them spent waiting
@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--pipeline-parallel-size"])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_batch_job_whose_rank_was_killed_goes_on_to_the_same_bytes(killed, flag, tmp_path):
    folder, rows = tmp_path / "model", tmp_path / "rows.parquet"
    make_model("llama", folder)
    prompts = [" ".join(map(str, prompt)) for prompt in PROMPTS[:4]] * 6
    pq.write_table(pa.table({"prompt": prompts}), rows)
    words = ["--model", str(folder), "--device", "cpu", "--hardware", "cpu", "--dtype", "float32", "--part-rows", "4"]
    words += ["--max-tokens", "40", "--ignore-eos", "--gpu-batch-size", "2", "--num-gpu-batches", "1"]
    words += ["--gpu-memory", "256MiB", "--cpu-memory", "256MiB", "--percent", "50", "50", "50", "50", "100", "0"]
    words += ["--offload-dir", str(tmp_path / "disk")]
    out, two = tmp_path / "out", [flag, "2"]
    ranks = torchrun("flexbatch.apps.batch", [str(rows), str(out), *words, *two], 2)
    end = time.monotonic() + 100
    while len(parts(out)) < 2 and time.monotonic() < end and ranks[0].poll() is None:
        time.sleep(0.02)
    ranks[killed].kill()
    said = wait_for_all(ranks)
    assert all(rank.returncode for rank in ranks) and 0 < len(parts(out)) < 6, said
    if killed:
        assert "has lost another rank" in said[0] and "flexbatch.apps.batch" in said[0], "with the command that resumes"
    ranks = torchrun("flexbatch.apps.batch", [str(rows), str(out), *words, *two], 2)
    said = [rank.communicate(200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    alone = Forked("flexbatch.apps.batch", [str(rows), str(tmp_path / "alone"), *words])
    assert alone.communicate(200) and alone.returncode == 0
    assert parts(out) == parts(tmp_path / "alone") and len(parts(out)) == 6


WAITING = """
import sys, time
sys.path.insert(0, {root!r})
from flexbatch.parallel.mesh import Mesh
from flexbatch.parallel.processes import RankProcesses
RankProcesses({module!r}, [Mesh(1, 2, {address!r}, 1, 2, False)], grace=0.1)
print("started", flush=True)
time.sleep(60)
"""


def test_rank_0_that_waits_for_something_else_is_ended():
    """For a file, or for a GPU that waits for the rank that is gone."""
    code = WAITING.format(root=str(PACKAGE_ROOT), module="tests.parallel.ranks_that_fail", address="127.0.0.1:1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1 and done.stdout == "started\n"
    assert "rank 1 ended with exit code 7; its error is above" in done.stderr and "ZeroDivisionError" in done.stderr


ASKED = """
import sys, time
sys.path.insert(0, {root!r})
from flexbatch.parallel.mesh import Mesh
from flexbatch.parallel.processes import WHERE_IT_STANDS, RankProcesses
ranks = RankProcesses({module!r}, [Mesh(1, 3, "127.0.0.1:1", 1, 2, False)])
sys.stdin.readline()
ranks.processes[0].send_signal(WHERE_IT_STANDS)
sys.stdin.readline()
print(ranks.processes[0].poll())
ranks.closing.set()
ranks.kill()
"""


def test_a_rank_says_where_it_stands_and_goes_on():
    """For a rank that nobody knows why it does not end."""
    code = ASKED.format(root=str(PACKAGE_ROOT), module="tests.parallel.ranks_that_fail")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, text=True)
    assert process.stdin is not None and process.stderr is not None
    assert process.stderr.readline() == "waiting\n"
    process.stdin.write("\n")
    process.stdin.flush()
    said = ""
    while "in main" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    out, _ = process.communicate("\n", timeout=SECONDS)
    assert "in wait_for_nothing" in said and out == "None\n", said


class Spinning:
    """A group of a GPU whose other rank is gone."""

    aborted = False

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("part", ["of a pass", "between passes", "of a follower"])
def test_a_gpu_that_waits_for_a_rank_that_is_gone_is_freed(part):
    """Closing anything would wait for what is queued on it, for ever."""
    channel, group = RankChannel.__new__(RankChannel), Spinning()
    channel.groups, channel.broken = {"tensor cuda": group}, False
    leader = Leader(channel, RankLinks(), None, 1)
    failing = {"of a pass": leader.whole_or_broken, "between passes": leader.saying_who_is_lost}
    context = aborting(channel) if part == "of a follower" else failing[part]()
    with pytest.raises(LostRankError), context:
        raise LostRankError("rank 1 was killed")
    assert group.aborted and channel.broken
    leader.unfinished.append(iter(lambda: 1 / 0, None))
    leader.finish()
    with pytest.raises(LostRankError, match="open a new engine"):
        leader.send(Leave())


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--pipeline-parallel-size"])
@pytest.mark.parametrize("lost", ["rank 0", "rank 1", "none"])
def test_a_command_that_starts_its_ranks_ends_with_them(lost, flag, tmp_path):
    import psutil

    make_model("llama", tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--device", "cpu", "--hardware", "cpu", "--gpu-memory", "256MiB"]
    words += ["--prompt-len", "9", "--limit", "3", "--json", "--ignore-eos", "--offload-dir", str(tmp_path / "disk")]
    words += ["--gen-len", "8" if lost == "none" else "480", flag, "2"]
    command = Forked("flexbatch.run", words)
    end = time.monotonic() + 100
    while "running 3 completions" not in command.said() and time.monotonic() < end and command.poll() is None:
        time.sleep(0.05)
    time.sleep(0.0 if lost == "none" else 1.0)
    children = psutil.Process(command.pid).children() if command.poll() is None else []
    began = time.monotonic()
    if lost == "rank 0":
        command.kill()
    if lost == "rank 1":
        (child,) = children
        child.kill()
    out, said = command.communicate(100)
    _, alive = psutil.wait_procs(children, timeout=SECONDS)
    assert not alive, said
    if lost == "none":
        assert command.returncode == 0 and len(json.loads(out)["completions"]) == 3, said
    else:
        assert command.returncode not in (0, None) and time.monotonic() - began < SECONDS, said
    if lost == "rank 1":
        assert "rank 1 was killed by SIGKILL" in said and "Traceback" not in said
