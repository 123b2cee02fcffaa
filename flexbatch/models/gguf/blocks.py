"""The tensors of a GGUF file: mapped, and turned into numbers, or into codes of our own where a store of 4 or 8 bits
holds exactly what the file does.

A store computes scale * code + minimum in float32 for every group (`kernels.reference.dequantize`). A type of blocks
fits it when its weights are equal steps of one scale: d * (q - offset), or d * q + m. d and m are float16 in the
file, so parameters of float16 and float32 hold them as they are; products with codes of up to 8 bits take at most 19 of
the 24 bits of a float32, so each weight is rounded as in the package gguf, in whose numbers -0 may stand for 0. MXFP4
is kept as it is, in a store of its own kind. The K-types have scales of scales, with more bits than a float16: they are
expanded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexbatch.kernels.mxfp4_reference import NO_SCALE
from flexbatch.validation.errors import CheckpointError, reason

if TYPE_CHECKING:
    from flexbatch.models.source import StoredTensor

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EXPANDED = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
)
"""Types that the package gguf turns into numbers and no store holds exactly."""
FLOAT_BLOCKS = "MXFP4"
CODE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 8, "Q5_1": 8, "Q8_0": 8, "IQ4_NL": 8}
"""Types whose equal steps a store holds exactly -> the fewest bits with which it does."""
GROUP = 32
"""Weights of one block of each of these types, which share a scale."""


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"reading a GGUF file needs the package gguf ({error}): pip install 'flexbatch[gguf]'"
        ) from error
    return gguf


@functools.cache
def type_names() -> Mapping[int, str]:
    """The types that are read, by their numbers in the file."""
    known = {kind.name: int(kind) for kind in _package().GGMLQuantizationType}
    return {known[name]: name for name in (*FLOATS, *CODE_BITS, FLOAT_BLOCKS, *EXPANDED) if name in known}


def block_sizes(name: str) -> tuple[int, int]:
    """Numbers and bytes of a block."""
    package = _package()
    elements, num_bytes = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[name]]
    return elements, num_bytes


def rows_and_columns(stored: StoredTensor) -> tuple[int, int]:
    """A vector of plain numbers is a column, so that its numbers can be put in order like rows."""
    if len(stored.shape) == 1:
        return (stored.shape[0], 1) if stored.dtype in FLOATS else (1, stored.shape[0])
    rows = 1
    for size in stored.shape[:-1]:
        rows *= size
    return rows, stored.shape[-1]


def raw_rows(stored: StoredTensor, start: int, stop: int) -> np.ndarray:
    """The bytes [rows, bytes of a row] of some rows: a view of the file, mapped for them alone, because a mapping keeps
    the pages that were touched in memory."""
    columns = rows_and_columns(stored)[1]
    elements, num_bytes = block_sizes(stored.dtype)
    width = columns // elements * num_bytes
    try:
        return np.memmap(stored.file, np.uint8, "r", offset=stored.offset + start * width, shape=(stop - start, width))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{stored.file}: tensor {stored.name} cannot be read: {reason(error)}") from error


def numbers(raw: np.ndarray, kind: str) -> Tensor:
    """Rows of weights: of plain numbers in their own type, of blocks in float32 as the package gguf expands them."""
    if kind in FLOATS:
        return torch.from_numpy(np.array(raw)).view(FLOATS[kind])
    package = _package()
    with np.errstate(all="ignore"):  # scales that are infinite or NaN are the file's
        return torch.from_numpy(package.quants.dequantize(raw, package.GGMLQuantizationType[kind]))


def floats_and_scales(stored: StoredTensor, raw: np.ndarray) -> tuple[Tensor, Tensor]:
    """Rows of MXFP4 as codes [rows, columns / 2] and scales [rows, columns / 32]. A block's first half of weights lies
    in the lower halves of its bytes, ours in the order of the weights. Raises CheckpointError."""
    blocks = np.array(raw).reshape(len(raw), -1, block_sizes(FLOAT_BLOCKS)[1])
    scales, codes = np.ascontiguousarray(blocks[..., 0]), _codes(blocks[..., 1:], FLOAT_BLOCKS)
    if (scales == NO_SCALE).any():
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} has blocks whose scale is {NO_SCALE}, which is none"
        )
    pairs = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return torch.from_numpy(pairs.reshape(len(raw), -1)), torch.from_numpy(scales)


def codes_and_parameters(raw: np.ndarray, kind: str, bits: int) -> tuple[Tensor, Tensor]:
    """Rows of blocks as codes [rows, columns * bits / 8] and parameters [rows, columns / 32, 2] float32 of a store of
    ``bits``, at least those of `CODE_BITS`."""
    blocks = np.array(raw).reshape(len(raw), -1, block_sizes(kind)[1])
    scale = _halves(blocks, 0)
    if kind in ("Q4_1", "Q5_1"):
        minimum, start = _halves(blocks, 2), 4
    else:
        offset = {"Q4_0": 8.0, "Q5_0": 16.0}.get(kind, 128.0)
        with np.errstate(all="ignore"):
            minimum, start = -offset * scale, 2
    codes = _codes(blocks[..., start:], kind)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    parameters = np.stack([scale, minimum.astype(np.float32)], axis=-1)
    return torch.from_numpy(codes.reshape(len(raw), -1)), torch.from_numpy(parameters)


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at one offset of every block, as float32."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0].astype(np.float32)


def _codes(data: np.ndarray, kind: str) -> np.ndarray:
    """One byte a weight, from what follows the scales of a block. Of 16 bytes of two codes each, the lower halves are
    the first 16 weights."""
    if kind == "Q8_0":
        return data ^ np.uint8(0x80)
    packed = data[..., -16:]
    codes = np.concatenate([packed & 0xF, packed >> 4], axis=-1)
    if kind in ("Q5_0", "Q5_1"):
        fifth = np.unpackbits(np.ascontiguousarray(data[..., :4]), axis=-1, bitorder="little")
        codes = codes | (fifth << 4)
    if kind == "IQ4_NL":
        levels = np.array(_package().quants.IQ4_NL.kvalues, dtype=np.int16) + 128
        codes = levels.astype(np.uint8)[codes]
    return codes
