"""AWQ and GPTQ 4-bit checkpoints -> the project's own codes and parameters, without a detour over 16 bits.

Both store int32 words of eight codes, scales per group of inputs and integer zero points: weight[n, k] = scale[g, n]
* (code[k, n] - zero[g, n]). AWQ ("gemm" layout) packs eight neighboring outputs into a word, interleaved; GPTQ
packs eight neighboring inputs, and its zero points are stored less one, in four bits: 15 stands for 0 (but not in
"gptq_v2", which stores them as they are). The project's layout is in `kernels.reference.quantize`: two codes a byte
along the input dimension, parameters (scale, minimum) per group with weight = scale * code + minimum; so minimum =
-scale * zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexbatch.kernels import reference
from flexbatch.models.config_types import FLAG, MAX_INNER, OBJECT, TEXT, check_keys, shown
from flexbatch.models.specs import Piece
from flexbatch.validation.errors import CheckpointError

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# Which of the eight outputs of a word its n-th four bits hold (AutoAWQ, "gemm").
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4


@dataclass(frozen=True)
class QuantizedPiece:
    """Rows of one canonical matrix in 4 or 8 bits. codes: [rows, columns * bits / 8] uint8; parameters: [rows, columns
    / group, 2] float32 (scale, minimum)."""

    layer: int
    role: str
    rows: slice | None
    codes: Tensor
    parameters: Tensor
    bits: int
    group: int

    def regrouped(self, group: int) -> QuantizedPiece:
        """The same weights with smaller groups, by repeating parameters. Raises ValueError when ``group`` does not
        divide this piece's."""
        if self.group % group:
            raise ValueError(
                f"groups of {self.group} inputs cannot be split into groups of {group}; use a divisor of {self.group}"
            )
        parameters = self.parameters.repeat_interleave(self.group // group, dim=1)
        return QuantizedPiece(self.layer, self.role, self.rows, self.codes, parameters, self.bits, group)

    def dense(self, dtype: torch.dtype) -> Piece:
        """The weights themselves, computed in float32."""
        values = reference.dequantize(
            self.codes, self.parameters, 8 // self.bits * self.codes.shape[1], self.bits, self.group
        )
        return Piece(self.layer, self.role, self.rows, values.to(dtype))


@dataclass(frozen=True)
class Packing:
    """The quantization of a checkpoint. group: inputs that share a scale, 0: all of a row. zero_offset: what is added
    to a stored zero point."""

    method: str
    group: int
    zero_offset: int

    def group_of(self, columns: int) -> int:
        return self.group or columns

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Shapes by suffix that the files must hold for a matrix [rows, columns]. Raises ValueError when the sizes do
        not fit whole words and groups."""
        group = self.group_of(columns)
        if columns % group or rows % 8 or columns % 8:
            raise ValueError(
                f"a matrix [{rows}, {columns}] does not divide into words of 8 codes and groups of {group} inputs"
            )
        qweight = (columns, rows // 8) if self.method == "awq" else (columns // 8, rows)
        return {
            "qweight": qweight,
            "qzeros": (columns // group, rows // 8),
            "scales": (columns // group, rows),
            "g_idx": (columns,),
        }


FORMATS = {"awq": {"gemm": 0}, "gptq": {"gptq": 1, "gptq_v2": 0}}
"""The layouts that are read, by method, and what is added to their stored zero points."""
FORMAT_KEYS = ("checkpoint_format", "format", "version")
PACKED = {"quant_method": TEXT, **dict.fromkeys(FORMAT_KEYS, TEXT), "pack_dtype": TEXT, "is_marlin_format": FLAG}


def read_packing(config: Mapping[str, Any]) -> Packing | None:
    """The ``quantization_config`` of a config.json, None without one. Raises CheckpointError for what is not AWQ or
    GPTQ with 4 bits."""
    check_keys(config, {"quantization_config": OBJECT})
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    check_keys(quantization, PACKED, "quantization_config.")
    method = str(quantization.get("quant_method")).lower()
    bits = _agreed(quantization, ("bits", "w_bit"), None)
    if method not in FORMATS or type(bits) is not int or bits != BITS:
        raise CheckpointError(
            f"config.json: quantization_config with quant_method {quantization.get('quant_method')!r} and "
            f"{bits!r} bits is not supported; "
            "supported: awq and gptq with 4 bits"
        )
    layouts = FORMATS[method]
    layout = _agreed(quantization, FORMAT_KEYS, next(iter(layouts)))
    if quantization.get("is_marlin_format"):
        layout = "marlin"
    if layout not in layouts:
        raise CheckpointError(
            f"config.json: quantization_config with {method} layout {layout!r} is not supported; supported: "
            f"{' and '.join(layouts)}"
        )
    words = quantization.get("pack_dtype") or "int32"
    if words.lower().removeprefix("torch.") != "int32":
        raise CheckpointError(
            f"config.json: quantization_config.pack_dtype={words!r} is not supported; supported: int32"
        )
    group = _agreed(quantization, ("group_size", "q_group_size"), 128)
    if type(group) is not int or not (group == -1 or 1 <= group <= MAX_INNER):
        raise CheckpointError(
            f"config.json: quantization_config.group_size={shown(group)} must be a number of inputs, or -1 for "
            "whole rows"
        )
    return Packing(method, max(group, 0), layouts[layout])


def _agreed(quantization: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """The value that one or several spellings of a key give, in small letters. Raises CheckpointError where they
    contradict each other."""
    found = {name: quantization[name] for name in names if quantization.get(name) is not None}
    values = {name: value.lower() if isinstance(value, str) else value for name, value in found.items()}
    if not values:
        return default
    first = next(iter(values.values()))
    if any(value != first for value in values.values()):
        raise CheckpointError(
            "config.json: quantization_config says "
            f"{' and '.join(f'{name}={value!r}' for name, value in found.items())}; these contradict"
        )
    return first


def unpack(packing: Packing, tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns / 2] and parameters [rows, groups, 2] of one stored matrix. Raises CheckpointError for
    activation order."""
    scales = tensors["scales"].float()
    if packing.method == "awq":
        codes, zeros = (_unpack_outputs(tensors[part], AWQ_ORDER) for part in ("qweight", "qzeros"))
    else:
        codes = _nibbles(tensors["qweight"]).movedim(-1, 1).flatten(0, 1)
        zeros = _unpack_outputs(tensors["qzeros"], range(8))
    columns = codes.shape[0]
    if "g_idx" in tensors:
        group = packing.group_of(columns)
        if not torch.equal(tensors["g_idx"].long(), torch.arange(columns) // group):
            raise CheckpointError(
                f"{name}.g_idx: inputs are assigned to groups out of order (GPTQ's desc_act), which contiguous "
                f"groups of {group} cannot hold; "
                "quantize the model again with desc_act=false"
            )
    minimum = -scales * ((zeros + packing.zero_offset) & 0xF).float()
    codes = codes.t()
    return codes[:, 0::2] | (codes[:, 1::2] << 4), torch.stack([scales.t(), minimum.t()], dim=-1)


def _nibbles(words: Tensor) -> Tensor:
    """[..., 8] uint8: the four-bit fields of int32 words, lowest first."""
    octets = words.contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.stack([octets & 0xF, octets >> 4], dim=-1).flatten(-2)


def _unpack_outputs(words: Tensor, order: tuple[int, ...] | range) -> Tensor:
    """[inputs, words] -> [inputs, 8 * words] where field i of a word is output ``order[i]`` of its eight."""
    position = torch.tensor([list(order).index(output) for output in range(8)])
    return _nibbles(words)[..., position].flatten(-2)
