"""Models with sliding windows and trees merged from several drafts: the greedy tokens of plain decoding, in float32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from flexbatch import LLM, SamplingParams
from tests.speculative.engines import PLACEMENTS
from tests.tiny_models import VOCAB, make_model

FAMILIES = ("mistral", "gemma2", "gemma3", "phi3", "starcoder2")
WINDOWS = (3, 16, 29, 64)
TREES = ("best-first:13", "best-first:13", "best-first:40", "<3,2,1>", "<1,1,3,1,1>", "chain:5", "auto")
WHOLE, PART = 300, 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[tuple[str, int, int], str] = {}

    def folder(family: str, window: int, seed: int) -> str:
        if (key := (family, window, seed)) not in made:
            path: Path = tmp_path_factory.mktemp(family) / "model"
            make_model(family, path, seed=seed, sliding_window=window)
            made[key] = str(path)
        return made[key]

    return folder


def repetitive(rng: random.Random) -> list[int]:
    """A prompt in which a lookup finds several continuations of the same beginning."""
    phrases = [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(2, 4))]
    return [token for _ in range(rng.randint(1, 30)) for token in rng.choice(phrases)][: rng.randint(1, 150)]


def random_settings(rng: random.Random, drafts: list[str]) -> dict[str, Any]:
    several = rng.choice([("ngram",), (drafts[1], "ngram"), (drafts[0], drafts[1]), (drafts[1], drafts[0], "ngram")])
    return {
        "percent": PLACEMENTS[rng.choice(["gpu", "cpu", "mixed", "disk"])],
        "cpu_attention": rng.choice([0, 0.5, 1.0]),
        "gpu_batch_size": rng.randint(1, 5),
        "num_gpu_batches": rng.randint(1, 3),
        "prefill_chunk": rng.choice([7, 16, 64]),
        "draft": several,
        "tree": rng.choice(TREES),
    }


@pytest.mark.parametrize(
    "seeds",
    [range(2), *(pytest.param(range(i, i + PART), marks=pytest.mark.slow) for i in range(0, WHOLE, PART))],
    ids=str,
)
def test_tokens_are_those_of_plain_decoding(seeds, folders, tmp_path):
    differing, drafted = [], 0
    for seed in seeds:
        rng = random.Random(seed)
        family, window = rng.choice(FAMILIES), rng.choice(WINDOWS)
        drafts = [folders(family, window, 0), folders(family, rng.choice(WINDOWS), 1)]
        settings = random_settings(rng, drafts)
        prompts = [repetitive(rng) for _ in range(rng.randint(2, 5))]
        params = SamplingParams(max_tokens=rng.randint(8, 32), temperature=0, ignore_eos=True)
        common: dict[str, Any] = {
            "device": "cpu",
            "dtype": "float32",
            "gpu_memory": "1GiB",
            "cpu_memory": "1GiB",
            "offload_dir": str(tmp_path),
        }
        with LLM(drafts[0], percent=PLACEMENTS["gpu"], gpu_batch_size=4, num_gpu_batches=1, **common) as llm:
            plain = [completion.token_ids for completion in llm.generate(prompts, params)]
        with LLM(drafts[0], **common, **settings) as llm:
            found = [completion.token_ids for completion in llm.generate(prompts, params)]
            drafted += llm.report()["speculation"]["drafted_tokens"]
        if found != plain:
            differing.append((seed, family, window, settings))
    assert not differing
    assert drafted > 10 * len(seeds), "trees were tried"
