"""Norms with residual, rotary embedding and gated activations in Triton: each a single trip through memory, in
float32 inside."""

# mypy: allow-incomplete-defs, allow-untyped-defs
# Triton functions annotate their constants only: the other arguments have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexbatch.kernels.launched import launched
from flexbatch.kernels.whole_numbers import ceil_div, next_power_of_2


@launched
@triton.jit
def _norm_kernel(
    x, residual, weight, bias, out, inner, x_outer, x_inner, residual_outer, residual_inner, size, eps, offset,
    RMS: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. RMS with WIDE multiplies by (offset + weight) before rounding, else after it."""
    row = tl.program_id(0)
    outer = (row // inner).to(tl.int64)
    element = tl.arange(0, BLOCK)
    mask = element < size
    value = tl.load(x + outer * x_outer + row % inner * x_inner + element, mask=mask, other=0.0)
    if RESIDUAL:
        source = residual + outer * residual_outer + row % inner * residual_inner + element
        value = value + tl.load(source, mask=mask, other=0.0)
        tl.store(source, value, mask=mask)
    wide = value.to(tl.float32)
    if not RMS:
        wide = tl.where(mask, wide - tl.sum(wide, 0) / size, 0.0)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    if WEIGHT:
        scale = tl.load(weight + element, mask=mask, other=0.0)
        wide = (
            (wide.to(value.dtype) * scale).to(tl.float32)
            if RMS and not WIDE
            else wide * (scale.to(tl.float32) + offset)
        )
    if BIAS:
        wide = wide + tl.load(bias + element, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * size + element, wide.to(value.dtype), mask=mask)


@triton.jit
def _rotate_heads(
    x, token, x_token, cosine, sine, pair, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of one token in place."""
    head = tl.arange(0, BLOCK_H)[:, None]
    mask = (head < HEADS) & (pair < HALF)
    first = x + token * x_token + head * HEAD_DIM + (2 * pair if INTERLEAVED else pair)
    second = first + (1 if INTERLEAVED else HALF)
    a = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(second, mask=mask, other=0.0).to(tl.float32)
    tl.store(first, (a * cosine - b * sine).to(x.dtype.element_ty), mask=mask)
    tl.store(second, (b * cosine + a * sine).to(x.dtype.element_ty), mask=mask)


@launched
@triton.jit
def _rotary_kernel(
    query, key, cos, sin, positions, query_token, key_token, table_stride, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One token, in place. cos, sin: [max_positions, HALF]."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)[None, :]
    entry = tl.load(positions + token).to(tl.int64) * table_stride + pair
    cosine = tl.load(cos + entry, mask=pair < HALF, other=0.0).to(tl.float32)
    sine = tl.load(sin + entry, mask=pair < HALF, other=0.0).to(tl.float32)
    _rotate_heads(query, token, query_token, cosine, sine, pair, HEADS, HEAD_DIM, HALF, INTERLEAVED, BLOCK_H)
    _rotate_heads(key, token, key_token, cosine, sine, pair, KV_HEADS, HEAD_DIM, HALF, INTERLEAVED, BLOCK_KV)


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """silu, relu, gelu (exact) or gelu_tanh of float32."""
    if ACTIVATION == "silu":
        gate = gate * tl.sigmoid(gate)
    elif ACTIVATION == "relu":
        gate = tl.maximum(gate, 0.0)
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        gate = 0.5 * gate * (1.0 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    return gate


@triton.jit
def clamped(gate, up, gain, limit):
    """`reference.clamped_gate` of float32."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL), limit, propagate_nan=tl.PropagateNan.ALL)
    return (up + 1.0) * (gate * tl.sigmoid(gate * gain))


@launched
@triton.jit
def _gated_kernel(gate_up, out, size, stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out = activation(gate) * up; the activation is rounded before the product, as separate operations would. Grid
    (rows, columns)."""
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    raw = tl.load(gate_up + row * stride + element, mask=mask, other=0.0)
    up = tl.load(gate_up + row * stride + size + element, mask=mask, other=0.0)
    gate = activated(raw.to(tl.float32), ACTIVATION)
    tl.store(out + row * size + element, gate.to(raw.dtype) * up, mask=mask)


@launched
@triton.jit
def _clamped_kernel(gate_up, out, size, stride, gain, limit, BLOCK: tl.constexpr):
    """`reference.clamped_gate`, in float32 until the store. Grid (rows, columns)."""
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    gate = tl.load(gate_up + row * stride + element, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + element, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + element, clamped(gate, up, gain, limit), mask=mask)


def _outer_inner(x: Tensor) -> tuple[int, int, int]:
    """Number of inner rows and the distances of outer and of inner rows of [..., inner, size] or [rows, size]."""
    if x.dim() == 3 and x.stride(2) == 1:
        return x.shape[1], x.stride(0), x.stride(1)
    assert x.dim() == 2 and x.stride(1) == 1, (
        f"rows must be dense in [rows, size] or [rows, inner, size], got strides {x.stride()} of {tuple(x.shape)}"
    )
    return 1, x.stride(0), 0


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    rms: bool,
    offset: float,
    wide: bool,
) -> Tensor:
    out = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    inner, x_outer, x_inner = _outer_inner(x)
    _, residual_outer, residual_inner = _outer_inner(x if residual is None else residual)
    size = x.shape[-1]
    block = next_power_of_2(size)
    if x.numel():
        _norm_kernel[(x.numel() // size,)](
            x, x if residual is None else residual, x if weight is None else weight, x if bias is None else bias, out,
            inner, x_outer, x_inner, residual_outer, residual_inner, size, eps, offset,
            RMS=rms, RESIDUAL=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None,
            WIDE=wide or offset != 0.0, BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return out


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    wide: bool = False,
) -> Tensor:
    """`reference.rms_norm`."""
    return _norm(x, weight, None, eps, residual, True, offset, wide)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, residual: Tensor | None = None
) -> Tensor:
    """`reference.layer_norm`."""
    return _norm(x, weight, bias, eps, residual, False, 0.0, True)


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
    """`reference.rotary`."""
    num_tokens, num_heads, head_dim = query.shape
    kv_heads = key.shape[1]
    for x in (query, key):
        assert x.stride()[1:] == (head_dim, 1), f"heads must be dense, got strides {x.stride()}"
    if num_tokens:
        _rotary_kernel[(num_tokens,)](
            query, key, cos, sin, positions, query.stride(0), key.stride(0), cos.stride(0),
            HEADS=num_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF=rotary_dim // 2, INTERLEAVED=interleaved,
            BLOCK_H=next_power_of_2(num_heads), BLOCK_KV=next_power_of_2(kv_heads),
            BLOCK_P=next_power_of_2(rotary_dim // 2),
        )  # fmt: skip


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """`reference.gated_activation`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, next_power_of_2(size))
    if rows:
        _gated_kernel[(rows, ceil_div(size, block))](
            gate_up, out, size, gate_up.stride(0), ACTIVATION=activation, BLOCK=block
        )
    return out


def clamped_gate(gate_up: Tensor, gain: float, limit: float) -> Tensor:
    """`reference.clamped_gate`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, next_power_of_2(size))
    if rows:
        _clamped_kernel[(rows, ceil_div(size, block))](gate_up, out, size, gate_up.stride(0), gain, limit, BLOCK=block)
    return out
