"""The settings of `benchmark.policy_error`: model, memory budgets, bits and lengths of a job on the H200 machine (16
cores, 125 GiB host memory).

Budgets are capped so that every job offloads in its own way, and sized so that all of them together run in about
eight minutes. What a setting does not fix, the optimizer chooses. Weights are random, prompts random and all
different, the end of a sequence is ignored.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from benchmark.shares import with_layers


@dataclass(frozen=True)
class Setting:
    """One job. ``memory``: GiB of the gpu and of the cpu tier. Lengths: least and greatest, drawn evenly between."""

    model: str
    memory: tuple[float, float]
    num_prompts: int
    prompt_len: tuple[int, int]
    gen_len: tuple[int, int]
    fixed: dict[str, Any] = field(default_factory=dict)
    """Settings of `LLM` that are not left to the optimizer."""
    limit_seconds: float = 60.0
    """Loading, warming up and running; what takes longer is recorded as an error."""
    layers: int = 0
    """Of a model that is cut, which loads in seconds; 0: all of them."""

    @property
    def shape(self) -> str:
        """The name that the engine knows the model by."""
        if not self.layers:
            return self.model
        return with_layers(self.model, self.layers, f"{self.model}-{self.layers}-layers")

    @property
    def llm_settings(self) -> dict[str, Any]:
        gpu, cpu = self.memory
        return {
            "gpu_memory": f"{gpu}GiB",
            "cpu_memory": f"{cpu}GiB",
            "dummy_weights": True,
            "dtype": "bfloat16",
            **self.fixed,
        }

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, generated tokens) of every request, the same ones every time."""
        generator = random.Random(f"{self.model} {self.num_prompts}")
        return [
            (generator.randint(*self.prompt_len), generator.randint(*self.gen_len)) for _ in range(self.num_prompts)
        ]

    def prompts(self, vocab_size: int, seed: object) -> list[list[int]]:
        """Of these lengths; other tokens for another ``seed``, so that no run finds its prompts in the cache of the
        run before."""
        generator = random.Random(f"tokens {self.model} {seed}")
        return [generator.choices(range(10, vocab_size), k=length) for length, _ in self.lengths()]


SETTINGS: dict[str, Setting] = {}
"""Filled below: the fast ones first, so that a cut run has measured the most settings."""


def bits(weights: int, cache: int) -> dict[str, Any]:
    return {"weight_bits": weights, "cache_bits": cache}


SETTINGS |= {
    "opt-1.3b on the GPU": Setting("opt-1.3b", (24, 8), 768, (128, 128), (64, 64), limit_seconds=40),
    "opt-1.3b": Setting("opt-1.3b", (3, 16), 240, (512, 512), (32, 32)),
    "opt-1.3b no overlap": Setting(
        "opt-1.3b", (4, 8), 96, (256, 256), (32, 32), {"overlap": False, "percent": (50, 50, 0, 100, 100, 0)}
    ),
    "opt-1.3b cache on disk": Setting(
        "opt-1.3b", (5, 6), 64, (256, 256), (16, 16), {"percent": (100, 0, 0, 50, 100, 0)}
    ),
    "opt-6.7b": Setting("opt-6.7b", (8, 24), 180, (512, 512), (16, 16)),
    "opt-6.7b short": Setting("opt-6.7b", (8, 16), 256, (32, 32), (48, 48)),
    "opt-6.7b 16/4 bit": Setting("opt-6.7b", (8, 20), 360, (512, 512), (16, 16), bits(16, 4)),
    "opt-6.7b 4/4 bit": Setting("opt-6.7b", (5, 16), 480, (256, 256), (32, 32), bits(4, 4), limit_seconds=90),
    "opt-6.7b 8/8 bit, ragged": Setting("opt-6.7b", (6, 24), 160, (32, 1024), (16, 48), bits(8, 8)),
    "opt-6.7b weights on disk": Setting(
        "opt-6.7b", (13, 8), 96, (128, 128), (16, 16), {"percent": (30, 50, 100, 0, 100, 0)}, limit_seconds=75
    ),
    "llama-3-8b on the GPU, ragged": Setting("llama-3-8b", (48, 8), 512, (32, 1024), (16, 64)),
    "llama-3-8b, ragged": Setting("llama-3-8b", (12, 24), 320, (32, 1024), (16, 48), limit_seconds=75),
    "llama-3-8b 8/8 bit": Setting("llama-3-8b", (8, 16), 480, (256, 256), (32, 32), bits(8, 8)),
    "opt-13b long": Setting("opt-13b", (16, 32), 72, (1024, 1024), (16, 16), limit_seconds=75),
    "opt-13b 4/16 bit": Setting("opt-13b", (10, 24), 144, (256, 256), (32, 32), bits(4, 16), limit_seconds=75),
    "opt-30b 16/4 bit": Setting("opt-30b", (24, 72), 200, (512, 512), (16, 16), bits(16, 4), limit_seconds=120),
}
EXPERTS = {
    "olmoe-1b-7b": Setting("olmoe-1b-7b", (5, 24), 701, (64, 256), (16, 48)),
    "olmoe-1b-7b, a handful": Setting("olmoe-1b-7b", (5, 24), 7, (64, 96), (48, 64)),
    "olmoe-1b-7b 4/8 bit": Setting("olmoe-1b-7b", (3.5, 24), 907, (64, 256), (24, 24), bits(4, 8)),
    "olmoe-1b-7b on the GPU": Setting("olmoe-1b-7b", (48, 8), 509, (64, 256), (16, 64)),
    "gpt-oss-20b": Setting("gpt-oss-20b", (6, 28), 797, (128, 256), (24, 24), bits(4, 16)),
    "gpt-oss-20b, short": Setting("gpt-oss-20b", (6, 16), 1499, (24, 64), (32, 48), bits(4, 16)),
    "gpt-oss-20b on the GPU": Setting("gpt-oss-20b", (48, 8), 509, (64, 256), (16, 64), bits(4, 16)),
    "deepseek-v2-lite": Setting("deepseek-v2-lite", (16, 48), 601, (128, 256), (16, 24)),
    "qwen3-30b-a3b": Setting("qwen3-30b-a3b", (24, 80), 599, (128, 256), (16, 16), limit_seconds=90),
    "qwen3-30b-a3b 4/16 bit": Setting(
        "qwen3-30b-a3b", (10, 40), 601, (128, 256), (16, 16), bits(4, 16), limit_seconds=100
    ),
}
"""Mixtures of experts, whole models: streamed and on the GPU, in 16 bits, in 4 and in MXFP4."""
FEW_LAYERS = {
    "gpt-oss-120b, 6 layers": Setting("gpt-oss-120b", (6.5, 16), 1201, (64, 192), (24, 24), bits(4, 16), layers=6),
    "qwen3-30b-a3b, 8 layers": Setting("qwen3-30b-a3b", (5, 16), 701, (64, 192), (24, 24), layers=8),
    "qwen3-30b-a3b, 8 layers, a handful": Setting("qwen3-30b-a3b", (5, 16), 7, (64, 96), (32, 48), layers=8),
    "mixtral-8x7b, 5 layers": Setting("mixtral-8x7b", (9, 22), 601, (64, 192), (24, 24), layers=5),
    "mixtral-8x7b, 5 layers, a pair": Setting("mixtral-8x7b", (9, 22), 2, (64, 96), (32, 48), layers=5),
    "glm-4.5-air, 6 layers, 4 bit": Setting("glm-4.5-air", (6, 16), 601, (64, 192), (24, 24), bits(4, 16), layers=6),
    "qwen3-235b-a22b, 4 layers, 4/4 bit": Setting(
        "qwen3-235b-a22b", (5.5, 12), 601, (64, 192), (24, 24), bits(4, 4), layers=4
    ),
    "deepseek-v2-lite, 8 layers": Setting("deepseek-v2-lite", (5, 16), 701, (64, 192), (24, 24), layers=8),
    "gpt-oss-120b, 6 layers on the GPU": Setting(
        "gpt-oss-120b", (40, 8), 401, (64, 192), (24, 48), bits(4, 16), layers=6
    ),
    "qwen3-30b-a3b, 8 layers, 4/8 bit": Setting(
        "qwen3-30b-a3b", (3, 8), 701, (64, 192), (24, 24), bits(4, 8), layers=8
    ),
}
"""Mixtures of experts of which a few layers load in seconds, so that ten of them run in three minutes."""
USERS = {
    "falcon-7b 16/16 bit": Setting("falcon-7b", (8, 16), 300, (100, 300), (32, 32)),
    "llama-2-13b 16/8 bit": Setting("llama-2-13b", (10, 40), 64, (128, 128), (64, 64), bits(16, 8), limit_seconds=90),
    "mistral-7b 8/16 bit": Setting("mistral-7b", (8, 24), 200, (512, 2048), (32, 32), bits(8, 16), limit_seconds=90),
    "opt-30b 16/16 bit": Setting("opt-30b", (16, 122), 184, (512, 512), (32, 32), limit_seconds=240),
}
"""Jobs as users set them, which plans were once wrong about by 10 to 30 %: for the number of passes, for weights that
were placed before the job was known."""
NEIGHBORHOODS = {
    "opt-1.3b": Setting("opt-1.3b", (3.5, 16), 200, (512, 512), (16, 16), limit_seconds=200),
    "opt-6.7b 16/4 bit": Setting("opt-6.7b", (8, 10), 160, (256, 256), (16, 16), bits(16, 4), limit_seconds=200),
    "llama-3-8b, ragged": Setting("llama-3-8b", (12, 12), 144, (32, 512), (16, 24), limit_seconds=200),
}
"""Jobs in which the chosen policy is compared with its neighbors: short, because each runs eleven times."""
