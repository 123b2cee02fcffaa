"""Codes of 4 and 8 bits as operands of tensor cores, inside Triton programs.

Codes are small integers, exact in 16 bits, so that scale and minimum of a group are applied to its products, not to its
elements. They get from 32-bit words into an operand by shifts and masks alone, two at a time. That takes the orders of
elements that the functions here name: in the natural one a thread throws away most of what it unpacks, or the operand
goes through shared memory.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import triton
import triton.language as tl

LIFT = 0x43004300
"""Two bfloat16 of 128, whose lowest four bits take a code. Kernels are given it as an argument: the compiler takes two
instructions for (x & constant) | constant and one where it does not know the second; 220 become 177 for 128 rows of a
group of 64 codes."""


@triton.jit
def _number(code, dtype: tl.constexpr):
    """A code of 8 bits, without the conversion of integers, which is slow: the lowest bits of 2^23."""
    return ((code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0).to(dtype)


@triton.jit
def _numbers(words, at, lift, dtype: tl.constexpr, BITS: tl.constexpr):
    """[..., 2] of the codes that lie ``at`` in the lower and the upper half of words: in float16 as code / 2^24, which
    is subnormal and exact, in bfloat16 as 128 + code at 4 bits, else as they are. lift: `LIFT`, which is or-ed in."""
    MASK: tl.constexpr = 0x000F000F if BITS == 4 else 0x00FF00FF
    pair = (words >> at) & MASK
    if dtype == tl.float32 or (dtype == tl.bfloat16 and BITS == 8):
        numbers = tl.join(_number(pair & 0xFFFF, dtype), _number(pair >> 16, dtype))
    else:
        if dtype == tl.bfloat16:
            pair = pair | lift
        numbers = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16)).to(dtype, bitcast=True)
    return numbers


@triton.jit
def rows_of_codes(words, lift, dtype: tl.constexpr, BITS: tl.constexpr):
    """[rows, elements] of [rows, words] of one group; the elements in the order of `elements_of_rows`."""
    PIECES: tl.constexpr = 32 // BITS
    at = (tl.arange(0, PIECES // 2) * BITS)[None, None, :]
    numbers = tl.permute(_numbers(words[:, :, None], at, lift, dtype, BITS), (0, 2, 1, 3))
    return numbers.reshape(words.shape[0], words.shape[1] * PIECES)


@triton.jit
def weights_of_codes(words, scale, minimum, lift, dtype: tl.constexpr, BITS: tl.constexpr):
    """The elements themselves, in the place and order of `rows_of_codes`: made in float32, as they are rounded once."""
    PIECES: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = 0x000F000F if BITS == 4 else 0x00FF00FF
    scale = scale.to(tl.float32)
    minimum = minimum.to(tl.float32)
    pair = (words[:, :, None] >> (tl.arange(0, PIECES // 2) * BITS)[None, None, :]) & MASK
    if dtype == tl.bfloat16 and BITS == 4:  # the halves of a word become floats of 128 + code by one instruction each
        pair = pair | lift
        lower = (pair << 16).to(tl.float32, bitcast=True)
        upper = (pair & -65536).to(tl.float32, bitcast=True)
        minimum = minimum - 128.0 * scale
    else:
        lower = ((pair & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        upper = ((pair >> 16) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    scale = scale[:, None, None]
    minimum = minimum[:, None, None]
    numbers = tl.join((lower * scale + minimum).to(dtype), (upper * scale + minimum).to(dtype))
    return tl.permute(numbers, (0, 2, 1, 3)).reshape(words.shape[0], words.shape[1] * PIECES)


@triton.jit
def elements_of_rows(SIZE: tl.constexpr, BITS: tl.constexpr):
    """The element of a group of SIZE at each index of `rows_of_codes`."""
    PIECES: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = SIZE // PIECES
    index = tl.arange(0, SIZE)
    return index // 2 % WORDS * PIECES + index // (2 * WORDS) + index % 2 * (PIECES // 2)


@triton.jit
def in_order_of_rows(x, BITS: tl.constexpr):
    """x [rows, elements] with those of `elements_of_rows` at each index, moved in registers."""
    PIECES: tl.constexpr = 32 // BITS
    halves = x.reshape(x.shape[0], x.shape[1] // PIECES, 2, PIECES // 2)
    return tl.permute(halves, (0, 3, 1, 2)).reshape(x.shape)


@triton.jit
def columns_of_codes(first, second, lift, dtype: tl.constexpr, BITS: tl.constexpr):
    """[elements, 2 * rows] of two tiles [rows, words] of one group: a row of each by turns, the elements in the order
    of `elements_of_columns`."""
    PIECES: tl.constexpr = 32 // BITS
    at = (tl.arange(0, PIECES // 2) * BITS)[None, None, None, :]
    halves = tl.join((first & 0xFFFF) | (second << 16), ((first >> 16) & 0xFFFF) | (second & -65536))
    numbers = tl.permute(_numbers(halves[:, :, :, None], at, lift, dtype, BITS), (2, 3, 1, 0, 4))
    return numbers.reshape(first.shape[1] * PIECES, first.shape[0] * 2)


@triton.jit
def elements_of_columns(SIZE: tl.constexpr, BITS: tl.constexpr):
    """The element of a group of SIZE at each row of `columns_of_codes`."""
    PIECES: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = SIZE // PIECES
    index = tl.arange(0, SIZE)
    return index % WORDS * PIECES + index // WORDS


@triton.jit
def ended(acc, COMPILED: tl.constexpr):
    """``acc`` once the products of a step that add up in it have ended: a use in the loop that costs nothing. Triton
    3.6 lets products run on into the next step, which expands its codes into the registers that they read (H100, 8
    bits, tiles of 128 tokens: wrong numbers). The interpreter has no inline assembly."""
    if COMPILED:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def scale_and_minimum(pair, dtype: tl.constexpr):
    """Of pairs of two 16-bit floats."""
    if dtype == tl.bfloat16:
        scale = (pair << 16).to(tl.float32, bitcast=True)
        minimum = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        scale = pair.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        minimum = (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return scale, minimum


@triton.jit
def of_numbers(scale, minimum, dtype: tl.constexpr, BITS: tl.constexpr):
    """Scale and minimum that go with what `_numbers` makes of codes."""
    if BITS == 4 and dtype == tl.bfloat16:
        minimum = minimum - 128.0 * scale
    elif dtype == tl.float16:
        scale = scale * 16777216.0
    return scale, minimum
