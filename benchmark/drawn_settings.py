"""Settings drawn by a seed, so that nobody chooses the jobs that predictions are compared with.

    python -m benchmark.policy_runs runs.jsonl --hardware auto --seed 1 --count 20

A setting is a model of one of five families, bits of its weights and its cache, budgets below what it needs, and a job
of a prime number of prompts of ragged lengths: no block that anybody would choose divides it. Budgets and lengths are
drawn first, then as many prompts as can be expected to run in `JOB_SECONDS`, by weights that cross a link of
`LINK_BYTES` a second once in a pass.
"""

from __future__ import annotations

import math
import random

from benchmark.policy_settings import Setting, bits
from flexbatch.models.shapes import shape as public_arch
from flexbatch.planner.problem import model_shape
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.units import GIB

MODELS = (
    "opt-1.3b",
    "opt-2.7b",
    "opt-6.7b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "llama-3-8b",
    "mistral-7b",
    "falcon-7b",
    "starcoder",
)
"""OPT, Llama, Mistral, Falcon and GPT-BigCode: multi-head, grouped and multi-query attention; windows; tied heads."""
BITS = ((16, 16), (16, 16), (16, 8), (16, 4), (8, 16), (8, 8), (4, 16), (4, 4))
JOB_SECONDS = (4.0, 12.0)
LINK_BYTES = 40e9
LEAST_SECONDS = 0.02
"""Of a pass: models on the GPU are bound by launches and attention."""
WORKSPACE_GIB = 1.5
LIMIT_SECONDS = 75.0


def primes(below: int) -> list[int]:
    sieve = [True] * below
    for number in range(2, math.isqrt(below) + 1):
        if sieve[number]:
            sieve[number * number :: number] = [False] * len(range(number * number, below, number))
    return [number for number in range(2, below) if sieve[number]]


PRIMES = primes(4000)


def drawn(generator: random.Random) -> Setting:
    """One setting. Half of the weights' share on the GPU and half of the cache's size are drawn evenly; the CPU tier
    holds what is left of the weights, and enough cache for a block worth its weights."""
    model = generator.choice(MODELS)
    weight_bits, cache_bits = generator.choice(BITS)
    shape = model_shape(model, public_arch(model), 2, weight_bits)
    weights = shape.total_bytes(weight_bits) / GIB
    resident = generator.choice((generator.uniform(0.1, 0.9), 1.0, generator.uniform(0.1, 0.9)))
    longest = int(math.exp(generator.uniform(math.log(48), math.log(1024))))
    prompt_len = (max(8, int(longest * generator.uniform(0.05, 0.6))), longest)
    answer = int(math.exp(generator.uniform(math.log(8), math.log(96))))
    gen_len = (max(2, int(answer * generator.uniform(0.3, 1.0))), answer)
    sequence = sequence_gib(shape, cache_bits, (sum(prompt_len) + sum(gen_len)) / 2)
    block = int(math.exp(generator.uniform(math.log(24), math.log(400))))
    on_gpu = generator.uniform(0.0, 1.0) if resident < 1 else 1.0
    gpu = WORKSPACE_GIB + weights * resident + on_gpu * block * sequence + dequantization_gib(shape, weight_bits)
    cpu = 1.0 + weights * max(0.05, 1.1 - resident) + (1 - on_gpu) * block * sequence
    pass_seconds = max(LEAST_SECONDS, (1 - resident) * weights * GIB / LINK_BYTES)
    waves = generator.uniform(*JOB_SECONDS) / (pass_seconds * (sum(gen_len) / 2 + 2))
    wanted = max(29.0, min(block * waves, 3000.0))
    return Setting(
        model,
        (round(gpu, 2), round(min(cpu, 100.0), 2)),
        min(PRIMES, key=lambda prime: abs(prime - wanted)),
        prompt_len,
        gen_len,
        bits(weight_bits, cache_bits),
        limit_seconds=LIMIT_SECONDS,
    )


def sequence_gib(shape: ModelShape, cache_bits: int, tokens: float) -> float:
    return shape.num_layers * shape.token_bytes(cache_bits) * tokens / GIB


def dequantization_gib(shape: ModelShape, weight_bits: int) -> float:
    return 0.0 if weight_bits == 16 else shape.block_bytes(16) / GIB


def draw(seed: int, count: int) -> dict[str, Setting]:
    """``count`` settings by name; the same ones for the same seed, and those of a smaller count among them."""
    settings = {}
    for number in range(count):
        setting = drawn(random.Random(f"{seed} {number}"))
        (least, longest), (shortest, answer) = setting.prompt_len, setting.gen_len
        label = f"{setting.model} {setting.fixed['weight_bits']}/{setting.fixed['cache_bits']} bit"
        memory = f"{setting.memory[0]:g} + {setting.memory[1]:g} GiB"
        lengths = f"{setting.num_prompts} x {least}-{longest}/{shortest}-{answer}"
        settings[f"{seed}.{number} {label}, {memory}, {lengths}"] = setting
    return settings
