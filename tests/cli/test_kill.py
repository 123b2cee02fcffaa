"""A run that is killed while it writes the offload folder: the next one finds whole files or none, and gives the
same tokens."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexbatch import run
from tests.processes import Forked
from tests.tiny_models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """38 MB in 15 tensors, the largest of 12 MB: writing one takes long enough to be killed in it."""
    folder = tmp_path_factory.mktemp("model")
    make_model(
        "llama",
        folder,
        num_hidden_layers=2,
        hidden_size=256,
        intermediate_size=6000,
        num_attention_heads=4,
        head_dim=64,
    )
    return folder


def words_of(model: Path, offload_dir: Path) -> list[str]:
    words = ["--model", str(model), "--offload-dir", str(offload_dir), "--device", "cpu", "--hardware", "cpu", "--json"]
    words += ["--percent", "0", "0", "100", "0", "100", "0", "--gpu-memory", "512MiB", "--cpu-memory", "64MiB"]
    return [*words, "--prompt-len", "5", "--gen-len", "4", "--gpu-batch-size", "2", "--num-gpu-batches", "1"]


def start(model: Path, offload_dir: Path) -> Forked:
    return Forked("tests.cli.slow_files", words_of(model, offload_dir))


def tokens(out: str) -> list[list[int]]:
    return [line["token_ids"] for line in json.loads(out)["completions"]]


def paths_in(folder: Path) -> Iterator[Path]:
    """Of all files. Unlike `Path.rglob` it goes on where a process that runs removes a folder that was just listed."""
    for inner, _, names in os.walk(folder):
        yield from (Path(inner, name) for name in names)


def is_whole(path: Path) -> bool:
    return path.suffix == ".bin" and not path.name.startswith(".")


def files_of(folder: Path) -> dict[str, bytes]:
    """What a run would trust: files with their final names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths_in(folder) if is_whole(path)}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in paths_in(folder) if path.name.startswith(".") and path.suffix == ".tmp"]


def kill_when(process: Forked, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert process.poll() is None, f"ended before it could be killed: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def half_written(folder: Path, num_bytes: int) -> Callable[[], bool]:
    """At least ``num_bytes`` of some tensor are in a file without its final name."""

    def reached() -> bool:
        for path in leftovers(folder):
            try:
                if path.stat().st_size >= num_bytes:
                    return True
            except FileNotFoundError:
                continue
        return False

    return reached


def whole(folder: Path, count: int) -> Callable[[], bool]:
    return lambda: sum(map(is_whole, paths_in(folder))) >= count


Moment = tuple[Callable[[Path, int], Callable[[], bool]], int]


def kill_and_repeat(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, moments: list[Moment]) -> None:
    """Kill a run at every moment, one after another on the same folder; what is there is trusted only where it is
    what an undisturbed run writes."""
    offload, undisturbed = tmp_path / "offload", tmp_path / "undisturbed"
    assert run.main(words_of(model, undisturbed)) == 0
    expected = tokens(capsys.readouterr().out)
    wanted = files_of(undisturbed)
    torn = 0
    for moment, amount in moments:
        kill_when(start(model, offload), moment(offload, amount))
        found = files_of(offload)
        assert all(wanted[name] == content for name, content in found.items())
        assert len(found) < len(wanted)
        torn += sum(path.stat().st_size > 0 for path in leftovers(offload))
    assert torn, "no kill came within a write; the moments are chosen badly"
    assert run.main(words_of(model, offload)) == 0
    assert tokens(capsys.readouterr().out) == expected
    assert files_of(offload) == wanted and not leftovers(offload)
    assert not [path for path in offload.iterdir() if path.is_file()], "cache or activation files are left"


def test_a_killed_load_is_not_trusted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kill_and_repeat(model, tmp_path, capsys, [(half_written, 1 << 20), (whole, 9)])


@pytest.mark.slow
def test_loads_killed_at_many_moments_are_not_trusted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    chance = random.Random(3)
    counts = sorted(chance.sample(range(1, 15), 5))
    kill_and_repeat(
        model,
        tmp_path,
        capsys,
        [(half_written, 1), (half_written, 6 << 20), *((whole, count) for count in counts), (half_written, 1)],
    )
