"""Triton kernels of a layer of experts: which rows a tile has, products with matrices that are found through a table of
addresses, the gated activation behind the first, and the weighted sum of a token's results.

Weights are the left operand: 64 or more of their rows feed the tensor cores however few tokens an expert has, and codes
are expanded in registers on their way there. Codes of 4 bits come as bytes of two inputs, so that these kernels read
the inputs of a product by halves, all even ones before all odd ones.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import triton
import triton.language as tl

from flexbatch.kernels.code_tiles import ended
from flexbatch.kernels.launched import launched
from flexbatch.kernels.norm_rope import activated, clamped


@launched
@triton.jit(do_not_specialize=["num_tiles"])
def tiles_kernel(
    ends, tiles, num_tiles, num_experts, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tiles): of every tile its expert (-1: none), first row and end among the rows sorted by expert.
    ends: where the rows of each expert end."""
    expert = tl.arange(0, BLOCK_EXPERTS)
    end = tl.load(ends + expert, mask=expert < num_experts, other=0).to(tl.int32)
    start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < num_experts), other=0).to(tl.int32)
    needed = tl.where(expert < num_experts, (end - start + BLOCK_TOKENS - 1) // BLOCK_TOKENS, 0)
    last = tl.cumsum(needed, 0)
    tile = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    owner = tl.sum(((last[None, :] <= tile[:, None]) & (expert < num_experts)[None, :]).to(tl.int32), 1)
    is_owner = owner[:, None] == expert[None, :]
    base = start - (last - needed) * BLOCK_TOKENS
    first = tl.sum(tl.where(is_owner, base[None, :], 0), 1) + tile * BLOCK_TOKENS
    limit = tl.sum(tl.where(is_owner, end[None, :], 0), 1)
    inside = tile < num_tiles
    tl.store(tiles + tile * 3, tl.where(owner < num_experts, owner, -1), mask=inside)
    tl.store(tiles + tile * 3 + 1, first, mask=inside)
    tl.store(tiles + tile * 3 + 2, limit, mask=inside)


@triton.jit
def _cell(program, num_tiles, num_blocks, TOGETHER: tl.constexpr):
    """Tile of tokens and block of weight rows of a program. ``TOGETHER`` tiles in a row, often of one expert, go
    through the blocks side by side: their weights come from memory once."""
    group = program // (TOGETHER * num_blocks)
    size = tl.minimum(num_tiles - group * TOGETHER, TOGETHER)
    within = program - group * TOGETHER * num_blocks
    return group * TOGETHER + within % size, within // size


@triton.jit
def _e2m1(code):
    """Codes 0 to 15 (integers of 32 bits) times 2^-126 as float32: their three bits are those of its exponent and
    fraction, also of the code without exponent, 1."""
    return ((code & 7) << 22 | (code & 8) << 28).to(tl.float32, bitcast=True)


@triton.jit
def _power(scale):
    """2^(scale - 127) as float32; 2^-127 has no exponent bits."""
    return tl.where(scale == 0, 0x00400000, scale << 23).to(tl.float32, bitcast=True)


@triton.jit
def _code(value):
    """A small integer of 32 bits as float32, without the conversion, which is slow: the lowest bits of 2^23."""
    return (value | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _product(
    x, x_row, codes, parameters, weight_row, columns, acc, BITS: tl.constexpr, FLOATS: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, WHOLE: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """acc [weight rows, tokens] plus the product of coded rows with rows of x. x_row: offsets of the tokens' rows.
    GROUPS: of a step, with so many BYTES each, or one of them and a part of its bytes; WHOLE: steps fill a row."""
    PIECES: tl.constexpr = 8 // BITS
    STEP: tl.constexpr = GROUPS * BYTES
    GROUP_BYTES: tl.constexpr = GROUP // PIECES
    dtype: tl.constexpr = x.dtype.element_ty
    row_bytes = columns // PIECES
    # Else zeros take the place of sums after a loop that may not run, and each of a step's products waits for the one
    # before.
    tl.assume(row_bytes > 0)
    row_groups = (columns + GROUP - 1) // GROUP
    group = tl.arange(0, GROUPS)
    byte = tl.arange(0, STEP)
    cube = (group[:, None] * BYTES + tl.arange(0, BYTES)[None, :])[None, :, :]
    code_at = codes + weight_row.to(tl.int64)[:, None, None] * row_bytes + cube
    WIDTH: tl.constexpr = 1 if FLOATS else 2
    scale_at = parameters + (weight_row.to(tl.int64)[:, None] * row_groups + group[None, :]) * WIDTH
    x_at = x + x_row[:, None] + byte[None, :]
    scale = tl.load(scale_at, mask=(group < row_groups)[None, :], other=0)
    low = scale if FLOATS else tl.load(scale_at + 1, mask=(group < row_groups)[None, :], other=0)
    for begin in range(0, row_bytes, STEP):
        # Scales are a byte or two each, too narrow for copies that run ahead: they are asked for one step early.
        ahead = (begin + STEP) // GROUP_BYTES
        following = ahead + group
        next_at = scale_at + ahead * WIDTH
        next_scale = tl.load(next_at, mask=(following < row_groups)[None, :], other=0)
        next_low = next_scale if FLOATS else tl.load(next_at + 1, mask=(following < row_groups)[None, :], other=0)
        if WHOLE:
            code = tl.load(code_at + begin).to(tl.int32)
            first = tl.load(x_at + begin)
            second = first if BITS == 8 else tl.load(x_at + begin + row_bytes)
        else:
            left = row_bytes - begin
            code = tl.load(code_at + begin, mask=cube < left, other=0).to(tl.int32)
            first = tl.load(x_at + begin, mask=(byte < left)[None, :], other=0.0)
            second = first
            if BITS != 8:
                second = tl.load(x_at + begin + row_bytes, mask=(byte < left)[None, :], other=0.0)
        if FLOATS:
            factor = _power(scale.to(tl.int32))[:, :, None]
            even = _e2m1(code & 15) * 8.507059173023462e37 * factor
            odd = _e2m1(code >> 4) * 8.507059173023462e37 * factor
        else:
            factor, shift = scale.to(tl.float32)[:, :, None], low.to(tl.float32)[:, :, None]
            even = _code(code if BITS == 8 else code & 15) * factor + shift
            odd = even if BITS == 8 else _code(code >> 4) * factor + shift
        acc = tl.dot(even.to(dtype).reshape(even.shape[0], STEP), tl.trans(first), acc, input_precision="ieee")
        if BITS != 8:
            acc = tl.dot(odd.to(dtype).reshape(odd.shape[0], STEP), tl.trans(second), acc, input_precision="ieee")
        acc = ended(acc, COMPILED)
        scale, low = next_scale, next_low
    return acc


@triton.jit
def _plain_product(x, x_row, matrix, weight_row, columns, acc, STEP: tl.constexpr, WHOLE: tl.constexpr):
    """The same with rows of x's own dtype."""
    column = tl.arange(0, STEP)
    weight_at = matrix + weight_row.to(tl.int64)[:, None] * columns + column[None, :]
    x_at = x + x_row[:, None] + column[None, :]
    for begin in range(0, columns, STEP):
        if WHOLE:
            weight = tl.load(weight_at + begin)
            row = tl.load(x_at + begin)
        else:
            weight = tl.load(weight_at + begin, mask=(column < columns - begin)[None, :], other=0.0)
            row = tl.load(x_at + begin, mask=(column < columns - begin)[None, :], other=0.0)
        acc = tl.dot(weight, tl.trans(row), acc, input_precision="ieee")
    return acc


@triton.jit
def _of_expert(
    x, x_row, table, num_experts, expert, weight_row, columns, BITS: tl.constexpr, FLOATS: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Rows ``weight_row`` of an expert's matrix, found through the table, times rows of x: [rows, tokens] float32."""
    acc = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), dtype=tl.float32)
    address = tl.load(table + expert)
    if BITS == 16:
        matrix = tl.multiple_of(address.to(x.dtype), 16)
        acc = _plain_product(x, x_row, matrix, weight_row, columns, acc, GROUP, WHOLE)
    else:
        codes = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
        parameters = tl.load(table + num_experts + expert).to(tl.pointer_type(tl.uint8) if FLOATS else x.dtype)
        acc = _product(
            x, x_row, codes, parameters, weight_row, columns, acc, BITS, FLOATS, GROUP, GROUPS, BYTES, WHOLE,
            COMPILED,
        )  # fmt: skip
    return acc


@launched
@triton.jit(do_not_specialize=["num_tiles"])  # other numbers every pass: see attention_kernels
def gate_up_kernel(
    x, inner, table, biases, order, tiles, num_tiles, num_experts, width, columns, gain, limit,
    REPEATED: tl.constexpr, BITS: tl.constexpr, FLOATS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BYTES: tl.constexpr, WHOLE: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TOGETHER: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens x blocks of gates and their ups): inner [rows sorted by expert, width]. Row r of the sorted
    is token order[r] // REPEATED. HALVES: even columns are written before the odd ones."""
    HALF: tl.constexpr = BLOCK_ROWS // 2
    tile, block = _cell(tl.program_id(0), num_tiles, tl.cdiv(width, HALF), TOGETHER)
    expert = tl.load(tiles + tile * 3).to(tl.int64)
    if expert >= 0:
        end = tl.load(tiles + tile * 3 + 2)
        position = tl.load(tiles + tile * 3 + 1) + tl.arange(0, BLOCK_TOKENS)
        token = tl.load(order + position, mask=position < end, other=0).to(tl.int64) // REPEATED
        # Half a block of gates, and behind it the ups that belong to them.
        row = tl.arange(0, BLOCK_ROWS)
        side = (row >= HALF).to(tl.int32)
        row = tl.minimum(block * HALF + row - side * HALF, width - 1) + side * width
        acc = _of_expert(
            x, token * columns, table, num_experts, expert, row, columns, BITS, FLOATS, GROUP, GROUPS, BYTES,
            WHOLE, BLOCK_ROWS, BLOCK_TOKENS, COMPILED,
        )  # fmt: skip
        if BIASED:
            acc += tl.load(biases + expert * (2 * width) + row).to(tl.float32)[:, None]
        gate, up = tl.split(tl.permute(acc.reshape(2, HALF, BLOCK_TOKENS), (1, 2, 0)))
        value = clamped(gate, up, gain, limit) if ACTIVATION == "clamped" else activated(gate, ACTIVATION) * up
        column = block * HALF + tl.arange(0, HALF)
        target = (column % 2) * (width // 2) + column // 2 if HALVES else column
        mask = (column < width)[:, None] & (position < end)[None, :]
        at = inner + position.to(tl.int64)[None, :] * width + target[:, None]
        tl.store(at, value.to(inner.dtype.element_ty), mask=mask)


@launched
@triton.jit(do_not_specialize=["num_tiles"])
def down_kernel(
    inner, out, table, biases, order, tiles, num_tiles, num_experts, size, columns, BITS: tl.constexpr,
    FLOATS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, WHOLE: tl.constexpr,
    BIASED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TOGETHER: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens x blocks of outputs): row order[r] of out [rows, size] from row r of inner."""
    tile, block = _cell(tl.program_id(0), num_tiles, tl.cdiv(size, BLOCK_ROWS), TOGETHER)
    expert = tl.load(tiles + tile * 3).to(tl.int64)
    if expert >= 0:
        end = tl.load(tiles + tile * 3 + 2)
        position = tl.load(tiles + tile * 3 + 1) + tl.arange(0, BLOCK_TOKENS)
        column = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row = tl.minimum(column, size - 1)
        inner_row = tl.minimum(position, end - 1).to(tl.int64) * columns
        acc = _of_expert(
            inner, inner_row, table, num_experts, expert, row, columns, BITS, FLOATS, GROUP, GROUPS, BYTES,
            WHOLE, BLOCK_ROWS, BLOCK_TOKENS, COMPILED,
        )  # fmt: skip
        if BIASED:
            acc += tl.load(biases + expert * size + row).to(tl.float32)[:, None]
        target = tl.load(order + position, mask=position < end, other=0).to(tl.int64)
        mask = (column < size)[:, None] & (position < end)[None, :]
        tl.store(out + target[None, :] * size + column[:, None], acc.to(out.dtype.element_ty), mask=mask)


@launched
@triton.jit
def weighted_kernel(rows, shares, out, size, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tokens, blocks): the sum over a token's choices, in their order, in float32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = rows + token * (CHOICES * size) + column
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(CHOICES):
        value = tl.load(at + choice * size, mask=column < size, other=0.0).to(tl.float32)
        total += value * tl.load(shares + token * CHOICES + choice)
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=column < size)
