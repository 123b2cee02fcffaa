"""What the layers of models take whose heads, or whose width, are not those that a profile measures with: attention by
the engine's own launches over 16, 8 and 4 bits, storing new rows, and products of several numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmark.kernel_cases import Row, attention_call
from benchmark.kernel_trials import BEYOND_CACHE_BYTES, Trial, products
from flexbatch.kernels import attention, ops, reference
from flexbatch.models import shapes
from flexbatch.models.arch import Arch
from flexbatch.policy.limits import cache_group

MODELS = ("opt-2.7b", "opt-1.3b", "llama-3.2-1b", "mistral-7b")
"""Heads of 80 and of 64, own and shared, and of 128; 2,048 to 4,096 wide."""
SINGLE = ((64, 128), (64, 512), (16, 512))
"""Sequences, and keys of each."""
PROMPTS = ((6, 100), (8, 232), (4, 464))
"""Prompts that are read whole, and tokens of each."""
NEW_ROWS = (64, 640, 1920)
TOKENS = (16, 64, 128, 384, 640, 1024, 1920)


def nothing(took: float) -> Row:
    return {}


def not_finite(got: Tensor) -> float:
    """Tests compare these kernels with the oracle."""
    return float((~got.isfinite()).sum())


def head_trials() -> Iterator[Trial]:
    for name in MODELS:
        arch = shapes.shape(name)
        for bits in (16, 8, 4):
            for kind, cases in (("single tokens", SINGLE), ("prompts", PROMPTS)):
                for count, keys in cases:
                    yield attention_trial(name, arch, bits, kind, count, keys)
            for tokens in NEW_ROWS:
                yield append_trial(name, arch, bits, tokens)


def attention_trial(name: str, arch: Arch, bits: int, kind: str, count: int, keys: int) -> Trial:
    queries, group = 1 if kind == "single tokens" else keys, cache_group(arch.head_dim)
    sizes = arch.num_heads, arch.num_kv_heads, arch.head_dim
    call, options = attention_call([queries] * count, [keys] * count, *sizes, bits=bits, group=group)
    row = {"kernel": "attention", "model": name, "bits": bits, "kind": kind, "case": f"{count} x {keys}"}
    return Trial(row, partial(attention.paged_attention, *call, **options), not_finite, nothing)


def append_trial(name: str, arch: Arch, bits: int, tokens: int) -> Trial:
    group = cache_group(arch.head_dim)
    key, value = (
        torch.randn(tokens, arch.num_kv_heads, arch.head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    slots = torch.randperm(tokens, device="cuda")
    if bits == 16:
        rows = torch.empty(tokens, 2, *key.shape[1:], dtype=key.dtype, device="cuda")
    else:
        size = reference.token_bytes(arch.num_kv_heads, arch.head_dim, bits, group, key.element_size())
        rows = torch.empty(tokens, size, dtype=torch.uint8, device="cuda")

    def work() -> Tensor:
        ops.append_rows(rows, slots, key, value, bits, group)
        return rows

    row = {"kernel": "append", "model": name, "bits": bits, "case": f"{tokens} tokens"}
    return Trial(row, work, lambda got: 0.0, nothing)


def product_trials() -> Iterator[Trial]:
    """Matrices that no cache holds, one after the other as a graph."""
    for name in MODELS:
        arch = shapes.shape(name)
        hidden, inner = arch.hidden_size, arch.intermediate_size
        gated = 2 if arch.mlp == "gated" else 1
        matrices = {"qkv": (sum(arch.qkv_sections), hidden), "o": (hidden, arch.num_heads * arch.head_dim)}
        matrices |= {"up": (gated * inner, hidden), "down": (hidden, inner)}
        for role, shape in matrices.items():
            count = -(-BEYOND_CACHE_BYTES // (2 * shape[0] * shape[1]))
            weights = [torch.randn(*shape, device="cuda").to(torch.bfloat16) for _ in range(count)]
            for tokens in TOKENS:
                x = torch.randn(tokens, shape[1], device="cuda").to(torch.bfloat16)
                works: list[Callable[[], Any]] = [partial(linear, x, each) for each in weights]
                row = {"kernel": "product", "model": name, "case": role, "tokens": tokens}
                yield products(row, x.float() @ weights[0].float().t(), weights[0].nbytes, works, count)
