"""Loss of the demo model on held-out text with weights and KV cache in 16, 8 and 4 bits, measured through the engine.

    python -m benchmark.compression --corpus LIB/python3.11 --output benchmark/results/compression.json

The corpus and what is held out of it are those of `train_demo` (`demo_files`): the Python standard library, about
one file in 33 by a hash of its path. Windows of the model's context are scored as prompts (``max_tokens=0``), so
that every token goes through the quantized cache as it would in a job. ``--held-out-tokens 32768`` takes that many,
in windows spread evenly over the text. Below the table come other ways to quantize, each in the same engine with one
of its choices replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tokenizers import Tokenizer

from benchmark.demo_files import CONTEXT, END, held_out, read_sources, write_json
from benchmark.machine import machine
from flexbatch import LLM, SamplingParams
from flexbatch.kernels import reference
from flexbatch.models import resolve
from flexbatch.models.fingerprint import WeightFiles
from flexbatch.policy.stdout import data_apart, run_process

BITS = (16, 8, 4)
GOAL_PERCENT = 2.0
"""Loss that 4-bit weights and cache together may add."""
WEIGHT_GROUP, CACHE_GROUP, FIT = (
    "flexbatch.engine.weight_group",
    "flexbatch.planner.budgets.cache_group",
    "flexbatch.kernels.ops.fit",
)
PLAIN: list[tuple[str, int, int, dict[str, Any]]] = [("", weights, cache, {}) for weights in BITS for cache in BITS]
VARIANTS: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("weights in groups of 64, from least to greatest", 4, 16, {WEIGHT_GROUP: lambda _: 64, FIT: reference.quantize}),
    ("weights in groups of 64, fitted", 4, 16, {WEIGHT_GROUP: lambda _: 64}),
    ("weights in groups of 32, fitted", 4, 16, {WEIGHT_GROUP: lambda _: 32}),
    ("weights in groups of 16, from least to greatest", 4, 16, {FIT: reference.quantize}),
    ("cache in groups of 32 (a whole head)", 16, 4, {CACHE_GROUP: lambda _: 32}),
    ("cache in groups of 8", 16, 4, {CACHE_GROUP: lambda _: 8}),
)
"""What it is, bits of weights and cache, and what it replaces."""
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)


@dataclass(frozen=True)
class Text:
    """Held-out text: windows of CONTEXT + 1 token ids, each beginning with the last token of the one before it."""

    windows: list[list[int]]
    files: int
    num_tokens: int
    num_bytes: int

    @property
    def tokens_per_byte(self) -> float:
        return self.num_tokens / self.num_bytes

    @property
    def scored_tokens(self) -> int:
        return sum(len(window) - 1 for window in self.windows)


@dataclass(frozen=True)
class Cell:
    """One line of the table. ``added_percent``: loss beyond that of 16 bits. ``variant``: what is done otherwise, ""
    for the scheme as it is."""

    variant: str
    weight_bits: int
    cache_bits: int
    nats_per_byte: float
    added_percent: float
    seconds: float


def held_out_text(corpus: Path, tokenizer: Tokenizer, held_out_tokens: int | None) -> Text:
    """The held-out files of a folder of Python sources, each followed by the end-of-text token."""
    texts = [text for name, text in read_sources(corpus).items() if held_out(name)]
    end = tokenizer.token_to_id(END)
    stream = [token for code in tokenizer.encode_batch(texts) for token in (*code.ids, end)]
    windows = [stream[start : start + CONTEXT + 1] for start in range(0, len(stream) - 1, CONTEXT)]
    if held_out_tokens is not None and held_out_tokens < len(stream):
        count = max(1, round(held_out_tokens / CONTEXT))
        windows = [windows[i * len(windows) // count] for i in range(count)]
    return Text(windows, len(texts), len(stream), sum(len(text.encode()) for text in texts))


def nats(llm: LLM, text: Text) -> float:
    """Negative log-probability of all scored tokens."""
    total = 0.0
    for completion in llm.generate(text.windows, SCORE):
        assert completion.prompt_logprobs is not None
        scored = zip(completion.prompt_token_ids, completion.prompt_logprobs, strict=True)
        total -= sum(entry[token].logprob for token, entry in scored if entry is not None)
    return total


def measure(text: Text, settings: dict[str, Any]) -> list[Cell]:
    """A cell for every pair of bits, (16, 16) first, and one for every variant."""
    cells: list[Cell] = []
    for variant, weight_bits, cache_bits, replaced in (*PLAIN, *VARIANTS):
        started = time.perf_counter()
        with contextlib.ExitStack() as stack:
            for name, replacement in replaced.items():
                stack.enter_context(mock.patch(name, replacement))
            llm = stack.enter_context(LLM("demo", weight_bits=weight_bits, cache_bits=cache_bits, **settings))
            per_byte = nats(llm, text) / text.scored_tokens * text.tokens_per_byte
        base = cells[0].nats_per_byte if cells else per_byte
        cells.append(
            Cell(variant, weight_bits, cache_bits, per_byte, 100 * (per_byte / base - 1), time.perf_counter() - started)
        )
        print(json.dumps(asdict(cells[-1])), file=sys.stderr, flush=True)
    return cells


def table(cells: list[Cell]) -> str:
    """Markdown: loss per byte and what is added, weights down, cache across; then the variants."""
    found = {(cell.weight_bits, cell.cache_bits): cell for cell in cells if not cell.variant}
    lines = [
        "| weights | " + " | ".join(f"cache {bits} bits" for bits in BITS) + " |",
        "| --- |" + " --- |" * len(BITS),
    ]
    for weight_bits in BITS:
        row = [found.get((weight_bits, cache_bits)) for cache_bits in BITS]
        shown = ["" if cell is None else f"{cell.nats_per_byte:.4f} ({cell.added_percent:+.2f} %)" for cell in row]
        lines.append(f"| {weight_bits} bits | " + " | ".join(shown) + " |")
    lines += ["", "| instead, at 4 bits | loss per byte | added |", "| --- | --- | --- |"]
    return "\n".join(
        lines
        + [
            f"| {cell.variant} | {cell.nats_per_byte:.4f} | {cell.added_percent:+.2f} % |"
            for cell in cells
            if cell.variant
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="folder of Python sources (default: this interpreter's)",
    )
    parser.add_argument("--held-out-tokens", type=int, help="tokens to score (default: all, 341 thousand)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with data_apart() as data:
        folder = resolve.resolve("demo")
        text = held_out_text(
            arguments.corpus, Tokenizer.from_file(str(folder / "tokenizer.json")), arguments.held_out_tokens
        )
        settings = {
            "device": arguments.device,
            "dtype": arguments.dtype,
            "percent": (100, 0, 100, 0, 100, 0),
            "gpu_batch_size": 4,
            "num_gpu_batches": 1,
        }
        cells = measure(text, settings)
        print(table(cells), file=data)
        if arguments.output:
            scored = {
                "files": text.files,
                "held_out_tokens": text.num_tokens,
                "held_out_bytes": text.num_bytes,
                "scored_tokens": text.scored_tokens,
            }
            facts = {
                "machine": machine(),
                "model": WeightFiles(folder).identity,
                "corpus": scored,
                "settings": settings,
            }
            write_json(arguments.output, {**facts, "cells": [asdict(cell) for cell in cells]})
        return 0 if cells[len(BITS) ** 2 - 1].added_percent < GOAL_PERCENT else 1


if __name__ == "__main__":
    sys.exit(run_process(main))
