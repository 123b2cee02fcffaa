"""Kernels of Triton, launched with less Python.

For every launch Triton works out anew which of its compiled programs the arguments need, sorts constants from options
and looks for changed globals, and its launches are a third of the time of passes that wait for the host (OPT-125M with
4 bits, 12 ticks a pass, 18 kernels a tick). A program that was found once is found again by what its choice depends
on, and launched by Triton's own `CompiledKernel`. A kernel of four arguments then takes an H200's host 11.3 us and not
12.8 in a row of others (Triton 3.6), a product in codes without the driver 6.5 and not 11.2 (3.9).

                             kernel[grid](x, n, BLOCK=64, num_warps=4)
                                              |
       device, names and values of constants and options, form of each argument   --known-->  its program
                                              | not known                                         |
                              Triton compiles it, or loads it                                  launched
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

MULTIPLE = 16
"""Of integers and addresses, which Triton compiles kernels for."""
LARGEST = 2**31, 2**63
"""Integers from these on are of another type, as those below the first's opposite are."""


def launched(function: Any) -> Any:
    """A decorator for what `triton.jit` makes of a kernel that the host launches: not of one that others call. What is
    interpreted, and kernels for AMD's GPUs, whose programs also depend on the sizes of tensors, stay as they are."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    is_compiled = isinstance(function, JITFunction) and torch.version.hip is None
    return LaunchedKernel(function, driver) if is_compiled else function


def form_of(argument: Any) -> object:
    """What the choice of a program depends on, at most: Triton may look at less of it."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % MULTIPLE
    if type(argument) is int:
        sizes = -LARGEST[0] <= argument < LARGEST[0], argument >= LARGEST[1]
        return argument == 1, argument % MULTIPLE == 0, sizes
    return type(argument)


def is_told(argument: Any) -> bool:
    """Whether `form_of` has all that the choice of a program depends on. Of a tuple, of a subclass of integers or of
    what stands for a tensor it has not: a program for multiples of 16 would be launched with 17."""
    return argument is None or isinstance(argument, Tensor) or type(argument) in (int, float, bool)


class LaunchedKernel:
    """A kernel and its programs. Constants and options are given by name; a constant has one type in all calls."""

    def __init__(self, function: Any, driver: Any) -> None:
        """Both Triton's."""
        self.function, self.driver = function, driver
        self.programs: dict[tuple[object, ...], tuple[Any, tuple[Any, ...]]] = {}
        """With the constants that they are given after other arguments, in the order of the kernel's."""

    def __getitem__(self, grid: Sequence[int] | Callable[..., Sequence[int]]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: Any, *arguments: Any, **named: Any) -> None:
        active = self.driver.active
        device = active.get_current_device()
        # As `form_of` has them: most arguments are tensors, and a call of it takes as long as what it does.
        forms = [(x.dtype, x.data_ptr() % MULTIPLE) if type(x) is Tensor else form_of(x) for x in arguments]
        key = device, *named, *named.values(), *forms
        known = self.programs.get(key)
        if known is not None and not callable(grid):
            program, constants = known
            three = (*grid, 1, 1)
            program[three](*arguments, *constants, stream=active.get_current_stream(device))
            return
        program, last = self.function[grid](*arguments, **named), self.constants(len(arguments), named)
        if program is not None and last is not None and all(map(is_told, arguments)):
            self.programs[key] = program, last

    def constants(self, count: int, named: dict[str, Any]) -> tuple[Any, ...] | None:
        """Of a launch with so many arguments that are not named. None where a program must not be kept: other arguments
        are named, which differ from launch to launch, or constants are not."""
        parameters = self.function.params
        constant = [each.name for each in parameters if each.is_constexpr]
        given, rest = parameters[:count], [each.name for each in parameters[count:]]
        if rest != [name for name in constant if name in named] or any(each.is_constexpr for each in given):
            return None
        return tuple(named[name] for name in rest)
