"""Triton's kernels, compiled in several threads before they are measured.

Each takes half a second to two at its first call, in which the compiler holds the interpreter's lock for little, and a
profile has some twenty of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from flexbatch.kernels import ops

logger = logging.getLogger("flexbatch")

HIDDEN, TOKENS, PAGE_TOKENS = 128, 16, 16
"""Of the small models whose passes are measured, all of them with one head."""


def compile_ahead(calls: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Make each call once, several at a time. One that fails does so again where it is measured, which tells more."""

    def call_once(call: Callable[[], object]) -> None:
        try:
            with torch.no_grad(), torch.cuda.device(device):
                call()
        except Exception as error:
            logger.debug("not compiled ahead: %s", error)

    first, *rest = calls
    call_once(first)  # what all of them load is loaded by one
    with ThreadPoolExecutor(max(1, min(len(calls), (os.cpu_count() or 1) - 1))) as pool:
        list(pool.map(call_once, rest))
    torch.cuda.synchronize(device)


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
