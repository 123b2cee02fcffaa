"""Products of tokens with a matrix in codes in C, without an expanded copy of it. The oracle is `CodedMatrix.linear`.

In registers for few tokens; for more a piece at a time in the nearest cache, or, on processors with matrix tiles (AMX),
in exact parts of 16 bits. What activations are is never rounded. torch has operators for codes of 4 and 8 bits, too: in
float32 they took 30 to 100 times as long as expanding first, those in bfloat16 round scales of 8 bits a row, and none
was faster than these.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flexbatch.kernels import native
from flexbatch.kernels.coded_matrix import CodedMatrix, multiplied

VECTOR_TOKENS, HALF_TOKENS = 64, 128
"""The most tokens for which this is faster than expanding the matrix and multiplying in the library: without matrix
tiles, and with them in 16 bits, where the library takes the tiles, too. In float32 with tiles it is at any number."""
ANY_TOKENS = 1 << 30


class CodedCall(ctypes.Structure):
    """`coded_t` of native_coded.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "parameters", "bias", "out")),
        *(
            (name, ctypes.c_int64)
            for name in ("x_stride", "tokens", "rows", "columns", "bits", "group", "dtype", "threads")
        ),
    ]


def most_tokens(dtype: torch.dtype) -> int:
    """The most tokens of a product that is better taken with codes on this machine; 0 without compiled kernels."""
    loaded = native.library() if dtype in native.DTYPES else None
    if loaded is None:
        return 0
    if not loaded.flexbatch_has_tiles():
        return VECTOR_TOKENS
    return ANY_TOKENS if dtype == torch.float32 else HALF_TOKENS


def linear(
    x: Tensor,
    matrix: CodedMatrix,
    bias: Tensor | None = None,
    threads: int = 0,
    loaded: ctypes.CDLL | None = None,
) -> Tensor:
    """`CodedMatrix.linear` of x [tokens, columns] on ``threads`` processor threads (0: torch's number). ``loaded``: the
    compiled kernels, this machine's unless given."""
    loaded = loaded or native.library()
    assert loaded is not None, "no compiled kernels on this machine"
    (tokens, columns), rows = x.shape, matrix.codes.shape[0]
    assert multiplied(matrix.bits, matrix.group, columns, x.element_size(), "cpu"), (matrix.bits, matrix.group, columns)
    assert x.dtype == matrix.parameters.dtype and (bias is None or bias.dtype == x.dtype), "one dtype for all"
    assert matrix.codes.shape == (rows, columns * matrix.bits // 8), f"codes of {columns} columns: {matrix.codes.shape}"
    assert matrix.codes.is_contiguous() and matrix.parameters.is_contiguous()
    out = torch.empty(tokens, rows, dtype=x.dtype)
    if not tokens or not rows:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    call = CodedCall(
        x.data_ptr(), matrix.codes.data_ptr(), matrix.parameters.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(),
        x.stride(0), tokens, rows, columns, matrix.bits, matrix.group, native.DTYPES[x.dtype],
        threads or torch.get_num_threads(),
    )  # fmt: skip
    # torch's allocator aligns to 64 bytes on the CPU.
    workspace = torch.empty(loaded.flexbatch_coded_bytes(ctypes.byref(call)), dtype=torch.uint8)
    loaded.flexbatch_coded_linear(ctypes.byref(call), workspace.data_ptr())
    return out
