"""``python -m tests.kernels.launched_programs``: random launches of a kernel through Triton and through
`LaunchedKernel`, as JSON. A process of its own: Triton decides at import whether kernels are interpreted. There is no
GPU: programs are told by what Triton compiles them for, and note what they are launched with."""

from __future__ import annotations

import json
import random
from typing import Any

import torch
import triton
import triton.language as tl

from flexbatch.kernels.imagined_gpu import GpuTraits, _Driver
from flexbatch.kernels.launched import LaunchedKernel, launched


class Size(int):
    """As members of an enumeration are integers and of a type of their own."""


INTEGERS = (*(0, 1, 2, 15, 16, 17, 32, -1, -16), *(2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**62, 2**63))
UNTOLD = (Size(1), Size(16), Size(17), (16, 2), (17, 2), tl.constexpr(16), tl.constexpr(17))
UNTOLD += tuple(triton.reinterpret(torch.empty(64, dtype=torch.half), dtype) for dtype in (tl.int16, tl.bfloat16))
"""Whose type does not tell what Triton compiles a kernel for."""
DTYPES = (torch.float16, torch.bfloat16, torch.int32, torch.uint8)


@launched
@triton.jit(do_not_specialize=["changing"])
def kernel(x, y, changing, size, scale, flag, BLOCK: tl.constexpr, KIND: tl.constexpr):
    tl.store(y, tl.load(x) + changing + size + scale + flag + BLOCK + KIND)


class Program:
    """In the place of a compiled one."""

    name = "kernel"
    function = packed_metadata = None

    def __init__(self, key: Any, launches: list[Any]) -> None:
        self.key, self.launches = key, launches

    def launch_metadata(self, *told: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: int, *told: Any) -> None:
        """As Triton launches: five things of its own come before the arguments."""
        self.launches.append((self.key, (x, y, z), stream, told[5:]))

    def __getitem__(self, grid: Any) -> Any:
        def runner(*arguments: Any, stream: int) -> None:
            self.launches.append((self.key, tuple(grid[:3]), stream, arguments))

        return runner


def tensor(draw: random.Random) -> torch.Tensor:
    memory = torch.empty(512, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + draw.choice((0, 4, 8, 16))
    return memory[start : start + 256].view(draw.choice(DTYPES))


def main() -> None:
    launches: list[Any] = []
    triton.runtime.driver.set_active(_Driver(GpuTraits(90, 132, 232448)))
    compiler: Any = triton.compiler

    def compiled(source: Any, target: Any, options: Any, **told: Any) -> Program:
        """Told by all that a program is compiled for."""
        return Program((str(source.signature), str(source.constants), str(source.attrs), str(options)), launches)

    compiler.compile = compiled
    assert isinstance(kernel, LaunchedKernel)
    same, count = 0, 2000
    for index in range(2 * count):
        if index % count == 0:
            draw = random.Random(7)  # the same again, of new tensors
        arguments = (
            *(tensor(draw), tensor(draw), draw.choice(INTEGERS), draw.choice(INTEGERS)),
            *(draw.choice((0.5, 2.0)), draw.choice((None, True, False, 3, 1.5))),
        )
        named = {"BLOCK": draw.choice((16, 64)), "KIND": draw.choice(("a", "b")), "num_warps": draw.choice((4, 8))}
        grid = tuple(draw.randrange(1, 9) for _ in range(draw.randrange(1, 4)))
        kernel.function[grid](*arguments, **named)
        kernel[grid](*arguments, **named)
        expected, found = launches[-2:]
        same += expected[:3] == found[:3] and alike(expected[3], found[3])
    # Arguments that are no constants, by name: right, and never kept.
    before = len(kernel.programs)
    for size in range(20):
        kernel[(1,)](*arguments[:3], scale=0.5, flag=None, size=size, BLOCK=16, KIND="a")
    with_sizes = len({told[3][3] for told in launches[-20:]})
    right = 0
    for each in UNTOLD * 2:
        for launch in (kernel.function, kernel):
            launch[(1,)](*arguments[:3], each, 0.5, None, BLOCK=16, KIND="a")
        right += launches[-2][0] == launches[-1][0]
    print(
        json.dumps(
            {
                "launches": 2 * count,
                "same": same,
                "programs": len({key for key, *_ in launches}),
                "known": before,
                "kept_by_name": len(kernel.programs) - before,
                "untold": [right, 2 * len(UNTOLD)],
                "with_sizes": with_sizes,
            }
        )
    )


def alike(expected: Any, found: Any) -> bool:
    """The same tensors, and equal numbers of one type."""
    pairs = zip(expected, found, strict=True)
    return all(one is other or (type(one) is type(other) is not torch.Tensor and one == other) for one, other in pairs)


if __name__ == "__main__":
    main()
