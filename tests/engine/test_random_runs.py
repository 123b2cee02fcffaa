"""Random settings and random requests together: every engine gives the tokens of one that keeps everything in one
place. What no list of cases thinks of."""

from __future__ import annotations

import random
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.memory.weights import WeightStore
from tests.tiny_models import FAMILY_CASES, VOCAB, make_model

FAMILIES = [name for name in FAMILY_CASES if "-" not in name]
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
"""Their caches are never attended on the CPU, and attention takes a workspace of 48 MiB."""
PLAIN: dict[str, Any] = {"device": "cpu", "dtype": "float32", "hardware": "cpu"}
ROOMY: dict[str, Any] = {"gpu_memory": "1GiB", "cpu_memory": "1GiB"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "model"
            make_model(family, made[family])
        return made[family]

    return folder


def random_requests(rng: random.Random) -> tuple[list[list[int]], list[SamplingParams]]:
    shared = [rng.randrange(3, VOCAB) for _ in range(rng.choice([0, 16, 40]))]
    prompts, params = [], []
    for _ in range(rng.randint(1, 24)):
        own = [rng.randrange(3, VOCAB) for _ in range(rng.choice([1, 2, 15, 16, 17, rng.randint(1, 120)]))]
        prompts.append((shared if rng.random() < 0.4 else []) + own)
        new_tokens = rng.choice([0, 1, 2, 5, 17, 30])
        chosen: dict[str, Any] = {
            "max_tokens": new_tokens,
            "temperature": rng.choice([0.0, 0.0, 0.7, 1.2]),
            "seed": rng.randrange(50),
        }
        chosen |= (
            {"prompt_logprobs": 1}
            if new_tokens == 0
            else {"logprobs": rng.choice([None, 2]), "n": rng.choice([1, 1, 1, 3])}
        )
        for name, value in {
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.05,
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.5,
            "ignore_eos": True,
        }.items():
            if rng.random() < 0.2:
                chosen[name] = value
        if rng.random() < 0.3:
            chosen["stop_token_ids"] = [rng.randrange(VOCAB) for _ in range(20)]
        params.append(SamplingParams(**chosen))
    return prompts, params


def random_split(rng: random.Random) -> tuple[float, float]:
    gpu = rng.choice([0, 0, 10, 33.3, 50, 90, 100])
    return gpu, rng.choice([0, 100 - gpu, (100 - gpu) / 2])


def random_settings(rng: random.Random, folder: Path, latent: bool) -> dict[str, Any]:
    bits = {"weight_bits": rng.choice([16, 16, 8, 4]), "cache_bits": rng.choice([16, 16, 8, 4])}
    if rng.random() < 0.3:  # the policy is chosen, for little memory
        placements: dict[str, Any] = {
            "gpu_memory": f"{rng.choice([3, 4, 9, 200]) + 51 * latent}MiB",
            "cpu_memory": f"{rng.choice([1, 2, 4])}MiB",
        }
    else:
        placements = ROOMY | {
            "percent": random_split(rng) + random_split(rng) + random_split(rng),
            "cpu_attention": rng.choice([0, 0, 0.3, 1.0]) * (not latent),
        }
        placements |= {
            "gpu_batch_size": rng.randint(1, 6),
            "num_gpu_batches": rng.randint(1, 4),
            "prefill_chunk": rng.choice([1, 16, 33, 512]),
        }
        placements |= {"prefill_budget": rng.choice([None, 7, 40]), "overlap": rng.random() < 0.8}
    if placements["gpu_memory"] in ("1GiB", "200MiB", "251MiB") and rng.random() < 0.5:
        draft = rng.choice([("ngram",), (str(folder),), (str(folder), "ngram")])
        return (
            bits
            | placements
            | {"draft": draft, "tree": rng.choice(["auto", "auto", "chain:3", "<2,1,1>", "best-first:6"])}
        )
    return bits | placements


def tokens(completions: Any) -> list[Any]:
    return [
        [(c.token_ids, c.finish_reason, c.error), *((s.token_ids, s.finish_reason, s.error) for s in c.samples)]
        for c in completions
    ]


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 200))])
def test_tokens_are_those_of_an_engine_in_one_place(seed, folders, tmp_path, monkeypatch):
    rng = random.Random(seed)
    family = rng.choice(FAMILIES)
    folder = folders(family)
    settings = random_settings(rng, folder, family in LATENT)
    jobs = [random_requests(rng) for _ in range(rng.choice([1, 1, 2]))]
    bits: dict[str, Any] = {name: settings[name] for name in ("weight_bits", "cache_bits")}
    one_place: dict[str, Any] = {
        "percent": (100, 0, 100, 0, 100, 0),
        "gpu_batch_size": 3,
        "num_gpu_batches": 1,
        "prefill_chunk": 512,
    }
    with LLM(str(folder), **one_place, **bits, **ROOMY, **PLAIN, offload_dir=str(tmp_path / "one")) as llm:
        expected = [tokens(llm.generate(*job)) for job in jobs]
    if rng.random() < 0.5:
        # As on a GPU, where weights from the disk stop over in host memory.
        monkeypatch.setattr(WeightStore, "__init__", partialmethod(WeightStore.__init__, staged=True))
    with LLM(str(folder), **settings, **PLAIN, offload_dir=str(tmp_path / "spread")) as llm:
        for (prompts, params), wanted in zip(jobs, expected, strict=True):
            if rng.random() < 0.5:
                found = dict(
                    llm.stream((i, prompt, each) for i, (prompt, each) in enumerate(zip(prompts, params, strict=True)))
                )
                assert tokens(found[i] for i in range(len(prompts))) == wanted
            else:
                assert tokens(llm.generate(prompts, params)) == wanted
            llm.tiers.check()
            llm.queues.check()
