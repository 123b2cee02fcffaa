"""Weights in codes in C: expanded, and quantized with fitted parameters. The oracles are in `reference`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flexbatch.kernels import native, reference


def usable(dtype: torch.dtype, bits: int, group: int) -> bool:
    """Whether the compiled kernels know this form, and there are some on this machine."""
    known = dtype in native.DTYPES and bits in (4, 8) and not (bits == 4 and group % 2)
    return known and native.library() is not None


def _form(columns: int, bits: int, group: int, dtype: torch.dtype) -> native.Cache:
    return native.Cache(None, 0, 1, columns, bits, group, native.DTYPES[dtype])


def dequantize(
    codes: Tensor, parameters: Tensor, size: int, bits: int, group: int, out: Tensor | None = None, threads: int = 0
) -> Tensor:
    """`reference.dequantize`, into ``out`` [..., size] (dense) where it is given, on ``threads`` processor threads (0:
    torch's number)."""
    loaded = native.library()
    assert loaded is not None, "no compiled kernels on this machine"
    codes, parameters = codes.contiguous(), parameters.contiguous()
    out = torch.empty(*codes.shape[:-1], size, dtype=parameters.dtype) if out is None else out
    assert out.is_contiguous() and out.dtype == parameters.dtype and out.shape == (*codes.shape[:-1], size)
    loaded.flexbatch_expand_weights(
        ctypes.byref(_form(size, bits, group, parameters.dtype)),
        codes.data_ptr(),
        parameters.data_ptr(),
        out.data_ptr(),
        codes.numel() // max(1, codes.shape[-1]),
        threads or torch.get_num_threads(),
    )
    return out


def fit(x: Tensor, bits: int, group: int, threads: int = 0) -> tuple[Tensor, Tensor]:
    """`reference.fit` of x [rows, size], to rounding: sums run in another order, and of two parameters that are as good
    the other may be found."""
    loaded = native.library()
    assert loaded is not None, "no compiled kernels on this machine"
    x = x.contiguous()
    rows, size = x.shape
    codes = torch.empty(rows, reference.code_bytes(size, bits), dtype=torch.uint8)
    parameters = torch.empty(rows, reference.num_groups(size, group), 2, dtype=x.dtype)
    shrinks = (ctypes.c_float * len(reference.FIT_SHRINKS))(*reference.FIT_SHRINKS)
    loaded.flexbatch_fit_weights(
        ctypes.byref(_form(size, bits, group, x.dtype)),
        x.data_ptr(),
        codes.data_ptr(),
        parameters.data_ptr(),
        rows,
        shrinks,
        len(shrinks),
        reference.FIT_STEPS,
        threads or torch.get_num_threads(),
    )
    return codes, parameters
