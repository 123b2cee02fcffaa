"""Plain-torch oracle for every operation but attention (`attention_reference`); also the path that runs where no faster
one does.

The KV cache is an array of *token rows*: slot ``page * page_tokens + offset`` holds one token's keys and values of
one layer. Unquantized rows are ``[num_slots, 2, num_kv_heads, head_dim]`` in the compute dtype (index 0: keys, 1:
values). Quantized rows are ``[num_slots, token_bytes]`` uint8: key codes, value codes, key parameters, value
parameters, padding; the codes of one head take ``code_bytes`` and its parameters are ``num_groups`` pairs (scale,
minimum) in the compute dtype.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

FIT_SHRINKS, FIT_STEPS = (1.0, 0.9, 0.8), 2
"""The grid that `fit` searches. Finer grids of up to 256 trials gain 2 % of the squared error more."""
ROW_ALIGNMENT = 16
"""Bytes. A quantized row is padded to a multiple, so that 16-byte loads of its codes are aligned in every row
(unaligned ones fault on the GPU)."""


def num_groups(size: int, group: int) -> int:
    """Groups along a dimension of ``size``; the last may be short."""
    return -(-size // group)


def code_bytes(size: int, bits: int) -> int:
    """Bytes that ``size`` codes of 4 or 8 bits take (two 4-bit codes a byte, the first in the low half)."""
    return -(-size * bits // 8)


@functools.cache
def token_bytes(num_kv_heads: int, head_dim: int, bits: int, group: int, element_bytes: int, sides: int = 2) -> int:
    """Bytes of one token row. 16 bits stands for the compute dtype, whatever its width. sides: keys and values, or 1:
    keys that are the values as well."""
    if bits == 16:
        return sides * num_kv_heads * head_dim * element_bytes
    used = sides * num_kv_heads * (code_bytes(head_dim, bits) + num_groups(head_dim, group) * 2 * element_bytes)
    return -(-used // ROW_ALIGNMENT) * ROW_ALIGNMENT


def quantize(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Group-wise asymmetric quantization along the last dimension.

    x: [..., size] floating. Returns codes [..., code_bytes] uint8 and parameters [..., num_groups, 2] in x's dtype
    (scale, minimum).
    Codes are chosen against the *rounded* parameters, so that a constant group comes back exactly and their rounding
    costs no accuracy but at the ends of the range. A group with a NaN or an infinity has a scale that is no finite
    number and codes of 0: it comes back as NaN, whole, and an overflow stays visible.
    """
    size = x.shape[-1]
    groups = num_groups(size, group)
    padding = groups * group - size
    levels = (1 << bits) - 1
    # Padding repeats the last element: it lies inside the last group's range and does not widen it.
    padded = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], padding)], dim=-1) if padding else x
    grouped = padded.reshape(*x.shape[:-1], groups, group).float()
    # + 0: of zeros of both signs the positive one, whichever comes first.
    minimum = (grouped.amin(dim=-1) + 0.0).to(x.dtype)
    scale = ((grouped.amax(dim=-1) + 0.0 - minimum.float()) / levels).clamp_(min=0).to(x.dtype)
    codes = _codes(grouped, scale.float().unsqueeze(-1), minimum.float().unsqueeze(-1), levels).to(torch.uint8)
    return _packed(codes.reshape(*x.shape[:-1], groups * group)[..., :size], bits), torch.stack(
        [scale, minimum], dim=-1
    )


def fit(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """`quantize` with the parameters of least squared error found by a search: for weights, which are quantized once.

    x: [rows, size] floating. Ranges shrunk at either end by ``FIT_SHRINKS`` are each improved by ``FIT_STEPS``
    alternations between the nearest codes and the line that fits them best; what is kept is the best as it will be
    read back, rounded parameters included, so it is never worse than `quantize`. Normal weights in groups of 64 at 4
    bits: 0.83 of its squared error.
    """
    levels, groups = (1 << bits) - 1, num_groups(x.shape[1], group)
    padded = F.pad(x.float().unsqueeze(0), (0, groups * group - x.shape[1]), mode="replicate")[0]
    y = padded.view(-1, groups, group)
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    _, parameters = quantize(x, bits, group)
    scale, minimum = parameters.float().unsqueeze(-1).unbind(2)
    best_error = torch.full_like(low, torch.inf)
    best: Tensor = torch.stack([scale, minimum])
    candidates = [
        (scale, minimum),
        *(((a + b) * half / levels, middle - a * half) for a in FIT_SHRINKS for b in FIT_SHRINKS),
    ]
    for scale, minimum in candidates:
        for _ in range(FIT_STEPS + 1):
            scale, minimum = scale.to(x.dtype).float(), minimum.to(x.dtype).float()
            code = _codes(y, scale, minimum, levels)
            error = (code * scale + minimum - y).square_().sum(-1, keepdim=True)
            better = error < best_error
            best = torch.where(better, torch.stack([scale, minimum]), best)
            best_error = torch.where(better, error, best_error)
            code -= (mean := code.mean(-1, keepdim=True))
            scale = (code * y).sum(-1, keepdim=True) / code.square().sum(-1, keepdim=True).clamp(min=1.0)
            minimum = y.mean(-1, keepdim=True) - mean * scale
    scale, minimum = best
    return _packed(_codes(y, scale, minimum, levels).to(torch.uint8).flatten(1)[:, : x.shape[1]], bits), torch.cat(
        [scale, minimum], -1
    ).to(x.dtype)


def _codes(grouped: Tensor, scale: Tensor, minimum: Tensor, levels: int) -> Tensor:
    """Nearest codes, as floats, of [..., groups, group] with parameters [..., groups, 1]; 0 where the scale is 0 or
    no finite number."""
    steps = (scale > 0) & (scale < torch.inf)
    codes = (grouped - minimum) / torch.where(steps, scale, 1.0)
    return torch.where(steps, codes, 0.0).round_().clamp_(0, levels)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., size] uint8, two a byte at 4 bits."""
    if bits == 4:
        if codes.shape[-1] % 2:
            codes = torch.cat([codes, torch.zeros_like(codes[..., :1])], dim=-1)
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes.contiguous()


def dequantize(codes: Tensor, parameters: Tensor, size: int, bits: int, group: int) -> Tensor:
    """Inverse of `quantize`: [..., size] in the dtype of ``parameters``."""
    if bits == 4:
        codes = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2)
    codes = codes[..., :size].float()
    scale = parameters[..., 0].float().repeat_interleave(group, dim=-1)[..., :size]
    minimum = parameters[..., 1].float().repeat_interleave(group, dim=-1)[..., :size]
    return (codes * scale + minimum).to(parameters.dtype)


def pack_rows(key: Tensor, value: Tensor, bits: int, group: int) -> Tensor:
    """Token rows of ``key`` and ``value`` [num_tokens, num_kv_heads, head_dim]: the layout of the module's
    docstring."""
    if bits == 16:
        return torch.stack([key, value], dim=1)
    parts = [quantize(x, bits, group) for x in (key, value)]
    packed = torch.cat(
        [codes.flatten(1) for codes, _ in parts] + [parameters.flatten(1).view(torch.uint8) for _, parameters in parts],
        dim=1,
    )
    return F.pad(packed, (0, -packed.shape[1] % ROW_ALIGNMENT))


def unpack_rows(
    rows: Tensor, num_kv_heads: int, head_dim: int, bits: int, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [num_tokens, num_kv_heads, head_dim] of token rows (any selection of them)."""
    if bits == 16:
        return rows[:, 0], rows[:, 1]
    codes_end = num_kv_heads * code_bytes(head_dim, bits)
    parameter_bytes = num_kv_heads * num_groups(head_dim, group) * 2 * dtype.itemsize
    sides = []
    for side in range(2):
        codes = rows[:, side * codes_end : (side + 1) * codes_end].reshape(rows.shape[0], num_kv_heads, -1)
        start = 2 * codes_end + side * parameter_bytes
        # A single row's slice is contiguous as it lies, perhaps at no multiple of the parameters' size: a copy starts
        # at one.
        parameters = (
            rows[:, start : start + parameter_bytes]
            .clone(memory_format=torch.contiguous_format)
            .view(dtype)
            .view(rows.shape[0], num_kv_heads, -1, 2)
        )
        sides.append(dequantize(codes, parameters, head_dim, bits, group))
    return sides[0], sides[1]


def gather_pages(source: Tensor, page_ids: Tensor, destination: Tensor) -> None:
    """``destination[i] = source[page_ids[i]]``. source: [num_pages, ...], page_ids: [n] integers, destination: [n,
    ...] of the same dtype."""
    torch.index_select(source, 0, page_ids, out=destination)


def scatter_rows(source: Tensor, destination: Tensor, slots: Tensor) -> None:
    """``destination[slots[i]] = source[i]``. source: [n, ...] of destination's dtype, slots: [n] int64, all
    different."""
    destination.index_copy_(0, slots, source)


def copy_parts(source: Tensor, target: Tensor, parts: Tensor, wanted: Tensor) -> None:
    """``target[start:end] = source[start:end]`` for each of the ``parts`` [n, 3] int64 (owner, start, end) whose owner
    is ``wanted`` [owners] bool. source, target: bytes."""
    for _, start, end in parts[wanted[parts[:, 0]]].tolist():
        target[start:end] = source[start:end]


def append_rows(rows: Tensor, slots: Tensor, key: Tensor, value: Tensor, bits: int = 16, group: int = 64) -> None:
    """Write keys and values [num_tokens, num_kv_heads, head_dim] at ``slots`` [num_tokens] int64 of ``rows`` (in
    place)."""
    rows.index_copy_(0, slots, pack_rows(key, value, bits, group))


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    wide: bool = False,
) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019) over the last dimension of x [..., size].

    With ``residual`` x is added to it in place and the sum is normalized. ``offset`` is added to the weight; such
    models, and those that say ``wide``, multiply in float32, the others after rounding to x's dtype, so that 16-bit
    results agree with transformers' to the last bit.
    """
    if residual is not None:
        x = residual.add_(x)
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (offset + weight.float())).to(x.dtype) if offset or wide else weight * normed.to(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, residual: Tensor | None = None
) -> Tensor:
    """Layer norm over the last dimension of x [..., size]; with ``residual`` x is added to it in place and the sum
    is normalized."""
    if residual is not None:
        x = residual.add_(x)
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    rotary_dim: int,
    interleaved: bool = False,
) -> None:
    """Turn the first ``rotary_dim`` elements of every head in place (RoFormer, Su et al. 2021).

    query: [num_tokens, num_heads, head_dim], key: [num_tokens, num_kv_heads, head_dim], cos and sin: [max_positions,
    rotary_dim / 2], positions: [num_tokens] integers. Pairs are neighbors (``interleaved``) or lie half of
    ``rotary_dim`` apart.
    """
    half = rotary_dim // 2
    cosine, sine = (table[positions.long()].unsqueeze(1) for table in (cos, sin))
    for x in (query, key):
        first, second = (
            (x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]) if interleaved else (x[..., :half], x[..., half:rotary_dim])
        )
        turned = (first * cosine - second * sine).to(x.dtype), (second * cosine + first * sine).to(x.dtype)
        first.copy_(turned[0])
        second.copy_(turned[1])


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of gate_up [num_tokens, 2 * size], gate first. activation: silu, relu, gelu (exact) or
    gelu_tanh."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
    return {"silu": F.silu, "relu": F.relu}[activation](gate) * up


def clamped_gate(gate_up: Tensor, gain: float, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(gain * gate) of gate_up [num_tokens, 2 * size], gate first; gates above ``limit`` and
    ups beyond it on either side count as it."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(gate * gain))


def keep_largest(logits: Tensor, first: int, peaks: Tensor, token_ids: Tensor) -> None:
    """Replace the largest logit of each row so far, ``peaks`` [rows] float32, and its token, ``token_ids`` [rows]
    int64, where one of ``logits`` [rows, columns], those of the tokens from ``first`` on, is larger. Of equal ones the
    first stays; NaN is larger than anything."""
    found, columns = logits.float().max(-1)
    taken = (found > peaks) | found.isnan()
    peaks.copy_(torch.where(taken, found, peaks))
    token_ids.copy_(torch.where(taken, columns + first, token_ids))
