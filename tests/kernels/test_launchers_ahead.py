"""What Triton makes at the first launch is made with the kernels; what is asked of a GPU makes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from triton.backends.nvidia import driver
from triton.runtime import driver as active

from flexbatch.kernels.imagined_gpu import GpuTraits
from flexbatch.kernels.launchers_ahead import DriverOfTriton, compile_launcher

H200 = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
KERNEL = SimpleNamespace(src="its source", metadata="its sizes")


@pytest.fixture
def made(monkeypatch):
    made = []
    monkeypatch.setattr(driver, "CudaUtils", lambda: made.append("driver"))
    monkeypatch.setattr(driver, "CudaLauncher", lambda *told: made.append(told))
    return made


def test_launchers_are_compiled_where_this_triton_compiles_them(made, monkeypatch):
    monkeypatch.setattr(driver, "make_launcher", lambda *told: "C", raising=False)
    compile_launcher(KERNEL, "hip")
    DriverOfTriton("hip").compile()
    assert not made
    DriverOfTriton("cuda").compile()
    compile_launcher(KERNEL, "cuda")
    assert made == ["driver", ("its source", "its sizes")]
    monkeypatch.delattr(driver, "make_launcher")
    compile_launcher(KERNEL, "cuda")
    assert len(made) == 2, "since Triton 3.7 there is one for all kernels"


def test_what_a_gpu_is_like_is_known_without_tritons_driver(made, monkeypatch):
    """It takes a second to compile, in the process that is to start others which compile."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    monkeypatch.setattr(type(active), "active", property(lambda self: pytest.fail("the driver was made")))
    assert GpuTraits.of(torch.device("cuda", 77)) == GpuTraits(90, 132, 232448) and not made


@pytest.mark.gpu
def test_tritons_driver_says_the_same():
    device = torch.device("cuda", 0)
    target = active.active.get_current_target()
    shared = active.active.utils.get_device_properties(0)["max_shared_mem"]
    count = torch.cuda.get_device_properties(device).multi_processor_count
    assert GpuTraits.of(device) == GpuTraits(target.arch, count, shared, target.warp_size, target.backend)
