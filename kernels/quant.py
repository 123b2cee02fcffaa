"""Group-wise quantisation in Triton: weights, and keys and values straight into token rows; products of few tokens with
quantised weights.

Codes, parameters and expanded values are bit for bit those of `reference` (hence no fused multiply-add there). A
*vector* is what is quantised along: a row of a weight (or a column, dim=0), one head of one key or value. Tiles are
[vectors, groups, elements or bytes of a group].
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexbatch.kernels import reference

TILE_BYTES = 2048  # code bytes of a tile


@triton.jit(do_not_specialize=["num_vectors"])  # another number every pass: see attention_kernels
def _quantize_kernel(x0, x1, codes, parameters, slots, num_vectors, size, x_token, x_step, code_token, code_step, parameter_token, parameter_step,
                     code_side, parameter_base, parameter_side, HEADS: tl.constexpr, HEAD_CODES: tl.constexpr, HEAD_PARAMETERS: tl.constexpr,
                     SLOTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr,
                     BLOCK_B: tl.constexpr, WHOLE: tl.constexpr, RECIPROCAL: tl.constexpr):  # fmt: skip
    """Grid (vectors, groups, sides). Vector = token * HEADS + head; ``x1``: what the second side (values) reads. Steps:
    between elements.

    WHOLE: every group fills its part of the tile, so only the tile's edges are masked. RECIPROCAL: see `_code`.
    """
    PIECES: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = (1 << BITS) - 1
    side = tl.program_id(2)
    vector = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)[:, None, None]
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :, None]
    within = tl.arange(0, BLOCK_B * PIECES)[None, None, :]
    byte = tl.arange(0, BLOCK_B)[None, None, :]
    token = (vector // HEADS).to(tl.int64)
    head = vector % HEADS
    x = x0
    if side == 1:
        x = x1
    dtype: tl.constexpr = x0.dtype.element_ty
    has_group = (vector < num_vectors) & (group * GROUP < size)
    inside = has_group if WHOLE else has_group & (within < GROUP) & (group * GROUP + within < size)
    value = tl.load(x + token * x_token + (head * size + group * GROUP + within) * x_step, mask=inside, other=0.0).to(
        tl.float32
    )
    least = tl.min(value if WHOLE else tl.where(inside, value, float("inf")), 2)
    # A reduction passes over a NaN: an overflow must stay visible. + 0 makes one zero of two, whichever came first.
    least = tl.where(tl.max((value != value).to(tl.int32), 2) > 0, float("nan"), least + 0.0)
    minimum = least.expand_dims(2).to(dtype)
    floor = minimum.to(tl.float32)
    reach = tl.max(value if WHOLE else tl.where(inside, value, float("-inf")), 2).expand_dims(2) + 0.0 - floor
    scale = tl.div_rn(reach, tl.full(reach.shape, LEVELS, tl.float32))
    scale = tl.where(scale < 0, 0.0, scale).to(dtype)  # unlike a maximum it keeps NaN
    place = tl.load(slots + token, mask=vector < num_vectors, other=0).to(tl.int64) if SLOTS else token
    pair = (
        parameters
        + place * parameter_token
        + parameter_base
        + side * parameter_side
        + head * HEAD_PARAMETERS
        + group * 2 * parameter_step
    )
    tl.store(pair, scale, mask=has_group)
    tl.store(pair + parameter_step, minimum, mask=has_group)
    packed = _code(value, floor, scale.to(tl.float32), LEVELS, RECIPROCAL)
    if not WHOLE:
        packed = tl.where(inside, packed, 0)
    if BITS == 4:
        even, odd = tl.split(packed.reshape(BLOCK_V, BLOCK_G, BLOCK_B, 2))
        packed = even | (odd << 4)
    target = (
        codes
        + place * code_token
        + side * code_side
        + head * HEAD_CODES
        + (group * (GROUP // PIECES) + byte) * code_step
    )
    has_byte = (
        has_group
        if WHOLE
        else (vector < num_vectors) & (byte * PIECES < GROUP) & (group * GROUP + byte * PIECES < size)
    )
    tl.store(target, packed.to(tl.uint8), mask=has_byte)


@triton.jit
def _code(value, floor, step, LEVELS: tl.constexpr, RECIPROCAL: tl.constexpr):
    """Nearest code, ties to even: adding 1.5 * 2^23 leaves no fraction bits and the code in the lowest ones.

    RECIPROCAL: the quotient from one reciprocal a group and a fused correction (Markstein 1990, "Computation of
    elementary functions on the IBM RISC System/6000 processor"): a division an element costs more than the memory
    traffic. Steps below 2^-64 are multiplied by 2^64, and what they divide too: the reciprocal of the smallest ones
    is no finite number.
    """
    step = tl.where(step < float("inf"), step, 0.0)  # NaN too: codes of 0
    if RECIPROCAL:
        lift = tl.where(step < 5.421010862427522e-20, 18446744073709551616.0, 1.0)
        step = step * lift
        inverse = tl.where(
            step > 0, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), tl.where(step > 0, step, 1.0)), 0.0
        )
        inverse = tl.broadcast_to(inverse, value.shape)
        reach = (value - floor) * lift
        code = reach * inverse
        rest = tl.fma(-code, tl.broadcast_to(step, value.shape), reach)
        code = tl.fma(rest, inverse, code)
    else:
        wide = tl.broadcast_to(step, value.shape)
        code = tl.where(wide > 0, tl.div_rn(value - floor, tl.where(wide > 0, wide, 1.0)), 0.0)
    code = tl.minimum(tl.maximum(code, 0.0), LEVELS)
    return (code + 12582912.0).to(tl.int32, bitcast=True) & LEVELS


@triton.jit
def _dequantize_kernel(codes, parameters, out, num_vectors, size, code_vector, code_step, parameter_vector, parameter_step, out_vector, out_step,
                       BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """Grid (vectors, groups)."""
    PIECES: tl.constexpr = 8 // BITS
    vector = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)[:, None, None]
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :, None]
    byte = tl.arange(0, BLOCK_B)[None, None, :]
    row = vector.to(tl.int64)
    has_vector = vector < num_vectors
    has_group = has_vector & (group * GROUP < size)
    has_byte = has_vector & (byte * PIECES < GROUP) & (group * GROUP + byte * PIECES < size)
    pair = parameters + row * parameter_vector + group * 2 * parameter_step
    scale = tl.load(pair, mask=has_group, other=0.0).to(tl.float32)
    minimum = tl.load(pair + parameter_step, mask=has_group, other=0.0).to(tl.float32)
    packed = tl.load(codes + row * code_vector + (group * (GROUP // PIECES) + byte) * code_step, mask=has_byte, other=0)
    if BITS == 4:
        even = (packed & 15).to(tl.float32) * scale + minimum
        odd = (packed >> 4).to(tl.float32) * scale + minimum
        value = tl.interleave(even, odd)  # neighbours in one thread: wide stores
        within = tl.arange(0, 2 * BLOCK_B)[None, None, :]
    else:
        value = packed.to(tl.float32) * scale + minimum
        within = byte
    element = group * GROUP + within
    tl.store(
        out + row * out_vector + element * out_step,
        value.to(out.dtype.element_ty),
        mask=has_vector & (within < GROUP) & (element < size),
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(x, codes, parameters, out, num_tokens, num_outputs, size, x_token, code_row, parameter_row, out_split, BITS: tl.constexpr,
                   GROUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    """out[split] = x @ weight.T over this split's groups; weights are expanded in registers. Grid (outputs, splits)."""
    PIECES: tl.constexpr = 8 // BITS
    BLOCK_B: tl.constexpr = GROUP // PIECES
    token = tl.arange(0, BLOCK_T)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = tl.cdiv(size, GROUP)
    share = tl.cdiv(tl.cdiv(groups, BLOCK_G), SPLITS) * BLOCK_G
    first = tl.program_id(1) * share
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    row = output.to(tl.int64)[:, None, None]
    has_row = (output < num_outputs)[:, None, None]
    byte = tl.arange(0, BLOCK_B)[None, None, :]
    for begin in range(first, tl.minimum(first + share, groups), BLOCK_G):
        group = begin + tl.arange(0, BLOCK_G)[None, :, None]
        pair = parameters + row * parameter_row + group * 2
        scale = tl.load(pair, mask=has_row & (group < groups), other=0.0).to(tl.float32)
        minimum = tl.load(pair + 1, mask=has_row & (group < groups), other=0.0).to(tl.float32)
        column = group * BLOCK_B + byte
        packed = tl.load(codes + row * code_row + column, mask=has_row & (column * PIECES < size), other=0)
        element = (begin * BLOCK_B + tl.arange(0, BLOCK_G * BLOCK_B)) * PIECES
        source = x + token[:, None] * x_token + element[None, :]
        x0 = tl.load(source, mask=(token < num_tokens)[:, None] & (element < size)[None, :], other=0.0)
        even = packed & 15 if BITS == 4 else packed
        weight = (even.to(tl.float32) * scale + minimum).to(x.dtype.element_ty).reshape(BLOCK_N, BLOCK_G * BLOCK_B)
        acc = tl.dot(x0, tl.trans(weight), acc, input_precision="ieee")
        if BITS == 4:
            x1 = tl.load(source + 1, mask=(token < num_tokens)[:, None] & (element + 1 < size)[None, :], other=0.0)
            weight = (
                ((packed >> 4).to(tl.float32) * scale + minimum)
                .to(x.dtype.element_ty)
                .reshape(BLOCK_N, BLOCK_G * BLOCK_B)
            )
            acc = tl.dot(x1, tl.trans(weight), acc, input_precision="ieee")
    target = out + tl.program_id(1) * out_split + token[:, None] * num_outputs + output[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(token < num_tokens)[:, None] & (output < num_outputs)[None, :])


@dataclass(frozen=True)
class Launch:
    """Code bytes of a tile, warps of a program, and whether quotients come from a reciprocal (`_code`)."""

    tile_bytes: int = TILE_BYTES
    num_warps: int = 2
    reciprocal: bool = True


LAUNCHES = {8: Launch(2048), 4: Launch(1024)}
"""By bits. On the H200 3,115 and 2,479 GB/s; with divisions and four warps 1,900 and 1,470."""


def _whole(size: int, bits: int, group: int, block_b: int) -> bool:
    return size % group == 0 and block_b * 8 // bits == group


def _tile(size: int, bits: int, group: int, across: bool, tile_bytes: int = TILE_BYTES) -> tuple[int, int, int]:
    """Vectors, groups and code bytes of a tile of about ``tile_bytes``; ``across``: neighbouring vectors are
    neighbours in memory."""
    if bits == 4 and group % 2:
        raise ValueError(
            f"4-bit codes on the GPU need groups of an even number of elements, got {group}: two codes share a byte"
        )
    block_b = triton.next_power_of_2(-(-min(group, size) * bits // 8))
    block_g = (
        1 if across else min(triton.next_power_of_2(reference.num_groups(size, group)), max(1, tile_bytes // block_b))
    )
    return max(1, tile_bytes // (block_b * block_g)), block_g, block_b


def _strides(codes: Tensor, parameters: Tensor, across: bool) -> tuple[int, int, int, int]:
    """Distances of vectors and of elements in codes, of vectors and of single parameters in parameters."""
    if across:  # codes [code_bytes, n], parameters [groups, 2, n]
        return 1, codes.stride(0), 1, parameters.stride(1)
    return codes.stride(0), 1, parameters.stride(0), 1


def quantize(x: Tensor, bits: int, group: int, dim: int = -1, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize`; ``launch`` is that of `LAUNCHES` unless given. Raises ValueError for 4 bits in groups of
    an odd number of elements."""
    launch = launch or LAUNCHES[bits]
    across = dim == 0 and x.dim() == 2
    flat = x if across else x.reshape(-1, x.shape[-1])
    size, vectors = (flat.shape[0], flat.shape[1]) if across else (flat.shape[1], flat.shape[0])
    groups, code_bytes = reference.num_groups(size, group), reference.code_bytes(size, bits)
    codes = torch.empty((code_bytes, vectors) if across else (vectors, code_bytes), dtype=torch.uint8, device=x.device)
    parameters = torch.empty((groups, 2, vectors) if across else (vectors, groups, 2), dtype=x.dtype, device=x.device)
    block_v, block_g, block_b = _tile(size, bits, group, across, launch.tile_bytes)
    code_vector, code_step, parameter_vector, parameter_step = _strides(codes, parameters, across)
    _quantize_kernel[(triton.cdiv(vectors, block_v), triton.cdiv(groups, block_g), 1)](
        flat, flat, codes, parameters, codes, vectors, size, flat.stride(1 if across else 0), flat.stride(0 if across else 1),
        code_vector, code_step, parameter_vector, parameter_step, 0, 0, 0,
        HEADS=1, HEAD_CODES=0, HEAD_PARAMETERS=0, SLOTS=False, BITS=bits, GROUP=group, BLOCK_V=block_v, BLOCK_G=block_g, BLOCK_B=block_b,
        WHOLE=_whole(size, bits, group, block_b), RECIPROCAL=launch.reciprocal, num_warps=launch.num_warps,
    )  # fmt: skip
    if across:
        return codes, parameters
    return codes.view(*x.shape[:-1], code_bytes), parameters.view(*x.shape[:-1], groups, 2)


def dequantize(
    codes: Tensor, parameters: Tensor, size: int, bits: int, group: int, dim: int = -1, out: Tensor | None = None
) -> Tensor:
    """`reference.dequantize`, into ``out`` where it is given. Raises ValueError for 4 bits in groups of an odd
    number of elements."""
    across = dim == 0 and codes.dim() == 2
    shape = (size, codes.shape[1]) if across else (*codes.shape[:-1], size)
    out = torch.empty(shape, dtype=parameters.dtype, device=codes.device) if out is None else out
    if not across:
        codes, parameters, flat = (
            codes.reshape(-1, codes.shape[-1]),
            parameters.reshape(-1, *parameters.shape[-2:]),
            out.view(-1, size),
        )
    else:
        flat = out
    vectors = codes.shape[1 if across else 0]
    block_v, block_g, block_b = _tile(size, bits, group, across)
    out_strides = (1, flat.stride(0)) if across else (flat.stride(0), 1)
    _dequantize_kernel[(triton.cdiv(vectors, block_v), triton.cdiv(reference.num_groups(size, group), block_g))](
        codes, parameters, flat, vectors, size, *_strides(codes, parameters, across), *out_strides,
        BITS=bits, GROUP=group, BLOCK_V=block_v, BLOCK_G=block_g, BLOCK_B=block_b, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def append_rows(rows: Tensor, slots: Tensor, key: Tensor, value: Tensor, bits: int = 16, group: int = 64) -> None:
    """`reference.append_rows`; rows may lie in pinned host memory. Raises ValueError where the layout of parameters
    is misaligned."""
    num_tokens, heads, head_dim = key.shape
    if bits == 16 or num_tokens == 0:
        rows[:, 0].index_copy_(0, slots, key)
        rows[:, 1].index_copy_(0, slots, value)
        return
    key, value = (
        x if x.stride() == key.stride() and x.stride()[1:] == (head_dim, 1) else x.contiguous() for x in (key, value)
    )
    codes, groups, width = (
        reference.code_bytes(head_dim, bits),
        reference.num_groups(head_dim, group),
        key.element_size(),
    )
    if rows.stride(0) % width or 2 * heads * codes % width:
        raise ValueError(
            f"parameters of {width} bytes are misaligned in token rows of {rows.shape[1]} bytes ({heads} heads of "
            f"{head_dim}, {bits} bits)"
        )
    block_v, block_g, block_b = _tile(head_dim, bits, group, False)
    assert block_g >= groups, f"{groups} groups of a head do not fit one tile"
    _quantize_kernel[(triton.cdiv(num_tokens * heads, block_v), 1, 2)](
        key, value, rows, rows.view(key.dtype), slots, num_tokens * heads, head_dim, key.stride(0), 1, rows.stride(0), 1, rows.stride(0) // width, 1,
        heads * codes, 2 * heads * codes // width, heads * groups * 2,
        HEADS=heads, HEAD_CODES=codes, HEAD_PARAMETERS=groups * 2, SLOTS=True, BITS=bits, GROUP=group,
        BLOCK_V=block_v, BLOCK_G=block_g, BLOCK_B=block_b, WHOLE=_whole(head_dim, bits, group, block_b), RECIPROCAL=LAUNCHES[bits].reciprocal,
    )  # fmt: skip


def quantized_linear(x: Tensor, codes: Tensor, parameters: Tensor, bits: int, group: int, *, splits: int = 4) -> Tensor:
    """`reference.quantized_linear` for at most 16 tokens. Raises ValueError for more, or for groups of no power of
    two (at least 32)."""
    num_tokens, size = x.shape
    if num_tokens > 16 or group & (group - 1) or group < 32:
        raise ValueError(
            f"the fused product takes at most 16 tokens and groups of a power of two from 32 on, got {num_tokens} "
            f"and {group}: expand the weights"
        )
    num_outputs = codes.shape[0]
    x = x.contiguous()
    partial = torch.empty(splits, num_tokens, num_outputs, dtype=torch.float32, device=x.device)
    block_g = min(max(1, 128 // group), triton.next_power_of_2(parameters.shape[1]))
    _linear_kernel[(triton.cdiv(num_outputs, 64), splits)](
        x, codes, parameters, partial, num_tokens, num_outputs, size, x.stride(0), codes.stride(0), parameters.stride(0), partial.stride(0),
        BITS=bits, GROUP=group, SPLITS=splits, BLOCK_T=16, BLOCK_N=64, BLOCK_G=block_g, num_warps=4, num_stages=4,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype)
