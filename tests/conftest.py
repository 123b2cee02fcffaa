"""What holds for all tests."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Triton decides when it is first imported, by whatever test that is, whether its functions are compiled or interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
# Workers of pytest-xdist share the cores: each would start a thread on every one of them.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import torch

from flexbatch.policy.hardware import load_hardware

# Under nohup, and in the background of a script, the signals that tests send are ignored, by children as well.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(ImportError):  # HELM's environment has no hypothesis
    from hypothesis import settings

    # Machines that run tests are shared: how long an example takes says nothing about the code. The examples are the
    # same in every run and every process; --hypothesis-profile=random draws others, and more where a test names no
    # number.
    settings.register_profile("same", deadline=None, derandomize=True, max_examples=40)
    settings.register_profile("random", deadline=None, derandomize=False, max_examples=400)
    settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("alone") and int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        pytest.skip("counts what is free on the GPU, of which other workers take some: run it with -m alone -n 0")


gc.disable()  # what is made until all tests are collected stays: looking at it again and again took 3 of 16 s


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look at it again after every few tests."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.enable()
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_profiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine of a test measures the machine it runs on, nor reads what its user's cache folder holds."""
    monkeypatch.setattr("flexbatch.calibrate.machine.this_machine", lambda *arguments, **options: load_hardware("cpu"))
    monkeypatch.setattr("flexbatch.calibrate.machine.known_machine", lambda *arguments: None)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets up logging to the stderr of that test, which is closed after
    it."""
    root, package = logging.getLogger(), logging.getLogger("flexbatch")
    handlers, levels = root.handlers[:], (root.level, package.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], object]:
    """family -> Reference of a tiny model and what transformers generates with it, made once per process."""
    from tests.tiny_models import make_reference

    return functools.cache(lambda family: make_reference(family, tmp_path_factory.mktemp(family)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "flexbatch-test", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
