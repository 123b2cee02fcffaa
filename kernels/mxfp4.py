"""MXFP4 to 16 or 32 bits in Triton, bit for bit as `mxfp4_reference`: one trip through memory, a byte of codes to two
weights beside each other."""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexbatch.kernels.launched import launched
from flexbatch.kernels.mxfp4_reference import BLOCK
from flexbatch.kernels.whole_numbers import ceil_div

TILE_BYTES = 2048
"""Code bytes of a program."""


@triton.jit
def _value(code, scale):
    """Codes and scales as integers of 32 bits to float32. The bits of a float of 4 bits are put in those of one of 32:
    exponents 1 to 3 become 127 to 129, and what has none is 0 or 0.5."""
    magnitude = code & 7
    bits = ((magnitude >> 1) + 126) << 23 | (magnitude & 1) << 22
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, bits.to(tl.float32, bitcast=True))
    value = tl.where(code > 7, -value, value)
    # The scale in two factors: 2^-127 is no normal number.
    low = scale >> 1
    first = ((low + 64) << 23).to(tl.float32, bitcast=True)
    second = ((scale - low + 63) << 23).to(tl.float32, bitcast=True)
    return value * first * second


@launched
@triton.jit
def _expand_kernel(codes, scales, out, num_bytes, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Grid (tiles of code bytes). Rows are whole blocks, so that all of them are one long row."""
    byte = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = byte < num_bytes
    code = tl.load(codes + byte, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scales + byte // (BLOCK // 2), mask=mask, other=127).to(tl.int32)
    value = tl.interleave(_value(code & 15, scale), _value(code >> 4, scale))
    element = tl.program_id(0).to(tl.int64) * (2 * TILE) + tl.arange(0, 2 * TILE)
    tl.store(out + element, value.to(out.dtype.element_ty), mask=element < 2 * num_bytes)


def expand(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`mxfp4_reference.expand`, of dense tensors, into ``out`` where it is given."""
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    out = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
    assert codes.is_contiguous() and scales.is_contiguous() and out.is_contiguous(), "MXFP4 is expanded in one piece"
    if codes.numel():
        _expand_kernel[(ceil_div(codes.numel(), TILE_BYTES),)](
            codes, scales, out, codes.numel(), BLOCK=BLOCK, TILE=TILE_BYTES
        )
    return out
