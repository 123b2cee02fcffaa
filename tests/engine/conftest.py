"""Tiny models with what transformers generates for them: the ground truth of the engine's tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.tiny_models import make_model, random_prompts

PROMPT_LENGTHS = [1, 2, 5, 17, 40, 200, 33, 16, 15, 64]
NEW_TOKENS = 12


@dataclass(frozen=True)
class Reference:
    """A model folder, prompts of awkward lengths, and the greedy continuations of transformers, each prompt alone."""

    folder: Path
    prompts: list[list[int]]
    token_ids: list[list[int]]


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """family -> Reference, built once per session."""
    made: dict[str, Reference] = {}

    def make(family: str) -> Reference:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = make_model(family, folder)
            prompts = random_prompts(PROMPT_LENGTHS, seed=len(family))
            outputs = []
            for prompt in prompts:
                ids = torch.tensor([prompt])
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
                )
                outputs.append(out[0, len(prompt) :].tolist())
            made[family] = Reference(folder, prompts, outputs)
        return made[family]

    return make


@pytest.fixture
def budgets():
    return {"gpu_memory": "1GiB", "cpu_memory": "1GiB"}
