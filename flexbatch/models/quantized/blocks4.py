"""bitsandbytes in 4 bits: codes of 16 levels, in blocks over all elements of a matrix, row after row.

weight = level[code] * absmax[block]. With double quantization the largest elements are 8-bit codes of a second table,
in blocks of their own, less their mean: absmax = table[code] * nested_absmax[block] + nested_offset. Two codes share a
byte, the first in the upper half. The levels are no equal steps, so that a matrix is always expanded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexbatch.models.quantized.scheme import TYPES, Parts, Rows, Scheme, StoredPart, finite
from flexbatch.models.source import StoredTensor
from flexbatch.validation.errors import CheckpointError

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of the normal distribution (Dettmers et al. 2023, "QLoRA", appendix E)."""
HALF_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = (*HALF_FP4, *(-value for value in HALF_FP4))
"""Sign, two bits of exponent, one of mantissa."""
LEVELS = {"nf4": NF4, "fp4": FP4}
STATE = "weight.quant_state.bitsandbytes__"
STATES = tuple(STATE + kind for kind in LEVELS)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_STATE_BYTES = 4096


@dataclass(frozen=True)
class Blocks4(Scheme):
    suffixes: ClassVar[tuple[str, ...]] = (
        *STATES,
        *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    )

    @property
    def marks(self) -> tuple[str, ...]:
        return STATES

    def __str__(self) -> str:
        return "bitsandbytes in 4 bits"

    def parts(self, rows: int, columns: int) -> dict[str, StoredPart]:
        count = -(-rows * columns // 2)
        # Codes may lie in elements of another type, several bytes each (bnb_4bit_quant_storage).
        storage = {name: kind.itemsize for name, kind in TYPES.items() if kind is not None and kind.itemsize <= 4}
        weight = tuple((count // size, 1) for size in sorted(set(storage.values())) if count % size == 0)
        blocks = tuple((-(-rows * columns // size),) for size in BLOCK_SIZES)
        nested = tuple((-(-count // size),) for (count,) in blocks for size in BLOCK_SIZES)
        states = tuple((size,) for size in range(2, MAX_STATE_BYTES))
        return {
            "": StoredPart((*weight, *(shape[::-1] for shape in weight)), tuple(storage)),
            "weight.absmax": StoredPart(blocks, ("F32", "F16", "BF16", "U8")),
            "weight.quant_map": StoredPart(((16,),), ("F32",), True),
            "weight.nested_absmax": StoredPart(nested, ("F32",), True),
            "weight.nested_quant_map": StoredPart(((256,),), ("F32",), True),
            **{mark: StoredPart(states, ("U8",), True) for mark in self.marks},
        }

    def check(self, stored: Mapping[str, StoredTensor], rows: int, columns: int, experts: tuple[int, ...] = ()) -> None:
        super().check(stored, rows, columns, experts)
        if len([mark for mark in self.marks if mark in stored]) != 1:
            raise CheckpointError(f"{stored[''].file}: tensor {stored[''].name} is of two kinds, nf4 and fp4")

    def numbers(self, parts: Parts, rows: int, columns: int) -> Rows:
        (mark,) = (mark for mark in self.marks if mark in parts)
        state = read_state(parts[mark], rows, columns)
        octets = parts[""].contiguous().reshape(-1).view(torch.uint8)
        count, block = rows * columns, state["blocksize"]
        if octets.numel() != -(-count // 2):
            raise ValueError(f"weight has {octets.numel():,} bytes, wanted {-(-count // 2):,}")
        absmax = largest(parts, state)
        if absmax.numel() != -(-count // block):
            raise ValueError(f"weight.absmax has {absmax.numel():,} scales, wanted one for each {block} weights")
        codes = torch.stack([octets >> 4, octets & 0xF], dim=-1).flatten()[:count].view(rows, columns)
        levels = torch.tensor(LEVELS[mark.removeprefix(STATE)])

        def read(index: Tensor) -> Tensor:
            block_index = (index[:, None] * columns + torch.arange(columns)) // block
            return levels[codes[index].int()] * absmax[block_index]

        return read


def read_state(data: Tensor, rows: int, columns: int) -> dict[str, Any]:
    """What is stored as JSON beside the tensors. Raises ValueError."""
    try:
        state = json.loads(bytes(data.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its quant_state is no JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError("its quant_state is no JSON object")
    if state.get("shape") != [rows, columns]:
        raise ValueError(f"its quant_state has the shape {state.get('shape')!r:.80}, wanted {[rows, columns]}")
    for key in ("blocksize", *(("nested_blocksize",) if state.get("nested_blocksize") is not None else ())):
        if state.get(key) not in BLOCK_SIZES:
            raise ValueError(f"its quant_state has {key}={state.get(key)!r:.80}; known: {BLOCK_SIZES}")
    offset = state.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not abs(offset) < 1e30:
        raise ValueError(f"its quant_state has nested_offset={offset!r:.80}, wanted a number")
    return state


def largest(parts: Parts, state: dict[str, Any]) -> Tensor:
    """The largest element of every block, in float32. Raises ValueError."""
    absmax = parts["weight.absmax"]
    if absmax.dtype != torch.uint8:
        return finite(absmax, "weight.absmax")
    lacking = [name for name in ("nested_absmax", "nested_quant_map") if f"weight.{name}" not in parts]
    if lacking or "nested_blocksize" not in state:
        raise ValueError(f"weight.absmax is quantized, but {lacking[0] if lacking else 'nested_blocksize'} is missing")
    table = finite(parts["weight.nested_quant_map"], "weight.nested_quant_map")
    outer = finite(parts["weight.nested_absmax"], "weight.nested_absmax")
    block_index = torch.arange(absmax.numel()) // state["nested_blocksize"]
    if outer.numel() != -(-absmax.numel() // state["nested_blocksize"]):
        raise ValueError(f"weight.nested_absmax has {outer.numel()} scales for {absmax.numel()} blocks")
    return table[absmax.long()] * outer[block_index] + state.get("nested_offset", 0.0)
