"""Experts where they are stored, in host memory, and the plain-torch oracle of what they compute.

A matrix of an expert is dense, [outputs, inputs] in the compute dtype, or it is codes [outputs, bytes] with parameters:
pairs of scale and minimum for each group, as `reference.quantize` makes them, or a byte for each block of MXFP4
(`mxfp4_reference`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from flexbatch.kernels import mxfp4_reference, reference


@dataclass(frozen=True)
class StoredMatrices:
    """The same matrix of several experts, by their numbers."""

    values: Mapping[int, Tensor]
    parameters: Mapping[int, Tensor] = field(default_factory=dict)
    bits: int = 16
    """16 stands for the compute dtype."""
    group: int = 64
    floats: bool = False
    """MXFP4."""

    def dense(self, expert: int, inputs: int, x: Tensor) -> Tensor:
        """[outputs, inputs] in the dtype of x."""
        values = self.values[expert]
        if self.bits == 16:
            return values
        parameters = self.parameters[expert]
        if self.floats:
            return mxfp4_reference.expand(values, parameters, x.dtype)
        return reference.dequantize(values, parameters, inputs, self.bits, self.group)


@dataclass(frozen=True)
class StoredExperts:
    """What of a layer's experts lies in host memory. biases: of all experts, [experts, 2 width] and [experts, hidden],
    in the compute dtype."""

    gate_up: StoredMatrices
    down: StoredMatrices
    hidden: int
    width: int
    activation: str = "silu"
    """As in `reference.gated_activation`; of no account where there is a ``limit``."""
    gain: float = 1.0
    limit: float = 0.0
    """Of `reference.clamped_gate`; 0: a gate without limits."""
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def expert_rows(
    x: Tensor, tokens: Tensor, experts: Tensor, stored: StoredExperts, scales: Tensor | None = None
) -> Tensor:
    """[R, H]: what the expert ``experts``[r] makes of row ``tokens``[r] of x [T, H], which is multiplied by
    ``scales``[r] first where there are any. tokens, experts: [R] int64."""
    rows = x[tokens] if scales is None else x[tokens] * scales[:, None].to(x.dtype)
    out = x.new_empty(len(tokens), stored.hidden)
    activate = partial(reference.gated_activation, activation=stored.activation)
    if stored.limit:
        activate = partial(reference.clamped_gate, gain=stored.gain, limit=stored.limit)
    for expert in experts.unique().tolist():
        mine = experts == expert
        biases = (None if each is None else each[expert] for each in (stored.gate_up_bias, stored.down_bias))
        gate_up, down = stored.gate_up.dense(expert, stored.hidden, x), stored.down.dense(expert, stored.width, x)
        first, second = biases
        out[mine] = F.linear(activate(F.linear(rows[mine], gate_up, first)), down, second)
    return out
