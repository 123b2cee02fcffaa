"""What LoRA adapters cost: the same job with sequences of several adapters and with none, by turns, in one engine.

    python -m benchmark.adapters --model llama-3-8b --gpu-memory 12GiB --adapters 8 --rank 16 --output adapters.json

Random weights of a public shape of Llama, Mistral or Qwen 2, and random adapters on all linear modules, which lie in
the engine all the while: the plan, and what crosses the link, are those of a job with adapters in every turn. What the
factors themselves cost the link is told apart by ``--without``, which opens a second engine that has none.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmark.loading_files import projections
from benchmark.machine import publish
from flexbatch import LLM, SamplingParams
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.stdout import run_process


def write_adapter(folder: Path, config: dict[str, Any], rank: int, seed: int) -> None:
    """As PEFT saves one that updates all linear modules."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in projections(config).items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * columns**-0.5
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.01
    folder.mkdir(parents=True)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    modules = sorted({name.rpartition(".")[2] for name in projections(config)})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    config, chance = dict(SHAPES[args.model]), random.Random(0)
    prompts = [
        {"prompt_token_ids": [chance.randrange(3, config["vocab_size"]) for _ in range(args.prompt_tokens)]}
        for _ in range(args.prompts)
    ]
    params = SamplingParams(max_tokens=args.new_tokens, temperature=0.0, ignore_eos=True)
    settings: dict[str, Any] = {"dummy_weights": True, "weight_bits": args.weight_bits, "hardware": args.hardware}
    settings |= {} if args.gpu_memory is None else {"gpu_memory": args.gpu_memory}
    with tempfile.TemporaryDirectory() as root:
        folders = {f"a{number}": str(Path(root) / f"a{number}") for number in range(args.adapters)}
        for number, folder in enumerate(folders.values()):
            write_adapter(Path(folder), config, args.rank, number)
        # One of every few sequences has no adapter, as where users share a server.
        names = [*folders, None]
        chosen = [names[index % len(names)] for index in range(args.prompts)]

        def seconds(llm: LLM, lora: list[str | None] | None) -> float:
            begun = time.perf_counter()
            llm.generate(prompts, params, lora_request=lora)
            return time.perf_counter() - begun

        with LLM(args.model, lora=folders, **settings) as llm:
            llm.prepare(prompts, params)
            seconds(llm, chosen)
            turns = [(seconds(llm, chosen), seconds(llm, None)) for _ in range(args.turns)]
            block, percent = llm.policy.block_size, list(llm.policy.percent)
        bare = []
        if args.without:
            with LLM(args.model, **settings) as llm:
                llm.prepare(prompts, params)
                seconds(llm, None)
                bare = [seconds(llm, None) for _ in range(args.turns)]
    return {
        "model": args.model,
        "weight_bits": args.weight_bits,
        "gpu_memory": args.gpu_memory,
        "adapters": args.adapters,
        "rank": args.rank,
        "prompts": args.prompts,
        "block": block,
        "percent": percent,
        "seconds_with": [round(each, 3) for each, _ in turns],
        "seconds_of_none": [round(each, 3) for _, each in turns],
        "seconds_without_adapters_in_the_engine": [round(each, 3) for each in bare],
        "added_percent": round(100 * (statistics.median(with_them / none for with_them, none in turns) - 1), 2),
        "added_percent_over_a_bare_engine": (
            round(100 * (statistics.median(each for each, _ in turns) / statistics.median(bare) - 1), 2)
            if bare
            else None
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", choices=sorted(SHAPES))
    parser.add_argument("--weight-bits", type=int, default=16, choices=(16, 8, 4))
    parser.add_argument("--gpu-memory", help="the cap of the engine (default: what the GPU has)")
    parser.add_argument("--hardware", default="auto", help="the profile that plans are made by")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=127)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--without", action="store_true", help="also an engine that has no adapters")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    return publish(lambda: measure(args), args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
