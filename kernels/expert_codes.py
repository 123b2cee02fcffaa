"""The matrices of neighboring experts in codes, as they are stored and cross the link, and what an expert computes
between its two products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.kernels import ops


@dataclass(frozen=True)
class CodeForm:
    """bits: of a code; group: inputs that share parameters; floats: MXFP4. 16 bits stands for the compute dtype."""

    bits: int = 16
    group: int = 1
    floats: bool = False


@dataclass(frozen=True)
class ExpertCodes:
    """Matrices [experts, rows, columns] in codes [experts, rows, bytes] and parameters [experts, rows, groups, 2] of
    the compute dtype, of MXFP4 [experts, rows, groups] of bytes."""

    codes: Tensor
    parameters: Tensor
    columns: int
    form: CodeForm

    def __len__(self) -> int:
        return len(self.codes)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrices themselves."""
        if self.form.floats:
            return ops.expand_mxfp4(self.codes, self.parameters, dtype)
        return ops.dequantize(self.codes, self.parameters, self.columns, self.form.bits, self.form.group).to(dtype)


Units = Sequence[tuple[int, "Tensor | ExpertCodes"]]
"""First expert and matrices of it and its successors, all in one form."""


@dataclass(frozen=True)
class GatedActivation:
    """What an expert makes of its gates and ups: activation(gate) * up, or, with a limit, `reference.clamped_gate`."""

    activation: str = "silu"
    gain: float = 1.0
    limit: float = 0.0

    def __call__(self, gate_up: Tensor) -> Tensor:
        if self.limit:
            return ops.clamped_gate(gate_up, self.gain, self.limit)
        return ops.gated_activation(gate_up, self.activation)


def form_of(units: Units) -> CodeForm:
    matrices = units[0][1]
    return CodeForm() if isinstance(matrices, Tensor) else matrices.form


def shape_of(units: Units) -> tuple[int, int]:
    """Rows and columns of one expert's matrix."""
    matrices = units[0][1]
    if isinstance(matrices, Tensor):
        return matrices.shape[1], matrices.shape[2]
    return matrices.codes.shape[1], matrices.columns


def is_even(units: Units) -> bool:
    """Whether a byte holds two inputs, so that the kernels want all even inputs before all odd ones."""
    return form_of(units).bits == 4


def dense(units: Units, dtype: torch.dtype) -> list[tuple[int, Tensor]]:
    """The units without codes."""
    return [(first, each if isinstance(each, Tensor) else each.dense(dtype)) for first, each in units]
