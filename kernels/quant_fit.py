"""The search for the parameters of least squared error in Triton: `reference.fit` with a group in registers.

Plain torch passes over the weights some 400 times; here they are read once, so that quantizing takes no longer than
reading a checkpoint does.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexbatch.kernels import quant, reference
from flexbatch.kernels.launched import launched
from flexbatch.kernels.quant import _code
from flexbatch.kernels.whole_numbers import ceil_div, next_power_of_2

TILE_ELEMENTS = 2048


@launched
@triton.jit(do_not_specialize=["num_groups"])
def _fit_kernel(
    x, plain, shrinks, codes, parameters, num_groups, size, x_row, code_row, GROUPS, GROUP: tl.constexpr,
    ELEMENTS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, SHRINKS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Grid (groups,): BLOCK groups of all rows, one after another. ``plain``: parameters of the range, where the search
    starts."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    dtype: tl.constexpr = parameters.dtype.element_ty
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    there = index < num_groups
    row, group = (index // GROUPS).to(tl.int64), index % GROUPS
    element = tl.arange(0, ELEMENTS)[None, :]
    inside = element < GROUP
    # The last element of a row repeated, where its last group is not full.
    column = tl.minimum(group * GROUP + element, size - 1)
    y = tl.load(x + row * x_row + column, mask=there & inside, other=0.0).to(tl.float32)
    low = tl.min(tl.where(inside, y, float("inf")), 1)[:, None]
    high = tl.max(tl.where(inside, y, float("-inf")), 1)[:, None]
    middle, half, mean_y = (low + high) / 2, (high - low) / 2, tl.sum(y, 1)[:, None] / GROUP
    pair = index.to(tl.int64) * 2
    best_scale = tl.load(plain + pair, mask=there, other=0.0).to(tl.float32)
    best_minimum = tl.load(plain + pair + 1, mask=there, other=0.0).to(tl.float32)
    plain_scale, plain_minimum = best_scale, best_minimum
    best_error = tl.full((BLOCK, 1), float("inf"), tl.float32)
    for candidate in range(SHRINKS * SHRINKS + 1):
        chosen = tl.maximum(candidate - 1, 0)
        below, above = tl.load(shrinks + chosen // SHRINKS), tl.load(shrinks + chosen % SHRINKS)
        scale = tl.where(candidate == 0, plain_scale, (below + above) * half / LEVELS)
        minimum = tl.where(candidate == 0, plain_minimum, middle - below * half)
        for _ in range(STEPS + 1):
            scale, minimum = scale.to(dtype).to(tl.float32), minimum.to(dtype).to(tl.float32)
            code = _code(y, minimum, scale, LEVELS).to(tl.float32)
            gap = tl.where(inside, code * scale + minimum - y, 0.0)
            error = tl.sum(gap * gap, 1)[:, None]
            better = error < best_error
            best_scale, best_minimum = tl.where(better, scale, best_scale), tl.where(better, minimum, best_minimum)
            best_error = tl.where(better, error, best_error)
            mean = tl.sum(tl.where(inside, code, 0.0), 1)[:, None] / GROUP
            code = tl.where(inside, code - mean, 0.0)
            scale = tl.sum(code * y, 1)[:, None] / tl.maximum(tl.sum(code * code, 1)[:, None], 1.0)
            minimum = mean_y - mean * scale
    tl.store(parameters + pair, best_scale.to(dtype), mask=there)
    tl.store(parameters + pair + 1, best_minimum.to(dtype), mask=there)
    held = inside & (group * GROUP + element < size)
    code = tl.where(held, _code(y, best_minimum, best_scale, LEVELS), 0)
    PIECES: tl.constexpr = 8 // BITS
    byte = tl.arange(0, ELEMENTS // PIECES)[None, :]
    if BITS == 4:
        even, odd = tl.split(code.reshape(BLOCK, ELEMENTS // 2, 2))
        code = even | (odd << 4)
    stored = there & (byte * PIECES < GROUP) & (group * GROUP + byte * PIECES < size)
    tl.store(codes + row * code_row + group * (GROUP // PIECES) + byte, code.to(tl.uint8), mask=stored)


def fit(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """`reference.fit` of x [rows, size] on a GPU, to rounding: sums run in another order, and of two parameters that
    are as good the other may be found."""
    x = x.contiguous()
    (rows, size), groups = x.shape, reference.num_groups(x.shape[1], group)
    _, plain = quant.quantize(x, bits, group)
    codes = torch.empty(rows, -(-size * bits // 8), dtype=torch.uint8, device=x.device)
    parameters = torch.empty_like(plain)
    elements = next_power_of_2(group)
    block = max(1, TILE_ELEMENTS // elements)
    shrinks = torch.tensor(reference.FIT_SHRINKS, device=x.device)
    _fit_kernel[(ceil_div(rows * groups, block),)](
        x, plain, shrinks, codes, parameters, rows * groups, size, x.stride(0), codes.stride(0), groups,
        GROUP=group, ELEMENTS=elements, BLOCK=block, BITS=bits, SHRINKS=len(reference.FIT_SHRINKS),
        STEPS=reference.FIT_STEPS,
    )  # fmt: skip
    return codes, parameters
