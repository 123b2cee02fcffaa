"""What Triton has a C compiler make at the first launch on a GPU: its driver, once, and until version 3.6 what launches
each kernel. A quarter to one second each, in the middle of what is being run or measured, unless it is in Triton's
cache on the disk by then.
"""

from __future__ import annotations

from typing import Any


class DriverOfTriton:
    """Made like a kernel, before all of them."""

    weight = 1 << 30

    def __init__(self, backend: str) -> None:
        """backend: of Triton's compiler. The driver of AMD's GPUs is made where it is first used."""
        self.backend = backend

    def compile(self) -> None:
        if self.backend == "cuda":
            from triton.backends.nvidia import driver

            driver.CudaUtils()


def compile_launcher(compiled: Any, backend: str) -> None:
    """compiled: a kernel, as Triton's compiler gives it."""
    if backend != "cuda":
        return
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(compiled.src, compiled.metadata)
