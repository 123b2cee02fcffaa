"""Greedy tokens in bf16 against transformers' on the same device: how often they differ, and whether rounding explains
every difference.

    python -m benchmark.agreement --output benchmark/results/agreement-h200.json

Two programs that sum bf16 products in another order round differently, so where the two best logits nearly tie they
may choose differently. At the first token in which a request differs, the gap between the two tokens' logits, as
transformers computes them, has to lie below the tolerance: ``ROUNDINGS`` units in the last place of a bf16 number of
the top logit's size. What follows a first difference is another text and is not compared.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel, PreTrainedTokenizerFast

from benchmark.machine import machine
from flexbatch import LLM, SamplingParams
from flexbatch.models import resolve
from flexbatch.policy.stdout import data_apart, run_process

ROUNDINGS = 8
"""The head's dot product, and the hidden state that comes out of twenty-odd layers of bf16 sums, are each off by a
few units."""
NEW_TOKENS = 64
MODELS = ("demo", "llama-1b-random", "opt-1.3b-random")
PLACEMENTS = {"gpu": (100, 0, 100, 0, 100, 0), "mixed": (30, 70, 40, 60, 50, 50)}


def models_of(folder: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    """(name, folder) of random bf16 models with the layer shapes of Llama-3.2-1B and OPT-1.3B, and of the demo
    model, which has learned something."""
    demo = resolve.resolve("demo")
    if "demo" in names:
        yield "demo", str(demo)
    llama = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=4096,
    )
    opt = OPTConfig(
        hidden_size=2048,
        ffn_dim=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        word_embed_proj_dim=2048,
        vocab_size=4096,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo)
    for name, config in ((MODELS[1], llama), (MODELS[2], opt)):
        if name not in names:
            continue
        torch.manual_seed(len(name))
        config.bos_token_id = config.pad_token_id = config.eos_token_id = 0
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        yield name, str(folder / name)


@torch.inference_mode()
def continuation(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """NEW_TOKENS greedy tokens and their logits [NEW_TOKENS, vocab], the prompt alone in its batch."""
    ids = torch.tensor([prompt], device=model.device)
    settings: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True, **settings
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).float()


def compare(mine: list[int], theirs: list[int], logits: torch.Tensor) -> dict[str, float] | None:
    """The first difference: its position, the gap of the two tokens' logits and the tolerance; None where none is."""
    position = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
    if position is None:
        return None
    row = logits[position]
    top = float(row.max())
    unit = 2.0 ** (math.floor(math.log2(max(abs(top), 2.0**-14))) - 7)
    return {
        "position": position,
        "gap": float(row[theirs[position]] - row[mine[position]]),
        "tolerance": ROUNDINGS * unit,
        "top_logit": top,
    }


def measure(name: str, folder: str, prompts: list[list[int]], device: str) -> list[dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    wanted = [continuation(model, prompt) for prompt in prompts]
    del model
    rows = []
    for placement, percent in PLACEMENTS.items():
        settings: dict[str, Any] = {
            "gpu_batch_size": 16,
            "num_gpu_batches": 2,
            "gpu_memory": "8GiB",
            "cpu_memory": "8GiB",
            "dtype": "bfloat16",
        }
        with LLM(folder, percent=percent, cpu_attention=0.0, device=device, **settings) as llm:
            completions = llm.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True))
        differences = [
            found
            for done, (theirs, logits) in zip(completions, wanted, strict=True)
            if (found := compare(list(done.token_ids), theirs, logits)) is not None
        ]
        compared = sum(int(found["position"]) + 1 for found in differences) + NEW_TOKENS * (
            len(prompts) - len(differences)
        )
        outside = [found for found in differences if found["gap"] > found["tolerance"]]
        row = {
            "model": name,
            "placement": placement,
            "requests": len(prompts),
            "requests_that_differ": len(differences),
            "tokens_compared": compared,
            "differences_per_token": len(differences) / compared,
            "largest_gap": max((found["gap"] for found in differences), default=0.0),
            "largest_gap_over_tolerance": max(
                (found["gap"] / found["tolerance"] for found in differences), default=0.0
            ),
            "outside_tolerance": outside,
        }
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--requests", type=int, default=48, help="prompts a model, of 5 to 400 tokens")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, help="what to compare")
    arguments = parser.parse_args()
    with data_apart() as data:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        draw = random.Random(0)
        prompts = [[draw.randrange(3, 4096) for _ in range(draw.randint(5, 400))] for _ in range(arguments.requests)]
        result: dict[str, Any] = {"machine": machine(), "roundings": ROUNDINGS, "rows": []}
        with tempfile.TemporaryDirectory() as scratch:
            for name, folder in models_of(Path(scratch), arguments.models):
                result["rows"] += measure(name, folder, prompts, device)
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        outside = sum(len(row["outside_tolerance"]) for row in result["rows"])
        print(
            f"{sum(row['requests_that_differ'] for row in result['rows'])} requests differ, {outside} by more than "
            "the tolerance",
            file=data,
        )
        return 1 if outside else 0


if __name__ == "__main__":
    raise SystemExit(run_process(main))
