"""The gated MLPs of a mixture of experts over routed tokens: a loop over the experts that are hit, which is the oracle
and what processors do, and Triton (`expert_products`) on a GPU.

torch has a grouped matrix product, too. On an H100 it took 1.1 to 2.4 times as long as Triton with weights of 16 bits,
and as long with 1,024 tokens for each of Mixtral's experts (`benchmark/results/expert_kernels-h100.json`).

T: tokens, K: experts of each, R = T x K routed rows, token by token; H: hidden size, W: width of an expert. Experts
come in units that need not lie side by side (they may be on several tiers): pairs of the first expert's number and the
matrices [experts, rows, columns] of that one and its successors, or their codes.

The results of a token are added in the order of its choices, never by atomic additions in the order of arrival: so a
token's sum does not depend on the other tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbatch.kernels.expert_codes import ExpertStacks, GatedActivation

Biases = tuple[Tensor | None, Tensor | None]
"""Of gate and up [experts, 2 W], and of down [experts, H]."""
Activate = Callable[[Tensor], Tensor]
"""[R, 2 W] of gates and ups -> [R, W]."""


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
    if not x.is_cuda:
        return by_loop(x, chosen, shares, gate_up, down, gate, biases)
    from flexbatch.kernels import expert_products

    return expert_products.expert_mlp(x, chosen, shares, gate_up, down, gate, biases)


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
    from flexbatch.kernels import expert_products

    return expert_products.routed_rows(x, chosen, gate_up, down, gate, biases).view(*chosen.shape, -1)


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


def weighted(rows: Tensor, shares: Tensor) -> Tensor:
    """Sum over the choices of rows [T, K, H] times shares [T, K], in their order, in float32."""
    total = rows[:, 0].float() * shares[:, :1]
    for choice in range(1, rows.shape[1]):
        total.addcmul_(rows[:, choice].float(), shares[:, choice, None])
    return total.to(rows.dtype)
