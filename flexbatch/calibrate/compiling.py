"""Triton's kernels, compiled in several processes before they are measured.

Each takes half a second to two at its first call, and a profile has some twenty of them: 16 s on an H100's host.
Several threads took the same 16 s, as the compiler holds the interpreter's lock; processes hand their work on by
Triton's cache on the disk, where the first job finds it, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from flexbatch.kernels import ops
from flexbatch.parallel.processes import PACKAGE_ROOT

logger = logging.getLogger("flexbatch")

HIDDEN, TOKENS, PAGE_TOKENS = 128, 16, 16
"""Of the small models whose passes are measured, all of them with one head."""
MOST_PROCESSES = 8
"""Each takes 4 s to begin and 0.5 GB of the GPU."""
LIMIT_SECONDS = 60.0


@contextlib.contextmanager
def compiled_ahead(device: torch.device, processes: int = MOST_PROCESSES) -> Iterator[None]:
    """Others make the calls of a profile once, which compiles their kernels, while the body runs. What they do not get
    done is compiled where it is measured."""
    count = max(1, min(processes, (os.cpu_count() or 1) - 1))
    code = (
        f"import sys; sys.path.insert(0, {str(PACKAGE_ROOT)!r}); from {__name__} import call_part; "
        f"call_part({str(device)!r}, int(sys.argv[1]), {count})"
    )
    workers: list[subprocess.Popen[bytes]] = []
    until = time.monotonic() + LIMIT_SECONDS
    try:
        with contextlib.suppress(OSError):
            for part in range(count):
                workers.append(begun([sys.executable, "-c", code, str(part)]))
        yield
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.0, until - time.monotonic()))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def begun(command: list[str]) -> subprocess.Popen[bytes]:
    """A process that says nothing: of Ctrl-C, of a GPU that takes one process alone, or of memory, it is said where it
    is measured, and once."""
    silent = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=silent, stdout=silent, stderr=silent)


def call_part(device: str, part: int, parts: int) -> None:
    """In one of the processes: every ``parts``-th call of a profile. One that fails does so again where it is measured,
    which tells more."""
    from flexbatch.calibrate.kernels import calls_of_a_profile

    dev = torch.device(device)
    with torch.no_grad(), torch.cuda.device(dev):
        for call in calls_of_a_profile(dev, torch.bfloat16)[part::parts]:
            make(call)
        torch.cuda.synchronize(dev)


def make(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:
        logger.debug("not compiled ahead: %s", error)


def small_pass_calls(device: torch.device) -> list[Callable[[], object]]:
    """What a layer of a small model calls beside attention."""
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
    residual, weight = torch.ones_like(x), torch.ones_like(x[0])
    heads = [torch.ones(TOKENS, 1, HIDDEN, dtype=x.dtype, device=device) for _ in range(3)]
    cos, sin = (torch.ones(1024, HIDDEN // 2, dtype=x.dtype, device=device) for _ in range(2))
    slots = torch.arange(TOKENS, device=device)
    rows = torch.zeros(TOKENS * PAGE_TOKENS, 2, 1, HIDDEN, dtype=x.dtype, device=device)
    matrix = torch.ones(HIDDEN, HIDDEN, dtype=x.dtype, device=device)

    def expand() -> None:
        codes, parameters = ops.quantize(matrix, 8, HIDDEN // 2)
        ops.dequantize(codes, parameters, HIDDEN, 8, HIDDEN // 2, out=torch.empty_like(matrix))

    return [
        lambda: ops.rms_norm(x, weight, 1e-5),
        lambda: ops.rms_norm(x, weight, 1e-5, residual=residual),
        lambda: ops.rotary(heads[0], heads[1], cos, sin, slots, rotary_dim=HIDDEN),
        lambda: ops.gated_activation(x.repeat(1, 2), "silu"),
        lambda: ops.append_rows(rows, slots, heads[1], heads[2]),
        expand,
    ]
