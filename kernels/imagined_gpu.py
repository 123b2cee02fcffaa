"""A GPU that is not there: what is launched on it is noted, and compiled on request, and nothing runs.

For a process of its own, which never touches the real one. Tensors on a GPU are tensors without memory there, of the
shapes, strides and offsets that they would have. So the code that launches kernels says itself which ones it launches
for given shapes, and what Triton makes of each argument.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexbatch.kernels.launched import MULTIPLE, LaunchedKernel
from flexbatch.kernels.launchers_ahead import compile_launcher

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class GpuTraits:
    """What launches and the compiler ask of a GPU. capability: 90 for sm_90."""

    capability: Any
    multiprocessors: int
    shared_bytes: int
    """Of a program, at most."""
    warp_size: int = 32
    backend: str = "cuda"
    """Of Triton's compiler."""

    @classmethod
    def of(cls, device: torch.device) -> GpuTraits:
        """Of a GPU that is there. Triton's driver, which would tell, is compiled at its first use: of NVIDIA's GPUs
        torch knows as much."""
        from flexbatch.kernels.attention import multiprocessors_of
        from flexbatch.kernels.expert_products import shared_bytes

        if torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(device)
            return cls(10 * major + minor, multiprocessors_of(device), shared_bytes(device))
        from triton.runtime import driver

        with torch.cuda.device(device):
            target = driver.active.get_current_target()
        return cls(target.arch, multiprocessors_of(device), shared_bytes(device), target.warp_size, target.backend)


WITHIN_TORCH: ContextVar[bool] = ContextVar("flexbatch_within_torch", default=False)
"""Whether torch looks at a tensor, which finds one without memory: it would go to a real GPU otherwise."""


class ImaginedTensor(Tensor):
    """Of a GPU that is not there."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment] # `_OnGpu` sees to results

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return not WITHIN_TORCH.get()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta") if WITHIN_TORCH.get() else DEVICE

    def data_ptr(self) -> int:
        """Memory of a GPU begins at multiples of 512, and never at 0."""
        return 512 + int(self.storage_offset()) * self.element_size()


class _OnGpu(TorchFunctionMode):
    """What is made on a GPU is imagined."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        there = any(isinstance(x, ImaginedTensor) for x in args)
        named = {name: _moved(x, there) for name, x in (kwargs or {}).items() if name != "pin_memory"}
        token = WITHIN_TORCH.set(True)
        try:
            return _imagined(func(*(_moved(x, there) for x in args), **named))
        finally:
            WITHIN_TORCH.reset(token)


def _moved(x: Any, there: bool) -> Any:
    """there: a tensor that has no memory stays where it is, also on its way to the host."""
    return torch.device("meta") if isinstance(x, torch.device) and (there or x.type == "cuda") else x


def _imagined(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.as_subclass(ImaginedTensor) if x.is_meta and not isinstance(x, ImaginedTensor) else x
    return type(x)(map(_imagined, x)) if type(x) in (tuple, list) else x


@dataclass(frozen=True)
class Launch:
    """A kernel and what Triton makes of its arguments. Two launches that are equal need one compiled kernel."""

    kernel: Any = field(compare=False, repr=False)
    name: str
    forms: tuple[object, ...]
    """Of every argument: a constant; dtype of a tensor, whether an integer is 1, and whether it, or the address, is a
    multiple of 16, where the kernel is compiled for that."""
    options: tuple[tuple[str, object], ...]
    arguments: tuple[Any, ...] = field(compare=False, repr=False)

    @property
    def weight(self) -> int:
        """Which of several takes longest to compile, by its text: 3,000 characters took 1 to 2 s, 600 a tenth."""
        return len(getattr(self.kernel, "src", ""))

    def compile(self) -> Any:
        """Into Triton's cache on the disk, with what launches it; found there it takes a millisecond."""
        from triton.runtime import driver

        named = dict(zip(self.kernel.arg_names, self.arguments, strict=True))
        compiled = self.kernel.run(grid=(1,), warmup=True, **named, **dict(self.options))
        compile_launcher(compiled, driver.active.get_current_target().backend)
        return compiled


class Address:
    """A tensor as Triton's compiler looks at one."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self.address = x.dtype, int(x.storage_offset()) * x.element_size() % MULTIPLE

    def data_ptr(self) -> int:
        return self.address


def launch_of(kernel: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> Launch:
    """Of a kernel's call. kernel: a function of Triton, compiled or interpreted."""
    names = [each.name for each in kernel.params] if hasattr(kernel, "params") else list(kernel.arg_names)
    given = dict(zip(names, arguments, strict=False)) | {name: named[name] for name in names if name in named}
    with torch._C.DisableTorchFunction():  # what a tensor says of itself took two thirds of the time of a listing
        values = tuple(Address(x) if isinstance(x, Tensor) else x for x in (given[name] for name in names))
    forms = tuple(form_of(kernel, index, value) for index, value in enumerate(values))
    options = tuple(sorted((name, x) for name, x in named.items() if name not in names and x is not None))
    return Launch(kernel, kernel.__name__, forms, options, values)


def form_of(kernel: Any, index: int, value: Any) -> object:
    parameter = kernel.params[index]
    if parameter.is_constexpr:
        return str(value)
    if isinstance(value, Address):
        return str(value.dtype), not parameter.do_not_specialize and value.address == 0
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value).__name__
    whole = "i32" if -(2**31) <= value < 2**31 else "i64"
    return whole if parameter.do_not_specialize else (whole, value == 1, value % MULTIPLE == 0)


class _Driver:
    """Triton's, of a GPU that is not there."""

    def __init__(self, traits: GpuTraits) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(traits.backend, traits.capability, traits.warp_size)
        self.utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": traits.shared_bytes})

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextlib.contextmanager
def imagined_gpu(traits: GpuTraits) -> Iterator[dict[Launch, Launch]]:
    """What the body launches on `DEVICE`, each kernel once, in the order in which they first come. Of a process: there
    may be no other GPU in it, nor another thread that uses torch."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: dict[Launch, Launch] = {}
    run, launch, properties = JITFunction.run, LaunchedKernel.launch, torch.cuda.get_device_properties

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launch = launch_of(kernel, arguments, named)
        found.setdefault(launch, launch)

    told: Any = SimpleNamespace(multi_processor_count=traits.multiprocessors)
    driver.set_active(_Driver(traits))
    JITFunction.run = note
    # Of a process that was forked from one with a GPU, kernels know programs.
    LaunchedKernel.launch = lambda kernel, grid, *given, **named: (  # type: ignore[method-assign]
        kernel.function[grid](*given, **named)
    )
    torch.cuda.get_device_properties = lambda device=None: told
    try:
        with _OnGpu(), torch.inference_mode():
            yield found
    finally:
        JITFunction.run, torch.cuda.get_device_properties = run, properties
        LaunchedKernel.launch = launch  # type: ignore[method-assign]
