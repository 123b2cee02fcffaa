"""What a way to store a matrix in codes has to tell: which tensors belong to it, what becomes of them, what they mean.

A store computes scale * code + minimum for groups of neighboring inputs (`kernels.reference.dequantize`), or holds
MXFP4 (`kernels.mxfp4_reference`). A scheme whose weights are equal steps of a scale in such groups, or are MXFP4,
delivers codes; any other one delivers numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from flexbatch.kernels import mxfp4_reference, reference
from flexbatch.models.source import StoredTensor
from flexbatch.models.specs import Piece
from flexbatch.validation.errors import CheckpointError

Parts = Mapping[str, Tensor]
"""The stored tensors of a matrix by what follows the module's name; "" is ``weight``."""
Rows = Callable[[Tensor], Tensor]
"""Row numbers [n] -> these rows [n, columns] in float32."""
LARGEST_GROUP = 1024
"""Inputs. A scale for a whole row is repeated for groups of at most so many: 0.3 % more bytes at 8 bits, and the tiles
of the kernels stay within registers."""

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
SCALE_TYPES = ("F32", "F16", "BF16")
PLAIN_TYPES = ("F64", *SCALE_TYPES)


def type_name(dtype: str) -> str:
    """The name that safetensors has for a type of safetensors or torch; the given one where it has none."""
    if not dtype.startswith("torch."):
        return dtype
    known = getattr(torch, dtype.removeprefix("torch."), None)
    return next((name for name, found in TYPES.items() if found is not None and found == known), dtype)


class Form(NamedTuple):
    """How a store holds a matrix: bits of a weight, and inputs that share a scale. floats: MXFP4, not equal steps."""

    bits: int
    group: int
    floats: bool = False


@dataclass(frozen=True)
class QuantizedPiece:
    """Rows of one canonical matrix in 4 or 8 bits. codes: [rows, columns * bits / 8] uint8; parameters: [rows, columns
    / group, 2] float32 (scale, minimum), of MXFP4 [rows, columns / group] uint8."""

    layer: int
    role: str
    rows: slice | None
    codes: Tensor
    parameters: Tensor
    bits: int
    group: int
    floats: bool = False

    @property
    def form(self) -> Form:
        return Form(self.bits, self.group, self.floats)

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.parameters.nbytes

    @property
    def columns(self) -> int:
        return 8 // self.bits * self.codes.shape[1]

    def fits(self, form: Form) -> bool:
        """Whether a store of this form holds it as it is."""
        if self.floats or form.floats:
            return self.form == form
        return self.holds(form.bits, form.group)

    def holds(self, bits: int, group: int) -> bool:
        """Whether `stored_as` knows this form of equal steps."""
        return bits in (4, 8) and bits >= self.bits and (group == self.group or self.group % group == 0)

    def stored_as(self, bits: int, group: int) -> QuantizedPiece:
        """The same weights with as many or more bits, and with smaller groups by repeating parameters. Raises
        ValueError when ``group`` does not divide this piece's, or there are fewer ``bits``."""
        if not self.holds(bits, group):
            raise ValueError(
                f"{self.bits} bits in groups of {self.group} inputs cannot be stored as {bits} bits in groups of "
                f"{group}; use as many bits or more, and a divisor of {self.group}"
            )
        parameters, codes = self.parameters, self.codes
        if group != self.group:
            groups = reference.num_groups(self.columns, group)
            parameters = parameters.repeat_interleave(self.group // group, dim=1)[:, :groups]
        if bits != self.bits:
            codes = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2)
        return QuantizedPiece(self.layer, self.role, self.rows, codes, parameters, bits, group)

    def dense(self) -> Piece:
        """The weights themselves, in float32."""
        if self.floats:
            values = mxfp4_reference.expand(self.codes, self.parameters, torch.float32)
            return Piece(self.layer, self.role, self.rows, values, from_codes=True)
        values = reference.dequantize(self.codes, self.parameters, self.columns, self.bits, self.group)
        return Piece(self.layer, self.role, self.rows, values, from_codes=True)


@dataclass(frozen=True)
class StoredPart:
    """One stored tensor of a matrix: its possible shapes and types, and whether it may be missing."""

    shapes: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    optional: bool = False

    def check(self, stored: StoredTensor, experts: tuple[int, ...] = ()) -> None:
        """Raises CheckpointError that names the tensor. experts: their number where it holds those of all."""
        shapes = [(*experts, *shape) for shape in self.shapes]
        if stored.shape not in shapes:
            wanted = " or ".join(dict.fromkeys(str(list(shape)) for shape in shapes))
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}, wanted {wanted}"
            )
        if type_name(stored.dtype) not in self.types:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} holds {stored.dtype}, wanted {' or '.join(self.types)}"
            )


@dataclass(frozen=True)
class Scheme:
    """A way to store a matrix [rows, columns] = [outputs, inputs]. Sub-classes are frozen: numbers and flags alone."""

    suffixes: ClassVar[tuple[str, ...]]
    """Everything but ``weight`` that may belong to a matrix."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Parts of which one is there where a matrix is stored so; "" counts where it holds no plain numbers."""
        return ("",)

    @property
    def turns(self) -> bool:
        """Whether a module that stores inputs by outputs (GPT-2's) is stored by it as outputs by inputs."""
        return True

    def parts(self, rows: int, columns: int) -> dict[str, StoredPart]:
        """Raises ValueError when the sizes of a matrix do not fit the scheme."""
        raise NotImplementedError

    def form(self, rows: int, columns: int) -> Form | None:
        """How a store holds it exactly, where its groups are in the order of the inputs; None: it comes in numbers."""
        return None

    def codes(self, parts: Parts, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Codes and parameters of a `QuantizedPiece` of `form`."""
        raise NotImplementedError

    def numbers(self, parts: Parts, rows: int, columns: int) -> Rows:
        raise NotImplementedError

    def applies(self, stored: Mapping[str, StoredTensor]) -> bool:
        """Whether these tensors of a module are codes, rather than a matrix that the quantizer left alone."""
        return any(
            part in stored and (part != "" or type_name(stored[part].dtype) not in PLAIN_TYPES) for part in self.marks
        )

    def check(self, stored: Mapping[str, StoredTensor], rows: int, columns: int, experts: tuple[int, ...] = ()) -> None:
        """Raises CheckpointError for tensors that are missing, or have another shape or type than the scheme's.
        experts: their number where the tensors hold a matrix of each."""
        first = next(iter(stored.values()))
        try:
            wanted = self.parts(rows, columns)
        except ValueError as error:
            raise CheckpointError(f"{first.file}: tensor {first.name} cannot be right: {error}") from error
        module = module_of(first.name, self.suffixes)
        for name, part in wanted.items():
            if name in stored:
                part.check(stored[name], experts)
            elif not part.optional:
                raise CheckpointError(
                    f"{first.file}: {first.name} is there, but the weight files lack {joined(module, name or 'weight')}"
                )
        more = [tensor for name, tensor in stored.items() if name not in wanted]
        if more:
            raise CheckpointError(
                f"{more[0].file}: tensor {more[0].name} does not belong to a matrix stored as {self}; is the "
                "quantization_config of config.json that of these files?"
            )


def module_of(name: str, suffixes: tuple[str, ...]) -> str:
    """The name of the module that a tensor belongs to."""
    endings = (joined("", suffix) for suffix in sorted(suffixes, key=len, reverse=True))
    found = next((ending for ending in endings if name.endswith(ending)), None)
    return name.removesuffix(found) if found else name.rpartition(".")[0]


def joined(module: str, suffix: str) -> str:
    """The name of a module's tensor. A suffix that begins with a line belongs to the module's own name."""
    return f"{module}{suffix}" if suffix.startswith("_") else f"{module}.{suffix}"


def finite(scales: Tensor, what: str) -> Tensor:
    """In float32. Raises ValueError where one is NaN or infinite."""
    wide = scales.float()
    if not torch.isfinite(wide).all():
        raise ValueError(f"{what} holds NaN or infinity, which makes every weight of its group one")
    return wide


def row_group(columns: int) -> int:
    """Inputs of a group where a scale holds for a whole row: its largest even divisor up to `LARGEST_GROUP`, the row
    itself where that is small."""
    if columns <= LARGEST_GROUP:
        return columns
    best = next((size for size in range(LARGEST_GROUP, 1, -1) if columns % size == 0 and size % 2 == 0), columns)
    return best if best >= 32 else columns


def affine(codes: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> tuple[Tensor, Tensor]:
    """scale * (code - zero) as a store of ``bits`` has it. codes: [rows, columns] uint8; scale and zero: [rows,
    groups]."""
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    minimum = -(scale * zero) + 0.0
    return codes.contiguous(), torch.stack([scale, minimum], dim=-1)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """[..., n] int32 -> [..., n * 32 / bits] uint8: fields of 2, 3, 4 or 8 bits, lowest first, across words where 32 is
    no multiple."""
    octets = words.contiguous().unsqueeze(-1).view(torch.uint8).flatten(-2)
    if bits == 8:
        return octets
    if bits == 3:
        three = octets.unflatten(-1, (-1, 3)).int()
        value = three[..., 0] | (three[..., 1] << 8) | (three[..., 2] << 16)
        return torch.stack([((value >> (3 * i)) & 7).to(torch.uint8) for i in range(8)], dim=-1).flatten(-2)
    mask = (1 << bits) - 1
    return torch.stack([(octets >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
