"""Experts computed in C where they are stored. The signature of the oracle is in `experts_reference`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.kernels import native
from flexbatch.kernels.experts_reference import StoredExperts, StoredMatrices

ACTIVATIONS = {"silu": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
CLAMPED = 4
LANES = 16
"""Numbers of the widest vectors there are, to which rows of the workspace are padded."""


class Matrix(ctypes.Structure):
    """`matrix_t` of native_experts.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("outputs", "inputs", "bits", "group", "floats")]


class ExpertCall(ctypes.Structure):
    """`experts_t` of native_experts.c."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x",
                "out",
                "addresses",
                "experts",
                "starts",
                "tokens",
                "positions",
                "scales",
                "gate_up_bias",
                "down_bias",
            )
        ),
        ("gate_up", Matrix),
        ("down", Matrix),
        *((name, ctypes.c_int64) for name in ("groups", "rows", "dtype", "activation", "threads")),
        *((name, ctypes.c_float) for name in ("gain", "limit")),
    ]


@dataclass(frozen=True)
class ExpertTable:
    """Addresses of a layer's experts, made once. ``stored`` keeps what is there alive."""

    stored: StoredExperts
    addresses: Tensor
    """[experts, 4] int64: gate and up, their parameters, down, its parameters; 0 of experts that are not here."""
    biases: tuple[Tensor | None, Tensor | None]
    """In float32."""

    @property
    def expert_bytes(self) -> int:
        """Of both matrices of an expert, as they are stored."""
        parts = self.stored.gate_up, self.stored.down
        kept = [tensors for part in parts for tensors in (part.values, part.parameters) if tensors]
        return sum(next(iter(tensors.values())).nbytes for tensors in kept)

    @classmethod
    def of(cls, stored: StoredExperts, count: int) -> ExpertTable:
        """count: experts of the layer, those elsewhere included."""
        addresses = torch.zeros(count, 4, dtype=torch.int64)
        for column, matrices in ((0, stored.gate_up), (2, stored.down)):
            for offset, tensors in ((0, matrices.values), (1, matrices.parameters)):
                for expert, tensor in tensors.items():
                    assert tensor.device.type == "cpu" and tensor.is_contiguous(), f"expert {expert} is not whole here"
                    addresses[expert, column + offset] = tensor.data_ptr()
        first, second = (None if x is None else x.float().contiguous() for x in (stored.gate_up_bias, stored.down_bias))
        return cls(stored, addresses, (first, second))


def workspace_bytes(rows: int, stored: StoredExperts) -> int:
    """What a call for so many routed rows takes beside its tensors, at most."""
    return 4 * rows * sum(-(-size // LANES) * LANES for size in (stored.hidden, stored.width))


def expert_rows(
    x: Tensor,
    tokens: Tensor,
    experts: Tensor,
    table: ExpertTable,
    scales: Tensor | None = None,
    *,
    out: Tensor | None = None,
    threads: int = 0,
) -> Tensor:
    """`experts_reference.expert_rows` on ``threads`` processor threads (0: torch's number), into ``out`` [R, H] where
    it is given."""
    loaded = native.library()
    assert loaded is not None, "no compiled kernels on this machine"
    stored, x = table.stored, x.contiguous()
    assert x.shape[1] == stored.hidden, f"x has {x.shape[1]} columns, the experts take {stored.hidden}"
    out = x.new_empty(len(tokens), stored.hidden) if out is None else out
    assert out.is_contiguous() and out.dtype == x.dtype, "out must be dense and of the dtype of x"
    if not len(tokens):
        return out
    order = experts.argsort(stable=True)
    hit, counts = torch.unique_consecutive(experts[order], return_counts=True)
    assert bool(table.addresses[hit][:, [0, 2]].all()), "an expert is asked for that is not in host memory"
    starts = torch.zeros(len(hit) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    ordered = [each.to(torch.int32) for each in (hit, tokens[order], order)]
    factors = None if scales is None else scales[order].float()
    pointers = (x, out, table.addresses, ordered[0], starts, *ordered[1:], factors, *table.biases)
    call = ExpertCall(
        *(None if each is None else each.data_ptr() for each in pointers),
        _matrix(stored.gate_up, 2 * stored.width, stored.hidden),
        _matrix(stored.down, stored.hidden, stored.width),
        len(hit), len(tokens), native.DTYPES[x.dtype], CLAMPED if stored.limit else ACTIVATIONS[stored.activation],
        threads or torch.get_num_threads(), stored.gain, stored.limit,
    )  # fmt: skip
    needed, most = loaded.flexbatch_experts_bytes(ctypes.byref(call)), workspace_bytes(len(tokens), stored)
    assert needed <= most, f"{len(tokens)} rows take {needed} bytes of workspace, planned were {most}"
    workspace = torch.empty(needed, dtype=torch.uint8)
    loaded.flexbatch_expert_rows(ctypes.byref(call), workspace.data_ptr())
    return out


def _matrix(matrices: StoredMatrices, outputs: int, inputs: int) -> Matrix:
    return Matrix(outputs, inputs, matrices.bits, matrices.group, int(matrices.floats))
