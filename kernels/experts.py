"""The gated MLPs of a mixture of experts over routed tokens: a loop over the experts that are hit, which is the oracle,
torch's grouped matrix product, and Triton (`expert_products`).

T: tokens, K: experts of each, R = T x K routed rows, token by token; H: hidden size, W: width of an expert. Experts
come in units that need not lie side by side (they may be on several tiers): pairs of the first expert's number and the
matrices [experts, rows, columns] of that one and its successors, or their codes.

The results of a token are added in the order of its choices, never by atomic additions in the order of arrival: so a
token's sum does not depend on the other tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbatch.kernels.expert_codes import ExpertStacks, GatedActivation

DenseUnits = Sequence[tuple[int, Tensor]]
Biases = tuple[Tensor | None, Tensor | None]
"""Of gate and up [experts, 2 W], and of down [experts, H]."""
Activate = Callable[[Tensor], Tensor]
"""[R, 2 W] of gates and ups -> [R, W]."""

GROUPED_CAPABILITY = (8, 0)
"""Of the oldest GPUs that torch's grouped product runs on."""
GROUPED_ALIGNMENT = 16
"""Bytes that it wants rows of both operands to be a multiple of."""
GROUPED_TOKENS = 64
"""Of the mean expert, from which on torch's grouped product is taken for weights of 16 bits."""


def is_grouped(rows: int, gate_up: ExpertStacks, down: ExpertStacks) -> bool:
    """Whether a GPU multiplies so many routed rows by torch's grouped product, where it has one, and not in Triton:
    weights of 16 bits, in one piece (torch's product goes through all rows for each), and many tokens of an expert."""
    whole = all(stacks.form.bits == 16 and len(stacks.units) == 1 for stacks in (gate_up, down))
    return whole and rows >= GROUPED_TOKENS * gate_up.num_experts


def has_grouped_product(x: Tensor, stacks: ExpertStacks) -> bool:
    """Whether `by_groups` can multiply these: bfloat16 on a GPU that is new enough, with aligned rows. Other dtypes
    have a loop behind torch's function too, and one that waits for the GPU."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and grouped_mm() is not None
        and torch.cuda.get_device_capability(x.device) >= GROUPED_CAPABILITY
        and all(size * x.element_size() % GROUPED_ALIGNMENT == 0 for size in stacks.shape)
    )


def grouped_mm() -> Any:
    """torch's function, under its public name from 2.10 on; None where there is none for every GPU from
    `GROUPED_CAPABILITY` on."""
    public = getattr(F, "grouped_mm", None)
    if public is not None:
        return public
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return getattr(torch, "_grouped_mm", None) if (major, minor) >= (2, 9) else None


def expert_mlp(
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
    gate_up: ExpertStacks,
    down: ExpertStacks,
    gate: GatedActivation,
    biases: Biases = (None, None),
) -> Tensor:
    """Sum over the experts ``chosen`` [T, K] of ``shares`` [T, K] times down(gate(gate and up)) of x [T, H]: [T, H]. On
    a GPU the host waits for nothing."""
    if x.is_cuda and not multiplies_groups(x, chosen, gate_up, down):
        from flexbatch.kernels import expert_products

        return expert_products.expert_mlp(x, chosen, shares, gate_up, down, gate, biases)
    return weighted(routed_rows(x, chosen, gate_up, down, gate, biases), shares)


def routed_rows(
    x: Tensor,
    chosen: Tensor,
    gate_up: ExpertStacks,
    down: ExpertStacks,
    gate: GatedActivation,
    biases: Biases = (None, None),
) -> Tensor:
    """[T, K, H]: what every choice makes of x [T, H]. A number above those of all experts stands for one that is not
    here: its rows hold anything."""
    if not x.is_cuda:
        return rows_by_loop(x, chosen, gate_up, down, gate, biases)
    if multiplies_groups(x, chosen, gate_up, down):
        return rows_by_groups(x, chosen, dense(gate_up), dense(down), gate, biases)
    from flexbatch.kernels import expert_products

    return expert_products.routed_rows(x, chosen, gate_up, down, gate, biases).view(*chosen.shape, -1)


def multiplies_groups(x: Tensor, chosen: Tensor, gate_up: ExpertStacks, down: ExpertStacks) -> bool:
    """Whether torch's grouped product is there for these, and the faster one."""
    return is_grouped(chosen.numel(), gate_up, down) and all(has_grouped_product(x, each) for each in (gate_up, down))


def dense(stacks: ExpertStacks) -> DenseUnits:
    """The units of experts that are in no codes."""
    return [(first, matrices) for first, matrices in stacks.units if isinstance(matrices, Tensor)]


def scaled_inputs(
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
    gate_up: ExpertStacks,
    down: ExpertStacks,
    gate: GatedActivation,
    biases: Biases = (None, None),
) -> Tensor:
    """Sum over the experts ``chosen`` [T, K] of down(gate(gate and up)) of ``shares`` [T, K] times x [T, H], in x's
    dtype: what counts for an expert is what it is given."""
    rows, top_k = (x[:, None] * shares[:, :, None].to(x.dtype)).flatten(0, 1), chosen.shape[1]
    whole = shares.new_ones(len(rows), 1)
    out = expert_mlp(rows, chosen.reshape(-1, 1), whole, gate_up, down, gate, biases)
    return weighted(out.view(-1, top_k, out.shape[1]), torch.ones_like(shares))


def by_loop(
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
    gate_up: ExpertStacks,
    down: ExpertStacks,
    activate: Activate,
    biases: Biases = (None, None),
) -> Tensor:
    """`expert_mlp`, one expert after the other."""
    return weighted(rows_by_loop(x, chosen, gate_up, down, activate, biases), shares)


def rows_by_loop(
    x: Tensor,
    chosen: Tensor,
    gate_up: ExpertStacks,
    down: ExpertStacks,
    activate: Activate,
    biases: Biases = (None, None),
) -> Tensor:
    """`routed_rows`, one expert after the other, expanded when it has tokens. On a GPU it waits once for the number of
    tokens of each."""
    experts, here = chosen.flatten(), gate_up.num_experts
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=here)[:here].tolist()
    out = x.new_empty(len(experts), x.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = order[start : start + count]
            first, second = gate_up.matrix(expert, x.dtype), down.matrix(expert, x.dtype)
            inner = activate(F.linear(x[rows // chosen.shape[1]], first, _bias(biases[0], expert)))
            out[rows] = F.linear(inner, second, _bias(biases[1], expert))
            start += count
    return out.view(*chosen.shape, -1)


def _bias(biases: Tensor | None, expert: int) -> Tensor | None:
    return None if biases is None else biases[expert]


def by_groups(
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
    gate_up: DenseUnits,
    down: DenseUnits,
    activate: Activate,
    biases: Biases = (None, None),
) -> Tensor:
    """`expert_mlp` in one launch for every stretch of experts that lies in one piece; the host waits for nothing."""
    return weighted(rows_by_groups(x, chosen, gate_up, down, activate, biases), shares)


def rows_by_groups(
    x: Tensor, chosen: Tensor, gate_up: DenseUnits, down: DenseUnits, activate: Activate, biases: Biases = (None, None)
) -> Tensor:
    experts = chosen.flatten()
    inner = activate(grouped_linear(x, experts, gate_up, biases[0]))
    return grouped_linear(inner, experts, down, biases[1]).view(*chosen.shape, -1)


def grouped_linear(x: Tensor, experts: Tensor, units: DenseUnits, biases: Tensor | None = None) -> Tensor:
    """Row r of x (of R rows, or of T: then each stands for the K rows of a token) times the matrix of ``experts``[r],
    and its bias: [R, rows of a matrix]."""
    product, rows = grouped_mm(), len(experts)
    repeated = rows // len(x) if len(x) else 1
    # One row more than there are: where what a unit computes for the rows of other units goes.
    out = x.new_empty(rows + 1, units[0][1].shape[1])
    places = torch.arange(rows, device=x.device)
    for first, matrices in units:
        count = len(matrices)
        local = torch.where((experts >= first) & (experts < first + count), experts - first, count)
        sorted_local, order = local.sort(stable=True)
        ends = torch.searchsorted(sorted_local, torch.arange(count, device=x.device), right=True)
        result = product(x[order // repeated], matrices.transpose(-2, -1), offs=ends.to(torch.int32))
        out.index_copy_(0, torch.where(places < ends[-1], order, rows), result)
    return out[:rows] if biases is None else out[:rows].add_(biases[experts.clamp(max=len(biases) - 1)])


def weighted(rows: Tensor, shares: Tensor) -> Tensor:
    """Sum over the choices of rows [T, K, H] times shares [T, K], in their order, in float32."""
    total = rows[:, 0].float() * shares[:, :1]
    for choice in range(1, rows.shape[1]):
        total.addcmul_(rows[:, choice].float(), shares[:, choice, None])
    return total.to(rows.dtype)
