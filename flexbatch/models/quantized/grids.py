"""Integers and 8-bit floats with scales on a grid: one for a matrix, a row, a group of a row, or a block.

That is compressed-tensors (``pack-quantized``, ``int-quantized``, ``float-quantized``, ``naive-quantized``), the FP8
checkpoints of ``quant_method`` "fp8" and "fbgemm_fp8", and the int8 ones of bitsandbytes. weight = scale * (q - zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexbatch.models.quantized.scheme import (
    SCALE_TYPES,
    Form,
    Parts,
    Rows,
    Scheme,
    StoredPart,
    affine,
    finite,
    row_group,
    type_name,
    unpacked,
)
from flexbatch.models.quantized.words import group_index
from flexbatch.models.source import StoredTensor
from flexbatch.validation.errors import CheckpointError

SCALES = ("weight_scale", "weight_scale_inv", "SCB")
"""The names of scales. DeepSeek's ``weight_scale_inv`` is what a weight is multiplied with, too."""


@dataclass(frozen=True)
class Grid:
    """Rows and columns that share a scale; 0: all."""

    rows: int
    columns: int

    def __str__(self) -> str:
        if self.rows > 1 and self.columns:
            return f"blocks of {self.rows} x {self.columns}"
        return "whole matrices" if not self.rows else "whole rows" if not self.columns else f"groups of {self.columns}"

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Of the scales; blocks at the edges may be cut."""
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """As files have them: a scale for a matrix or a row may have fewer dimensions."""
        whole = self.shape(rows, columns)
        if not self.rows:
            return (whole, (1,), ()) if not self.columns else (whole,)
        return (whole, whole[:1]) if self.rows == 1 and not self.columns else (whole,)


TENSOR, ROW = Grid(0, 0), Grid(1, 0)


@dataclass(frozen=True)
class Scaled(Scheme):
    """``grids``: those that the scales may have, by their shape."""

    grids: tuple[Grid, ...]
    scale: str = "weight_scale"
    """The name of the scales."""
    suffixes: ClassVar[tuple[str, ...]] = (
        *SCALES,
        *("weight_zero_point", "weight_packed", "weight_shape", "weight_g_idx", "weight_format"),
    )

    @property
    def turns(self) -> bool:
        return self.scale == "SCB"

    def scale_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        return tuple(dict.fromkeys(shape for grid in self.grids for shape in grid.shapes(rows, columns)))

    def grid_of(self, shape: tuple[int, ...], rows: int, columns: int) -> Grid:
        return next(grid for grid in self.grids if shape in grid.shapes(rows, columns))


@dataclass(frozen=True)
class Integers(Scaled):
    """bits: of a code, in words of 32 bits (``packed``) or bytes. symmetric: there are no zero points. reorders: groups
    take inputs out of their order, which files have to tell."""

    bits: int = 8
    packed: bool = False
    symmetric: bool = True
    reorders: bool = False
    divisor: float = 1.0
    """Of the scales: bitsandbytes stores the largest element of a row, which stands for 127."""

    @property
    def marks(self) -> tuple[str, ...]:
        return ("weight_packed",) if self.packed else ("",)

    def __str__(self) -> str:
        form = "compressed-tensors" if self.scale == "weight_scale" else "bitsandbytes"
        return f"{form} int{self.bits} by {' or '.join(map(str, self.grids))}"

    @property
    def half(self) -> int:
        return 1 << (self.bits - 1)

    def parts(self, rows: int, columns: int) -> dict[str, StoredPart]:
        (grid,) = self.grids
        if grid.columns and columns % grid.columns and grid.rows == 1:
            raise ValueError(f"a matrix [{rows}, {columns}] does not divide into groups of {grid.columns} inputs")
        shapes = grid.shapes(rows, columns)
        packed_zeros = self.packed and not self.symmetric
        own = {"weight_packed": StoredPart(((rows, -(-columns * self.bits // 32)),), ("I32",))}
        own |= {
            "weight_shape": StoredPart(((2,),), ("I64", "I32"), True),
            "weight_g_idx": StoredPart(((columns,),), ("I32",), not self.reorders),
        }
        return {
            **(own if self.packed else {"": StoredPart(((rows, columns),), ("I8",))}),
            self.scale: StoredPart(shapes, SCALE_TYPES),
            "weight_zero_point": StoredPart(
                (self.zero_words(rows, columns), *shapes) if packed_zeros else shapes,
                ("I32", "I8") if packed_zeros else ("I8",),
                self.symmetric,
            ),
            **({"weight_format": StoredPart(((),), ("U8",), True)} if self.scale == "SCB" else {}),
        }

    def check(self, stored: Mapping[str, StoredTensor], rows: int, columns: int, experts: tuple[int, ...] = ()) -> None:
        super().check(stored, rows, columns, experts)
        zero = stored.get("weight_zero_point")
        if zero is None:
            return
        in_words = type_name(zero.dtype) == "I32"
        if zero.shape not in ((self.zero_words(rows, columns),) if in_words else self.grids[0].shapes(rows, columns)):
            raise CheckpointError(
                f"{zero.file}: tensor {zero.name} holds {zero.dtype} of shape {list(zero.shape)}, wanted I32 of shape "
                f"{list(self.zero_words(rows, columns))}, or I8 of the shape of {self.scale}"
            )

    def zero_words(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of packed zero points: along the rows."""
        tall, wide = self.grids[0].shape(rows, columns)
        return -(-tall * self.bits // 32), wide

    def form(self, rows: int, columns: int) -> Form | None:
        (grid,) = self.grids
        bits = 4 if self.bits <= 4 else 8
        return None if bits == 4 and columns % 2 else Form(bits, grid.columns or row_group(columns))

    def unpacked(self, parts: Parts, rows: int, columns: int) -> Tensor:
        """Codes [rows, columns] uint8, from 0 on."""
        if "weight_format" in parts and int(parts["weight_format"]):
            raise ValueError(
                f"weight_format is {int(parts['weight_format'])}, an order of a GPU; supported: 0, by rows"
            )
        if not self.packed:
            codes = parts[""].to(torch.int16) + self.half
            if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2 * self.half:
                raise ValueError(f"weight holds numbers that are none of {self.bits} bits")
            return codes.to(torch.uint8)
        if "weight_shape" in parts and parts["weight_shape"].tolist() != [rows, columns]:
            raise ValueError(f"weight_shape is {parts['weight_shape'].tolist()}, wanted {[rows, columns]}")
        return unpacked(parts["weight_packed"], self.bits)[:, :columns]

    def scales_and_zeros(self, parts: Parts, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """On the grid: scales, and zero points of codes from 0 on."""
        shape = self.grids[0].shape(rows, columns)
        scale = finite(parts[self.scale], self.scale).reshape(shape) / self.divisor
        zero = parts.get("weight_zero_point")
        if zero is None:
            return scale, torch.full_like(scale, self.half)
        if zero.dtype == torch.int32:  # packed along the rows
            return scale, unpacked(zero.t(), self.bits)[:, : shape[0]].t().float()
        return scale, zero.float().reshape(shape) + self.half

    def codes(self, parts: Parts, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        (grid,), (bits, group, _) = self.grids, self.form(rows, columns) or Form(8, columns)
        row = torch.arange(rows) // (grid.rows or rows)
        scale, zero = (values[row] for values in self.scales_and_zeros(parts, rows, columns))
        stored, parameters = affine(self.unpacked(parts, rows, columns), scale, zero, bits)
        return stored, parameters if grid.columns else parameters.expand(-1, columns // group, -1)

    def numbers(self, parts: Parts, rows: int, columns: int) -> Rows:
        (grid,) = self.grids
        codes, (scale, zero) = self.unpacked(parts, rows, columns), self.scales_and_zeros(parts, rows, columns)
        group = group_index(parts, "weight_g_idx", columns, grid.columns or columns, scale.shape[1])

        def read(index: Tensor) -> Tensor:
            row = index // (grid.rows or rows)
            return (codes[index].float() - zero[row][:, group]) * scale[row][:, group]

        return read


@dataclass(frozen=True)
class Floats(Scaled):
    """8-bit floats. scale: the name of the scales; "" where they may have either of two. exponents: scales in bytes
    are exponents of 2, plus 127."""

    exponents: bool = False

    def __str__(self) -> str:
        return f"float8 by {' or '.join(map(str, self.grids))}"

    def names(self) -> tuple[str, ...]:
        return (self.scale,) if self.scale else ("weight_scale", "weight_scale_inv")

    def parts(self, rows: int, columns: int) -> dict[str, StoredPart]:
        shapes = self.scale_shapes(rows, columns)
        types = (*SCALE_TYPES, "F8_E8M0", *(("U8",) if self.exponents else ()))
        scales = {name: StoredPart(shapes, types, len(self.names()) > 1) for name in self.names()}
        zeros = StoredPart(shapes, ("I8", "F8_E4M3", *SCALE_TYPES), True)
        return {"": StoredPart(((rows, columns),), ("F8_E4M3", "F8_E5M2")), **scales, "weight_zero_point": zeros}

    def check(self, stored: Mapping[str, StoredTensor], rows: int, columns: int, experts: tuple[int, ...] = ()) -> None:
        super().check(stored, rows, columns, experts)
        found = [name for name in self.names() if name in stored]
        if len(found) != 1:
            weight = stored[""]
            has = "both of" if found else "neither"
            raise CheckpointError(
                f"{weight.file}: tensor {weight.name} holds {weight.dtype}, and has {has} "
                f"{'' if found else 'a '}{' and '.join(self.names()) if found else ' nor a '.join(self.names())}: its "
                "scales are one of them"
            )

    def numbers(self, parts: Parts, rows: int, columns: int) -> Rows:
        name = next(name for name in self.names() if name in parts)
        stored, weight, zero = parts[name], parts[""], parts.get("weight_zero_point")
        grid = self.grid_of(tuple(stored.shape), rows, columns)
        wide = torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored
        scale = finite(wide, name).reshape(grid.shape(rows, columns))
        offset = torch.zeros_like(scale) if zero is None else finite(zero, "weight_zero_point").reshape(scale.shape)
        group = torch.arange(columns) // (grid.columns or columns)

        def read(index: Tensor) -> Tensor:
            row = index // (grid.rows or rows)
            values = weight.view(torch.uint8)[index].view(weight.dtype).float()
            return (values - offset[row][:, group]) * scale[row][:, group]

        return read
