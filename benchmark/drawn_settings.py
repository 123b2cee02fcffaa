"""Settings drawn by a seed, so that nobody chooses the jobs that predictions are compared with.

    python -m benchmark.policy_runs runs.jsonl --hardware auto --seed 1 --count 20

A setting is a model of one of five families, bits of its weights and its cache, budgets below what it needs, and a job
of a prime number of prompts of ragged lengths: no block that anybody would choose divides it. Budgets and lengths are
drawn first, then as many prompts as can be expected to run in `JOB_SECONDS`: by round numbers of a large GPU, and by
nothing that a plan or a run has said.
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
JOB_SECONDS = (8.0, 13.0)
"""Long enough that half a second of kernels, graphs and results is not half of the error, as it was of jobs of 1 to
6 s, and short enough that twenty of them run on a borrowed machine."""
LINK_BYTES, MEMORY_BYTES, OPERATIONS = 40e9, 2e12, 350e12
"""A second."""
LEAST_SECONDS = 0.006
"""Of a pass, beside reading its weights and multiplying: launches, attention, the head."""
WORKSPACE_GIB, SPARE_GIB = 1.5, 1.0
"""Of the gpu tier beside weights and cache; what passes leave of it for more weights, or more sequences."""
LIMIT_SECONDS = 75.0


def primes(below: int) -> list[int]:
    sieve = [True] * below
    for number in range(2, math.isqrt(below) + 1):
        if sieve[number]:
            sieve[number * number :: number] = [False] * len(range(number * number, below, number))
    return [number for number in range(2, below) if sieve[number]]


PRIMES = primes(10000)


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
    away = (1 - resident) * weights - SPARE_GIB
    held = block + max(0.0, -away) / sequence
    seconds, link = generator.uniform(*JOB_SECONDS), max(0.0, away) * GIB / LINK_BYTES
    answer = min(answer, max(4, int(seconds / max(link, LEAST_SECONDS)) - 2))  # a wave takes as many passes
    gen_len = min(gen_len[0], answer), answer
    wanted = expected_prompts(seconds, shape, weights, link, held, prompt_len, gen_len)
    return Setting(
        model,
        (round(gpu, 2), round(min(cpu, 100.0), 2)),
        min(PRIMES, key=lambda prime: abs(prime - wanted)),
        prompt_len,
        gen_len,
        bits(weight_bits, cache_bits),
        limit_seconds=LIMIT_SECONDS,
    )


def expected_prompts(
    seconds: float, shape: ModelShape, weights: float, link: float, block: float, *lengths: tuple[int, int]
) -> float:
    """Prompts that run in so many seconds, about: ``weights`` GiB, of which a part takes ``link`` seconds a pass, and
    so many sequences in flight. lengths: of prompts and answers."""
    tokens, passes = sum(map(sum, lengths)) / 2, sum(lengths[1]) / 2 + 2
    computed = block / passes * 2 * tokens * shape.total_elements / OPERATIONS
    pass_seconds = max(link, LEAST_SECONDS + weights * GIB / MEMORY_BYTES + computed)
    return min(max(29.0, block * seconds / (passes * pass_seconds)), PRIMES[-1])


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
