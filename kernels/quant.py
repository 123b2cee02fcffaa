"""Group-wise quantization in Triton: weights, and keys and values straight into token rows.

Codes, parameters and dequantized values are bit for bit those of `reference` (hence no fused multiply-add there). A
*vector* is what is quantized along: a row of a weight, or one head of one key or value. Tiles are [vectors, groups,
elements or bytes of a group].
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexbatch.kernels import reference
from flexbatch.kernels.launched import launched
from flexbatch.kernels.whole_numbers import ceil_div, next_power_of_2

TILE_BYTES = 2048
"""Code bytes of a tile."""


@launched
@triton.jit(do_not_specialize=["num_vectors"])  # another number every pass: see attention_kernels
def _quantize_kernel(
    x0, x1, codes, parameters, slots, num_vectors, size, x_token, code_token, parameter_token,
    code_side, parameter_base, parameter_side, HEADS: tl.constexpr, HEAD_CODES: tl.constexpr,
    HEAD_PARAMETERS: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Grid (vectors, groups, sides). Vector = token * HEADS + head; side 0 reads ``x0`` (keys), side 1 ``x1`` (values).
    Arguments named ``*_token`` are the distances of two tokens, ``*_side`` those of the two sides.

    WHOLE: every group fills its part of the tile, so only the tile's edges are masked.
    """
    PIECES: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = (1 << BITS) - 1
    side = tl.program_id(2)
    vector = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)[:, None, None]
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :, None]
    element = tl.arange(0, BLOCK_B * PIECES)[None, None, :]
    byte = tl.arange(0, BLOCK_B)[None, None, :]
    token = (vector // HEADS).to(tl.int64)
    head = vector % HEADS
    x = x0
    if side == 1:
        x = x1
    has_group = (vector < num_vectors) & (group * GROUP < size)
    inside = has_group if WHOLE else has_group & (element < GROUP) & (group * GROUP + element < size)
    value = tl.load(x + token * x_token + (head * size + group * GROUP + element), mask=inside, other=0.0).to(
        tl.float32
    )
    scale, minimum = _scale_and_minimum(value, inside, parameters, LEVELS, WHOLE)
    row = tl.load(slots + token, mask=vector < num_vectors, other=0).to(tl.int64) if SLOTS else token
    pair = parameters + row * parameter_token + parameter_base + side * parameter_side + head * HEAD_PARAMETERS
    tl.store(pair + group * 2, scale, mask=has_group)
    tl.store(pair + group * 2 + 1, minimum, mask=has_group)
    packed = _code(value, minimum.to(tl.float32), scale.to(tl.float32), LEVELS)
    if not WHOLE:
        packed = tl.where(inside, packed, 0)
    if BITS == 4:
        even, odd = tl.split(packed.reshape(BLOCK_V, BLOCK_G, BLOCK_B, 2))
        packed = even | (odd << 4)
    target = codes + row * code_token + side * code_side + head * HEAD_CODES + (group * (GROUP // PIECES) + byte)
    has_byte = has_group if WHOLE else has_group & (byte * PIECES < GROUP) & (group * GROUP + byte * PIECES < size)
    tl.store(target, packed.to(tl.uint8), mask=has_byte)


@triton.jit
def _scale_and_minimum(value, inside, parameters, LEVELS: tl.constexpr, WHOLE: tl.constexpr):
    """The parameters [vectors, groups, 1] of float32 values [vectors, groups, elements], rounded to their dtype."""
    dtype: tl.constexpr = parameters.dtype.element_ty
    least = tl.min(value if WHOLE else tl.where(inside, value, float("inf")), 2)
    # A reduction passes over a NaN: an overflow must stay visible. + 0 makes one zero of two, whichever came first.
    least = tl.where(tl.max((value != value).to(tl.int32), 2) > 0, float("nan"), least + 0.0)
    minimum = least.expand_dims(2).to(dtype)
    most = tl.max(value if WHOLE else tl.where(inside, value, float("-inf")), 2).expand_dims(2)
    extent = most + 0.0 - minimum.to(tl.float32)
    scale = tl.div_rn(extent, tl.full(extent.shape, LEVELS, tl.float32))
    return tl.where(scale < 0, 0.0, scale).to(dtype), minimum  # unlike a maximum, where() keeps NaN


@triton.jit
def _code(value, floor, step, LEVELS: tl.constexpr):
    """Nearest code, ties to even: adding 1.5 * 2^23 leaves no fraction bits and the code in the lowest ones.

    The quotient comes from one reciprocal a group and a fused correction (Markstein 1990, "Computation of
    elementary functions on the IBM RISC System/6000 processor"): a division an element costs more than the memory
    traffic. Steps below 2^-64 are multiplied by 2^64, and what they divide too: the reciprocal of the smallest ones
    is no finite number.
    """
    step = tl.where(step < float("inf"), step, 0.0)  # NaN too: codes of 0
    lift = tl.where(step < 5.421010862427522e-20, 18446744073709551616.0, 1.0)
    step = step * lift
    inverse = tl.where(step > 0, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), tl.where(step > 0, step, 1.0)), 0.0)
    inverse = tl.broadcast_to(inverse, value.shape)
    extent = (value - floor) * lift
    code = extent * inverse
    rest = tl.fma(-code, tl.broadcast_to(step, value.shape), extent)
    code = tl.fma(rest, inverse, code)
    code = tl.minimum(tl.maximum(code, 0.0), LEVELS)
    return (code + 12582912.0).to(tl.int32, bitcast=True) & LEVELS


@launched
@triton.jit
def _dequantize_kernel(
    codes, parameters, out, num_vectors, size, code_vector, parameter_vector, out_vector,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid (vectors, groups). Arguments named ``*_vector`` are the distances of two vectors."""
    PIECES: tl.constexpr = 8 // BITS
    vector = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)[:, None, None]
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :, None]
    byte = tl.arange(0, BLOCK_B)[None, None, :]
    row = vector.to(tl.int64)
    has_vector = vector < num_vectors
    has_group = has_vector & (group * GROUP < size)
    has_byte = has_vector & (byte * PIECES < GROUP) & (group * GROUP + byte * PIECES < size)
    pair = parameters + row * parameter_vector + group * 2
    scale = tl.load(pair, mask=has_group, other=0.0).to(tl.float32)
    minimum = tl.load(pair + 1, mask=has_group, other=0.0).to(tl.float32)
    packed = tl.load(codes + row * code_vector + (group * (GROUP // PIECES) + byte), mask=has_byte, other=0)
    if BITS == 4:
        even = (packed & 15).to(tl.float32) * scale + minimum
        odd = (packed >> 4).to(tl.float32) * scale + minimum
        value = tl.interleave(even, odd)  # neighbors in one thread: wide stores
        within = tl.arange(0, 2 * BLOCK_B)[None, None, :]
    else:
        value = packed.to(tl.float32) * scale + minimum
        within = byte
    element = group * GROUP + within
    mask = has_vector & (within < GROUP) & (element < size)
    tl.store(out + row * out_vector + element, value.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class QuantizeLaunch:
    """Code bytes of a tile, and warps of a program."""

    tile_bytes: int = TILE_BYTES
    num_warps: int = 2


LAUNCHES = {8: QuantizeLaunch(2048), 4: QuantizeLaunch(1024)}
"""The launch by bits. On the H200 3,115 and 2,479 GB/s; with a division for each element and four warps 1,900 and
1,470."""


@launched
@triton.jit
def _store_kernel(key, value, rows, slots, key_token, value_token, row_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Keys and values of one token as they are. Grid (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, BLOCK)
    inside = element < SIZE
    k = tl.load(key + token * key_token + element, mask=inside, other=0.0)
    v = tl.load(value + token * value_token + element, mask=inside, other=0.0)
    target = rows + tl.load(slots + token) * row_stride + element
    tl.store(target, k, mask=inside)
    tl.store(target + SIZE, v, mask=inside)


def _whole(size: int, bits: int, group: int, block_b: int) -> bool:
    """Whether every group of a vector fills its part of a tile."""
    return size % group == 0 and block_b * 8 // bits == group


@functools.cache
def _tile(size: int, bits: int, group: int, tile_bytes: int = TILE_BYTES) -> tuple[int, int, int]:
    """Vectors, groups and code bytes per group of a tile of about ``tile_bytes``. Raises ValueError."""
    if bits == 4 and group % 2:
        raise ValueError(
            f"4-bit codes on the GPU need groups of an even number of elements, got {group}: two codes share a byte"
        )
    block_b = next_power_of_2(-(-min(group, size) * bits // 8))
    block_g = min(next_power_of_2(reference.num_groups(size, group)), max(1, tile_bytes // block_b))
    return max(1, tile_bytes // (block_b * block_g)), block_g, block_b


def quantize(x: Tensor, bits: int, group: int, launch: QuantizeLaunch | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize`; ``launch`` is that of `LAUNCHES` unless given. Raises ValueError for 4 bits in groups of
    an odd number of elements."""
    launch = launch or LAUNCHES[bits]
    size = x.shape[-1]
    flat = x.reshape(-1, size)
    vectors, groups, code_bytes = len(flat), reference.num_groups(size, group), reference.code_bytes(size, bits)
    codes = torch.empty(vectors, code_bytes, dtype=torch.uint8, device=x.device)
    parameters = torch.empty(vectors, groups, 2, dtype=x.dtype, device=x.device)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    block_v, block_g, block_b = _tile(size, bits, group, launch.tile_bytes)
    _quantize_kernel[(ceil_div(vectors, block_v), ceil_div(groups, block_g), 1)](
        flat, flat, codes, parameters, codes, vectors, size, flat.stride(0), code_bytes, 2 * groups, 0, 0, 0,
        HEADS=1, HEAD_CODES=0, HEAD_PARAMETERS=0, SLOTS=False, BITS=bits, GROUP=group,
        BLOCK_V=block_v, BLOCK_G=block_g, BLOCK_B=block_b, WHOLE=_whole(size, bits, group, block_b),
        num_warps=launch.num_warps,
    )  # fmt: skip
    return codes.view(*x.shape[:-1], code_bytes), parameters.view(*x.shape[:-1], groups, 2)


def dequantize(
    codes: Tensor, parameters: Tensor, size: int, bits: int, group: int, out: Tensor | None = None
) -> Tensor:
    """`reference.dequantize`, into ``out`` [..., size] (dense) where it is given. Raises ValueError for 4 bits in
    groups of an odd number of elements."""
    out = torch.empty(*codes.shape[:-1], size, dtype=parameters.dtype, device=codes.device) if out is None else out
    codes, parameters = codes.reshape(-1, codes.shape[-1]), parameters.reshape(-1, *parameters.shape[-2:])
    flat, vectors = out.view(-1, size), len(codes)
    block_v, block_g, block_b = _tile(size, bits, group)
    _dequantize_kernel[(ceil_div(vectors, block_v), ceil_div(reference.num_groups(size, group), block_g))](
        codes, parameters, flat, vectors, size, codes.stride(0), parameters.stride(0), flat.stride(0),
        BITS=bits, GROUP=group, BLOCK_V=block_v, BLOCK_G=block_g, BLOCK_B=block_b, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def append_rows(rows: Tensor, slots: Tensor, key: Tensor, value: Tensor, bits: int = 16, group: int = 64) -> None:
    """`reference.append_rows`; rows may lie in pinned host memory. Raises ValueError where the layout of parameters
    is misaligned."""
    num_tokens, heads, head_dim = key.shape
    key, value = (
        x if x.stride() == key.stride() and x.stride()[1:] == (head_dim, 1) else x.contiguous() for x in (key, value)
    )
    if num_tokens == 0:
        return
    if bits == 16:
        size, block = heads * head_dim, next_power_of_2(heads * head_dim)
        assert rows.stride()[1:] == (size, head_dim, 1), f"token rows must be dense, got strides {rows.stride()}"
        _store_kernel[(num_tokens,)](
            key, value, rows, slots, key.stride(0), value.stride(0), rows.stride(0),
            SIZE=size, BLOCK=block, num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
        return
    codes, groups = reference.code_bytes(head_dim, bits), reference.num_groups(head_dim, group)
    width = key.element_size()
    if rows.stride(0) % width or 2 * heads * codes % width:
        raise ValueError(
            f"parameters of {width} bytes are misaligned in token rows of {rows.shape[1]} bytes ({heads} heads of "
            f"{head_dim}, {bits} bits)"
        )
    block_v, block_g, block_b = _tile(head_dim, bits, group)
    assert block_g >= groups, f"{groups} groups of a head do not fit one tile"
    _quantize_kernel[(ceil_div(num_tokens * heads, block_v), 1, 2)](
        key, value, rows, rows.view(key.dtype), slots, num_tokens * heads, head_dim,
        key.stride(0), rows.stride(0), rows.stride(0) // width,
        heads * codes, 2 * heads * codes // width, heads * groups * 2,
        HEADS=heads, HEAD_CODES=codes, HEAD_PARAMETERS=groups * 2, SLOTS=True, BITS=bits, GROUP=group,
        BLOCK_V=block_v, BLOCK_G=block_g, BLOCK_B=block_b, WHOLE=_whole(head_dim, bits, group, block_b),
    )  # fmt: skip
