"""What a GPU multiplies at full power: the matrices of a model's layers, one after the other, for a second each, and
the head by chunks of rows, by parts of the vocabulary and whole. A card at its power limit lowers its clock; the rates
are those that a job of hours has, not those of a few products.

    python -m benchmark.layer_products --output products.json          # 20 seconds
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmark.card_state import CardState
from benchmark.machine import publish
from flexbatch.models import layers, shapes
from flexbatch.policy.limits import LOGITS_CHUNK_BYTES
from flexbatch.policy.stdout import run_process

LAYERS = 8
"""With matrices of their own: no cache holds them."""


def timed(work: Callable[[], Any], flops: float, seconds: float) -> dict[str, Any]:
    """``work`` again and again as a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    count = 0
    with CardState() as card:
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            for _ in range(3):
                graph.replay()
            torch.cuda.synchronize()
            count += 3
        took = (time.perf_counter() - begun) / count
    return {"ms": round(took * 1e3, 3), "tflops": round(flops / took / 1e12, 1), "card": card.report()}


def normal(rows: int, columns: int, dtype: torch.dtype, deviation: float) -> torch.Tensor:
    return (torch.randn(rows, columns, device="cuda") * deviation).to(dtype)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    arch, found = shapes.shape(args.model), []
    hidden, inner = arch.hidden_size, arch.intermediate_size
    products = {"qkv": (sum(arch.qkv_sections), hidden), "o": (hidden, arch.num_heads * arch.head_dim)}
    products |= {"gate and up": (2 * inner, hidden), "down": (hidden, inner)}
    for dtype in (torch.bfloat16, torch.float16):
        weights = {name: [normal(*shape, dtype, 0.02) for _ in range(LAYERS)] for name, shape in products.items()}
        for tokens in args.tokens:
            given = {name: normal(tokens, shape[1], dtype, 1.0) for name, shape in products.items()}

            def multiply(names: tuple[str, ...], given: Any = given, weights: Any = weights) -> None:
                for layer in range(LAYERS):
                    for name in names:
                        F.linear(given[name], weights[name][layer])

            for names in (tuple(products), *((name,) for name in products)):
                flops = LAYERS * sum(2.0 * tokens * rows * columns for rows, columns in map(products.get, names))
                row = {"products": ", ".join(names), "dtype": str(dtype), "tokens": tokens}
                found.append(row | timed(lambda names=names: multiply(names), flops, 1.0 if len(names) > 1 else 0.4))
        del weights, given
        found += heads(arch, dtype)
    return {"model": args.model, "layers": LAYERS, "results": found}


def heads(arch: Any, dtype: torch.dtype, rows: int = 1000) -> list[dict[str, Any]]:
    """Of as many sequences that decode: the largest logit of each."""
    weights = {"head.weight": normal(arch.vocab_size, arch.hidden_size, dtype, 0.02)}
    hidden, elements = normal(rows, arch.hidden_size, dtype, 1.0), LOGITS_CHUNK_BYTES // 4
    weights["final_norm.weight"] = torch.ones_like(hidden[0])
    flops, chunk = 2.0 * rows * arch.vocab_size * arch.hidden_size, elements // arch.vocab_size
    works = {
        "by rows": lambda: [layers.head(arch, weights, part).max(-1) for part in hidden.split(chunk)],
        "by parts of the vocabulary": lambda: layers.largest_logits(arch, weights, hidden, elements),
        "product alone": lambda: F.linear(hidden, weights["head.weight"]),
    }
    return [{"head": name, "dtype": str(dtype), "rows": rows} | timed(work, flops, 0.4) for name, work in works.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help="a public shape with gated MLPs")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 1024, 9000])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    return publish(lambda: measure(args), args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
