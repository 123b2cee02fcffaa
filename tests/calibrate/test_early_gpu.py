"""A GPU's context is opened beside the import of torch, and whatever is wrong with it is left for torch to say."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from flexbatch.calibrate import early_gpu, profile
from flexbatch.policy.hardware import load_hardware


class Driver:
    """Notes what is called; the first of its calls that ``fails`` does."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.called = fails, list[tuple[str, int]]()
        self.thread: threading.Thread | None = None

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> int:
            self.called.append((name, given[-1] if isinstance(given[-1], int) else given[-1].value))
            self.thread = threading.current_thread()
            if name == "cuDeviceGet":
                given[0]._obj.value = 10 + given[1]
            return 100 * (name == self.fails)

        return call


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is called for a device."""
    monkeypatch.setenv("CUDA_MODULE_LOADING", "")
    monkeypatch.delenv("CUDA_MODULE_LOADING")

    def opened(device: str, fails: str = "") -> list[tuple[str, int]]:
        driver = Driver(fails)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": driver}[name])
        early_gpu.begin_gpu(device).join()
        assert driver.thread is not threading.current_thread()
        return driver.called

    return opened


@pytest.mark.parametrize(("device", "number"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_the_context_of_the_device_is_opened_in_a_thread(device: str, number: int, opened: Any) -> None:
    calls = [("cuInit", 0), ("cuDeviceGet", number), ("cuDevicePrimaryCtxRetain", 10 + number)]
    assert opened(device) == calls
    assert os.environ["CUDA_MODULE_LOADING"] == "LAZY"


def test_what_somebody_chose_of_modules_stays(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    assert opened("cuda") and os.environ["CUDA_MODULE_LOADING"] == "EAGER"


def test_a_driver_that_fails_is_asked_no_more(opened: Any) -> None:
    assert [name for name, _ in opened("cuda", "cuInit")] == ["cuInit"]
    assert [name for name, _ in opened("cuda:9", "cuDeviceGet")] == ["cuInit", "cuDeviceGet"]


def test_without_a_driver_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    failed = list[Any]()
    monkeypatch.setattr(threading, "excepthook", failed.append)
    early_gpu.begin_gpu("auto").join()
    assert not failed


@pytest.mark.parametrize("kernels", ["engine", "none"])
def test_imports_collect_no_garbage_and_what_is_measured_not_theirs(
    kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in jobs, what was there before is frozen; afterwards all is as it was."""
    collecting, frozen, begun = list[bool](), list[int](), profile.begun

    def begin(*told: Any) -> Any:
        collecting.append(gc.isenabled())
        return begun(*told)

    def measure(*told: Any) -> Any:
        collecting.append(gc.isenabled())
        frozen.append(gc.get_freeze_count())
        return load_hardware("cpu")

    monkeypatch.setattr(profile, "begun", begin)
    monkeypatch.setattr("flexbatch.calibrate.measure.measure", measure)
    words = ["--output", str(tmp_path / "out.json"), "--device", "cpu", "--kernels", kernels]
    gc.unfreeze()
    try:
        assert profile.main(words) == 0
        assert collecting == [False, True] and gc.isenabled()
        assert frozen[0] > 10_000 and not gc.get_freeze_count()
    finally:
        gc.freeze()
