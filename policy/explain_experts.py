"""What a plan tells of a model's experts."""

from __future__ import annotations

from typing import Any

from flexbatch.policy.expert_shape import ExpertShape
from flexbatch.policy.limits import cpu_expert_tokens, hit_expert_tokens
from flexbatch.policy.plan import Plan


def experts_of(plan: Plan, experts: ExpertShape) -> dict[str, Any]:
    """What a token goes through of the weights, and how many experts the tokens of a decoding micro-batch reach."""
    shape, policy = plan.shape, plan.policy
    layers = shape.num_layers - shape.dense_layers
    tokens = max(1, round(min(plan.most_in_flight, policy.block_size) / policy.num_gpu_batches))
    return {
        "layers": layers,
        "count": experts.count,
        "chosen": experts.top_k,
        "share_of_weights": experts.count * experts.elements(shape.hidden_size) * layers / shape.total_elements,
        "weights": shape.total_elements,
        "active_weights": shape.active_elements + shape.head_elements,
        "tokens_of_micro_batch": tokens,
        "reached": float(experts.hit(tokens)),
        "on_cpu": policy.weights.cpu * policy.cpu_experts * experts.count,
        "on_cpu_up_to_tokens": cpu_expert_tokens(experts.count, experts.top_k, policy.gpu_batch_size),
        "hit_alone_up_to_tokens": hit_expert_tokens(experts.count, experts.top_k),
    }


def experts_text(plan: Plan, experts: ExpertShape) -> str:
    found, away = experts_of(plan, experts), 1 - plan.policy.weights.gpu
    few = found["hit_alone_up_to_tokens"]
    tail = f"; in passes of {few} tokens and less only those that they hit" if few and plan.policy.weights.cpu else ""
    link = f"every pass brings {away:.0%} of the weights over the link, whichever experts it needs{tail}"
    if found["on_cpu"]:
        link += (
            f", but for about {found['on_cpu']:.0f} experts of each layer, the least used, which the CPU computes in "
            f"host memory while micro-batches have at most {found['on_cpu_up_to_tokens']:,} tokens"
        )
    return (
        f"{experts.top_k} of {experts.count} for each token, which goes through {found['active_weights'] / 1e9:,.2f} "
        f"of {found['weights'] / 1e9:,.2f} billion weights; {found['tokens_of_micro_batch']:,} decoding tokens reach "
        f"{found['reached']:.0f} of a layer's, if routed evenly; {link if away > 1e-9 else 'all are in GPU memory'}"
    )
