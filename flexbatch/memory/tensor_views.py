"""Weight tensors as views of byte slabs, and the buffers into which quantized ones are dequantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.kernels.coded_matrix import CodedMatrix
from flexbatch.memory.files import align
from flexbatch.memory.tiers import Pool
from flexbatch.memory.weight_plan import SLAB_ALIGNMENT, PlacedTensor, WeightPlan


@dataclass
class TensorView:
    """A tensor where it can be used: dense, or codes and parameters still to be dequantized."""

    placed: PlacedTensor
    dense: Tensor | None = None
    codes: Tensor | None = None
    parameters: Tensor | None = None

    @property
    def coded(self) -> CodedMatrix:
        """A quantized matrix as it is stored."""
        assert self.codes is not None and self.parameters is not None, self.placed
        return CodedMatrix(self.codes, self.parameters, self.placed.bits, self.placed.group)

    def copy_codes(self, source: TensorView) -> None:
        """Copy the codes and parameters of another view of the same quantized tensor into this one."""
        for target, values in ((self.codes, source.codes), (self.parameters, source.parameters)):
            assert target is not None and values is not None
            target.copy_(values)


def view_of(slab: Tensor, placed: PlacedTensor, start: int, dtype: torch.dtype) -> TensorView:
    """The tensor that lies at byte ``start`` of a uint8 slab."""
    if not placed.quantized:
        dtype = torch.float32 if placed.spec.wide else dtype
        return TensorView(placed, dense=slab[start : start + placed.dense_bytes].view(dtype).view(placed.spec.shape))
    codes = slab[start : start + math.prod(placed.codes_shape)].view(placed.codes_shape)
    kind = torch.uint8 if placed.floats else dtype
    parameters = slab[start + placed.codes_bytes : start + placed.num_bytes].view(kind).view(placed.parameters_shape)
    return TensorView(placed, codes=codes, parameters=parameters)


class DequantizationBuffers:
    """Dense copies of a layer's quantized matrices on the compute device, made once per layer and pass and shared by
    all of its micro-batches. One buffer per stage of a layer (before and after attention); each has one owner, the
    layer whose matrices it holds."""

    def __init__(self, plan: WeightPlan, gpu: Pool, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.buffers = {
            stage: gpu.allocate(f"dequantization {stage}", plan.dequantization_bytes(stage))
            for stage in ("pre", "post")
            if plan.dequantization_bytes(stage)
        }
        self.owners: dict[str, int] = {}

    def lacks(self, layer: int, stage: str) -> bool:
        """Whether the stage has a buffer that does not hold the layer's matrices."""
        return stage in self.buffers and self.owners.get(stage) != layer

    def fill(self, layer: int, stage: str, views: Sequence[TensorView]) -> dict[str, Tensor]:
        """Dequantize the quantized matrices of a layer's stage; returns the dense ones by role."""
        self.owners.pop(stage, None)  # nobody's from here on, should this one break off
        cursor, buffer, dense = 0, self.buffers[stage], dict[str, Tensor]()
        for view in views:
            placed = view.placed
            assert view.codes is not None and view.parameters is not None
            out = buffer[cursor : cursor + placed.dense_bytes].view(self.dtype).view(placed.spec.shape)
            if placed.floats:
                ops.expand_mxfp4(view.codes, view.parameters, self.dtype, out=out)
            else:
                ops.dequantize(view.codes, view.parameters, placed.spec.shape[1], placed.bits, placed.group, out=out)
            dense[placed.spec.role] = out
            cursor += align(placed.dense_bytes, SLAB_ALIGNMENT)
        self.owners[stage] = layer
        return dense

    def release(self, layer: int) -> None:
        """The layer's matrices are needed no more: its buffers have no owner."""
        self.owners = {stage: owner for stage, owner in self.owners.items() if owner != layer}
