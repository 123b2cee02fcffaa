"""The scenarios of the suite: models, lengths and placements, with the throughput that each is to reach."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

GIB = 1 << 30
PLACED_BY_HAND = ("percent", "gpu_batch_size", "num_gpu_batches", "cpu_attention", "prefill_chunk", "prefill_budget")
"""Settings of a scenario that the engine chooses where a chosen plan is measured."""


@dataclass(frozen=True)
class Scenario:
    """One run. ``gpu_gib``: all the GPU memory that the process may use; the rest is taken away by the allocator's
    fraction and a ballast."""

    model: str
    gpu_gib: float
    settings: dict[str, Any]
    num_prompts: int
    prompt_len: tuple[int, int] = (512, 512)
    gen_len: int = 32
    goal: float | None = None
    note: str = ""
    reserve_gib: float = field(default=1.2)
    """Left for the CUDA context, cuBLAS workspaces and fragmentation: the engine's budget is ``gpu_gib`` less this."""

    @property
    def with_chosen_plan(self) -> Scenario:
        """The same job, placed by the engine."""
        settings = {name: value for name, value in self.settings.items() if name not in PLACED_BY_HAND}
        return replace(self, settings=settings, note="chosen plan")

    def engine_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """``settings`` of `LLM` with what the scenario says of the GPU's memory."""
        return {"gpu_memory": f"{self.gpu_gib - self.reserve_gib}GiB", "dtype": "bfloat16", **settings}


def opt30(percent: tuple[float, ...], gpu_batch_size: int, num_gpu_batches: int, **settings: Any) -> dict[str, Any]:
    block = {"percent": percent, "gpu_batch_size": gpu_batch_size, "num_gpu_batches": num_gpu_batches}
    return {**block, "prefill_chunk": 512, "prefill_budget": 3072, "cpu_memory": "122GiB", **settings}


def resident(gpu_batch_size: int) -> dict[str, Any]:
    return {
        "percent": (100, 0, 100, 0, 100, 0),
        "gpu_batch_size": gpu_batch_size,
        "num_gpu_batches": 1,
        "prefill_chunk": 512,
    }


def speculation(batch: int, gen_len: int) -> Scenario:
    """Speculation with simulated acceptance against plain decoding in the same run: random weights accept nothing. The
    draft works in earnest.

    Short prompts, so that the cache of 256 sequences crosses the link in 16 bits; one placement for all batch sizes,
    so that they share the loaded weights.
    """
    settings = opt30((14, 86, 0, 100, 100, 0), 64, 4, cpu_attention=0.0, prefill_budget=2048)
    settings |= {"draft": ("opt-125m",), "simulate_acceptance": 0.8, "compare_plain": True}
    note = "SIMULATED acceptance of 0.8: the text is meaningless, only the time is measured"
    return Scenario("opt-30b", 16, settings, batch, (64, 64), gen_len, note=note)


SCENARIOS: dict[str, Scenario] = {
    "opt-30b-16-16": Scenario("opt-30b", 16, opt30((8, 92, 6, 94, 100, 0), 23, 4, cpu_attention=1.0), 276, goal=60),
    "opt-30b-16-4": Scenario("opt-30b", 16, opt30((8, 92, 5, 95, 100, 0), 60, 5, cache_bits=4), 900, goal=110),
    "opt-30b-4-4": Scenario(
        "opt-30b", 16, opt30((68, 32, 0, 100, 100, 0), 64, 7, cache_bits=4, weight_bits=4), 1344, goal=190
    ),
    "opt-30b-stream": Scenario(
        "opt-30b", 40, opt30((0, 100, 100, 0, 100, 0), 12, 1, prefill_budget=6144), 36, note="weight streaming alone"
    ),
    "opt-6.7b-gpu-4": Scenario("opt-6.7b", 16, resident(4), 12, goal=400),
    "opt-6.7b-gpu-best": Scenario("opt-6.7b", 16, resident(6), 24),
    "llama-3-8b-ragged": Scenario("llama-3-8b", 80, resident(512), 1000, (20, 400), 128),
    "opt-30b-speculation-8": speculation(8, 64),
    "opt-30b-speculation-64": speculation(64, 64),
    "opt-30b-speculation-256": speculation(256, 32),
    "llama-3-70b-4-16": Scenario(
        "llama-3-70b",
        24,
        {
            "percent": (32, 68, 0, 100, 100, 0),
            "gpu_batch_size": 64,
            "num_gpu_batches": 6,
            "prefill_chunk": 512,
            "prefill_budget": 2048,
            "weight_bits": 4,
            "cpu_memory": "118GiB",
        },
        768,
        goal=120,
    ),
    "llama-3-70b-4-4": Scenario(
        "llama-3-70b",
        25.2,
        {"weight_bits": 4, "cache_bits": 4, "cpu_memory": "110GiB"},
        701,
        gen_len=128,
        goal=803,
        note="chosen plan",
    ),
}
