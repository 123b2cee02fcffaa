"""A layer of experts as functions over a dict role -> tensor: which experts a token goes to, and what they make of it.

T: tokens, H: hidden size, E: experts, K: experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.kernels.expert_codes import ExpertStacks, GatedActivation, stacks_of
from flexbatch.kernels.experts import expert_mlp, routed_rows, scaled_inputs, weighted
from flexbatch.models.expert_arch import Experts
from flexbatch.models.routing import RoutingCounts
from flexbatch.models.specs import expert_role

Weights = Mapping[str, Tensor]
Stacks = tuple[ExpertStacks, ExpertStacks]
"""Of gate and up, and of down."""
Linear = Callable[[str, Tensor], Tensor]
"""A role and x -> the product of x with the role's matrix, its bias and the updates of adapters."""
Halves = Generator[None, None, Tensor]
"""Work in two halves, and its result: between them nothing is left to do but to wait for the CPU's experts. Where it
has none there is one half."""


class RowsElsewhere(Protocol):
    """Results of experts that are computed elsewhere."""

    @property
    def left_out(self) -> Tensor:
        """Whether an expert is one of those: [E] on the device of the hidden states."""

    def put_into(self, out: Tensor) -> None:
        """Wait for them, and put them into the rows [T x K, H] of all choices."""


Elsewhere = Callable[[Tensor, Tensor, Tensor | None], RowsElsewhere]
"""Hidden states [T, H], experts [T, K] and, where these scale an expert's input, what they count [T, K]: sends for the
results of the experts that are not computed here."""


FetchHit = Callable[[Tensor], None]
"""Experts [T, K] -> their matrices are where they are multiplied, for what is launched from then on."""


def feed_forward(
    experts: Experts,
    weights: Weights,
    x: Tensor,
    activation: str,
    linear: Linear,
    layer: int = 0,
    routing: RoutingCounts | None = None,
    stacks: Stacks | None = None,
    elsewhere: Elsewhere | None = None,
    fetch_hit: FetchHit | None = None,
) -> Halves:
    """[T, H] of the normed hidden states x [T, H]. linear: of the shared MLP. routing: where the choices of the layer
    are counted. stacks: the experts; None: they are among the weights, in the dtype of x. elsewhere: None where all of
    them are here. fetch_hit: is told of the choices before the products, and sees to it that these experts are here."""
    chosen, shares = route(experts, weights, x)
    if routing is not None:
        routing.add(layer, chosen)
    gate_up, down = stacks or (stacked(experts, weights, "gate_up"), stacked(experts, weights, "down"))
    gate = GatedActivation(activation, experts.gain, experts.clamp)
    biases = weights.get("expert_biases.gate_up"), weights.get("expert_biases.down")
    others = None if elsewhere is None else elsewhere(x, chosen, shares if experts.scales_input else None)
    if fetch_hit is not None:
        fetch_hit(chosen)
    shared = _shared_mlp(experts, weights, x, activation, linear) if experts.shared_width else None
    if others is None:
        way = scaled_inputs if experts.scales_input else expert_mlp
        out = way(x, chosen, shares, gate_up, down, gate, biases)
    else:
        given, each = x, torch.where(others.left_out[chosen], gate_up.num_experts, chosen)
        if experts.scales_input:
            given, each = (x[:, None] * shares[:, :, None].to(x.dtype)).flatten(0, 1), each.reshape(-1, 1)
            shares = torch.ones_like(shares)
        rows = routed_rows(given, each, gate_up, down, gate, biases).view(*chosen.shape, -1)
        yield
        others.put_into(rows.flatten(0, 1))
        out = weighted(rows, shares)
    return out if shared is None else out.add_(shared)


def _shared_mlp(experts: Experts, weights: Weights, x: Tensor, activation: str, linear: Linear) -> Tensor:
    shared = linear("shared.down", ops.gated_activation(linear("shared.gate_up", x), activation))
    return shared.mul_(F.linear(x, weights["shared_gate.weight"]).sigmoid()) if experts.shared_gate else shared


def stacked(experts: Experts, weights: Weights, name: str) -> ExpertStacks:
    """The matrices ``name`` of all experts, as they were placed."""
    roles = [(first, count, f"{expert_role(first, name)}.weight") for first, count in experts.units]
    return stacks_of([(first, weights[role].unflatten(0, (count, -1))) for first, count, role in roles])


def route(experts: Experts, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """The experts [T, K] int64 of every token, best first, and what each counts [T, K] float32.

    Of equal scores the lower number wins: `topk` has no rule, and would let the company of a token decide. What changes
    no number is not launched: hosts took 3 to 5 ms to launch a tick of experts, most of it beside the products.
    """
    weight = weights["router.weight"]
    logits = F.linear(x.float() if experts.float_router else x, weight, weights.get("router.bias"))
    if experts.scoring == "sparsemixer":
        return _sparsemixer(logits, experts.margin)
    logits = logits.float()
    if experts.scoring == "softmax_of_chosen":
        best, chosen = _best(logits, experts.top_k)
        return chosen, _scaled(best.softmax(-1), experts)
    scores = logits.softmax(-1) if experts.scoring == "softmax" else logits.sigmoid()
    # Sigmoids of unlike scores may be one number, 1: without a correction the scores themselves decide.
    ranked = logits if experts.scoring == "sigmoid" else scores
    if experts.correction:
        ranked = scores + weights["router.correction"].float()
    chosen = _best(_in_best_groups(ranked, experts), experts.top_k)[1]
    shares = scores.gather(1, chosen)
    if experts.normalize:
        power = experts.normalize_power
        total = shares.sum(-1, keepdim=True) if power == 1 else shares.norm(power, -1, keepdim=True)
        if experts.normalize_eps:
            total = total + experts.normalize_eps
        if experts.normalize_least:
            total = total.clamp(min=experts.normalize_least)
        shares = shares / total
    return chosen, _scaled(shares, experts)


def _scaled(shares: Tensor, experts: Experts) -> Tensor:
    return shares if experts.scale == 1.0 else shares * experts.scale


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest [T, count] and their places; these side by side, as they are flattened more than once."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], order[:, :count].contiguous()


def _in_best_groups(scores: Tensor, experts: Experts) -> Tensor:
    """Scores [T, E], minus infinity outside the groups with the largest sums of their best scores.

    Older releases of transformers and DeepSeek's own code put zero there, which an expert with a negative corrected
    score would lose to.
    """
    groups, top_groups = experts.groups, experts.top_groups
    if groups == top_groups:
        return scores
    grouped = scores.unflatten(-1, (groups, -1))
    sums = _best(grouped.flatten(0, 1), experts.group_best)[0].sum(-1).view(-1, groups)
    kept = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, _best(sums, top_groups)[1], True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)


def _sparsemixer(logits: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Two experts, one after the other. Each counts what a softmax over the logits gives it of which the relative
    distance to the best is at most ``margin``."""
    left, chosen, shares = logits, [], []
    for _ in range(2):
        best, expert = _best(left, 1)
        near = (best - left) / logits.abs().clamp(min=best) <= margin
        chosen.append(expert)
        shares.append(left.masked_fill(~near, -torch.inf).softmax(-1).gather(1, expert))
        left = left.scatter(1, expert, -torch.inf)
    return torch.cat(chosen, 1), torch.cat(shares, 1).float()
