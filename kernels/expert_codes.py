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

    def multiplied(self, columns: int) -> bool:
        """Whether `expert_products` reads matrices of so many columns in this form: tiles are powers of two, of whole
        bytes."""
        if self.bits == 16:
            return True
        return self.group & (self.group - 1) == 0 and self.group * self.bits % 8 == columns * self.bits % 8 == 0


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

    def part(self, index: int) -> ExpertCodes:
        """One of the experts."""
        few = slice(index, index + 1)
        return ExpertCodes(self.codes[few], self.parameters[few], self.columns, self.form)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrices themselves."""
        if self.form.floats:
            return ops.expand_mxfp4(self.codes, self.parameters, dtype)
        return ops.dequantize(self.codes, self.parameters, self.columns, self.form.bits, self.form.group).to(dtype)


Matrices = Tensor | ExpertCodes
Units = Sequence[tuple[int, Matrices]]
"""First expert and matrices of it and its successors, all in one form."""


@dataclass(frozen=True)
class ExpertStacks:
    """One matrix of all experts of a layer, which lie in ``units`` anywhere. addresses: [2, experts] int64 on their
    device, of each matrix or its codes, and of its parameters (0: none)."""

    units: Units
    addresses: Tensor

    @property
    def num_experts(self) -> int:
        return self.addresses.shape[1]

    @property
    def form(self) -> CodeForm:
        return form_of(self.units[0][1])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one expert's matrix."""
        matrices = self.units[0][1]
        if isinstance(matrices, Tensor):
            return matrices.shape[1], matrices.shape[2]
        return matrices.codes.shape[1], matrices.columns

    @property
    def in_halves(self) -> bool:
        """Whether a byte holds two inputs, so that the kernels want all even inputs before all odd ones."""
        return self.form.bits == 4

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns] of one expert, expanded if it is in codes."""
        first, matrices = next(unit for unit in self.units if unit[0] <= expert < unit[0] + len(unit[1]))
        if isinstance(matrices, Tensor):
            return matrices[expert - first]
        return matrices.part(expert - first).dense(dtype)[0]


def stacks_of(units: Units) -> ExpertStacks:
    """Made once for matrices that stay where they are: the table is copied from the host."""
    addresses = []
    assert len({form_of(matrices) for _, matrices in units}) == 1, "experts of a layer in unlike forms"
    for _, matrices in sorted(units, key=lambda unit: unit[0]):
        parts = [matrices] if isinstance(matrices, Tensor) else [matrices.codes, matrices.parameters]
        for part in parts:
            assert part.is_contiguous(), f"an expert's matrix lies in one piece, not with strides {part.stride()}"
            assert not part.is_cuda or part.data_ptr() % 16 == 0, f"address {part.data_ptr()} is no multiple of 16"
        for index in range(len(matrices)):
            addresses.append([part[index].data_ptr() for part in parts] + [0] * (2 - len(parts)))
    table = torch.tensor(addresses, dtype=torch.int64).t().contiguous()
    return ExpertStacks(units, table.to(device_of(units)))


def form_of(matrices: Matrices) -> CodeForm:
    return CodeForm() if isinstance(matrices, Tensor) else matrices.form


def device_of(units: Units) -> torch.device:
    matrices = units[0][1]
    return matrices.device if isinstance(matrices, Tensor) else matrices.codes.device


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
