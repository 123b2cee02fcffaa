"""The GPU's driver and context, begun before torch is imported: the one waits for the driver and the other for a
disk and a core, and one after the other a new machine waited for both."""

from __future__ import annotations

import ctypes
import os
import threading

DRIVER = "libcuda.so.1"


def begin_gpu(device: str) -> threading.Thread:
    """Have the context opened that torch will use on ``device`` (auto, cuda or cuda:N), in a thread to be joined
    before anything is forked. Where it cannot be opened nothing happens: torch says what is wrong."""
    # As torch does before its own first call, which is what the driver looks at.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    number = int(device.partition(":")[2] or 0)
    thread = threading.Thread(target=open_context, args=(number,), name="flexbatch-gpu", daemon=True)
    thread.start()
    return thread


def open_context(number: int) -> None:
    """The primary context of a GPU, kept for as long as the process lives. Calls of ctypes hold no lock of Python's."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return
    gpu, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(gpu), number) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)
