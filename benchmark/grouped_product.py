"""torch's grouped matrix product over routed tokens: what the kernels of experts are held against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbatch.kernels.experts import Activate, weighted


def grouped_mm() -> Any:
    """torch's function, under its public name from 2.10 on; None where it has none."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def by_groups(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor, activate: Activate) -> Tensor:
    """`experts.expert_mlp` of the matrices [experts, rows, columns] of all experts; the host waits for nothing."""
    product, (ordered, order) = grouped_mm(), chosen.flatten().sort(stable=True)
    numbers = torch.arange(len(gate_up), device=x.device)
    ends = torch.searchsorted(ordered, numbers, right=True).to(torch.int32)
    inner = activate(product(x[order // chosen.shape[1]], gate_up.transpose(1, 2), offs=ends))
    out = x.new_empty(len(order), x.shape[1])
    out.index_copy_(0, order, product(inner, down.transpose(1, 2), offs=ends))
    return weighted(out.view(*chosen.shape, -1), shares)
