"""What a profile measures on a GPU, compiled before: some twenty kernels take 16 s one after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from flexbatch.execution.kernels_ahead import Announced
from flexbatch.kernels import ops
from flexbatch.kernels.imagined_gpu import DEVICE

logger = logging.getLogger("flexbatch")

HIDDEN, TOKENS, PAGE_TOKENS = 128, 16, 16
"""Of the small models whose passes are measured, all of them with one head."""


def profile_kernels(dtype: torch.dtype) -> Announced:
    """For `kernels_ahead.compiled_ahead`."""
    return Announced(launch_calls, dtype)


def launch_calls(dtype: torch.dtype) -> None:
    """On an imagined GPU every call of a profile. One that fails does so again where it is measured, which tells
    more."""
    from flexbatch.calibrate.kernels import calls_of_a_profile

    for call in calls_of_a_profile(DEVICE, dtype):
        make(call)


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
