"""What a plan tells of layers that keep only their window."""

from __future__ import annotations

import math
from typing import Any

from flexbatch.policy.footprint import window_tokens
from flexbatch.policy.limits import PAGE_TOKENS
from flexbatch.policy.plan import Plan
from flexbatch.policy.units import size_text


def windows_of(plan: Plan) -> dict[str, Any]:
    """The cache of the longest sequence, between two passes, beside one whose layers all keep everything."""
    shape = plan.shape
    row, tokens = shape.token_bytes(plan.policy.cache_bits), int(plan.workload.longest_slots[0])
    kept = math.ceil(row * shape.kept_layers(tokens, window_tokens(shape)))
    return {
        "layers": shape.window_layers,
        "tokens": shape.window,
        "sequence_tokens": tokens,
        "sequence_bytes": kept,
        "sequence_bytes_without": row * shape.num_layers * tokens,
        "cache_bytes_per_token": kept / tokens,
    }


def windows_text(plan: Plan) -> str:
    found = windows_of(plan)
    head = f"{found['layers']} of {plan.shape.num_layers} layers see {found['tokens']:,} tokens"
    sequence = f"a sequence of {found['sequence_tokens']:,}"
    if found["sequence_bytes"] == found["sequence_bytes_without"]:
        return f"{head}, as many as {sequence} has, or a page less: all is kept"
    return (
        f"{head} and keep no more, in pages of {PAGE_TOKENS}: {sequence} takes {size_text(found['sequence_bytes'])} of "
        f"cache instead of {size_text(found['sequence_bytes_without'])}"
    )
