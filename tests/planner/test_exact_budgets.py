"""Given placements and budgets to the byte: what a real load takes is what the plan says, and what fits by that is
accepted."""

from __future__ import annotations

import random
import re

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.validation.errors import DoesNotFitError
from tests.tiny_models import make_model, random_prompts

TIERS = ("gpu", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact") / "model"
    return folder, make_model("llama", folder)


def settings_of(seed, folder):
    draw = random.Random(seed)

    def split():
        gpu = draw.choice([0, 10, 25, 33, 50, 70, 100])
        return gpu, draw.choice([0, min(50, 100 - gpu), 100 - gpu])

    return {
        "percent": (*split(), *split(), *split()),
        "gpu_batch_size": draw.choice([1, 2, 3, 5]),
        "num_gpu_batches": draw.choice([1, 2, 3]),
        "prefill_chunk": draw.choice([16, 32]),
        "prefill_budget": draw.choice([16, 64]),
        "weight_bits": draw.choice([16, 16, 4]),
        "cache_bits": draw.choice([16, 8]),
        "cpu_attention": draw.choice([0.0, 0.5]),
        "hardware": "cpu",
        "device": "cpu",
        "offload_dir": str(folder.parent / "offload"),
    }


def fits_to_the_byte(model, seed):
    folder, reference = model
    settings, prompts = settings_of(seed, folder), random_prompts([7, 40, 3, 21, 12], seed=seed)
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)

    def run(**budgets):
        with LLM(str(folder), **settings, **budgets) as llm:
            tokens = [list(completion.token_ids) for completion in llm.generate(prompts, params)]
            needs = llm.engine_plan.requirements(llm.runner.sizes)
            for tier in TIERS:
                pool = getattr(llm.tiers, tier)
                pool.check()
                # What is no pool's is the workspace of a pass, which torch allocates.
                held = sum(
                    need.num_bytes
                    for need in needs
                    if need.tier == tier
                    and not need.what.endswith("workspace")
                    and (need.what, tier) != ("activations", "gpu")
                )
                assert sum(pool.used_bytes.values()) == held, (settings, tier, pool.used_bytes, needs)
            return tokens, {tier: sum(need.num_bytes for need in needs if need.tier == tier) for tier in TIERS}

    tokens, room = run(gpu_memory="1GiB", cpu_memory="1GiB")
    for prompt, generated in zip(prompts, tokens, strict=True):
        if settings["weight_bits"] == settings["cache_bits"] == 16:
            wanted = reference.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=None)
            assert generated == wanted[0, len(prompt) :].tolist()
    exact = {f"{tier}_memory": max(1, size) for tier, size in room.items()}
    assert run(**exact) == (tokens, room)
    for tier in TIERS:
        if room[tier] > 1:
            with pytest.raises(DoesNotFitError):
                run(**{**exact, f"{tier}_memory": room[tier] - 1})


@pytest.mark.parametrize("seed", range(4))
def test_a_placement_runs_in_exactly_what_it_needs(model, seed):
    fits_to_the_byte(model, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 75))
def test_many_placements_run_in_exactly_what_they_need(model, seed):
    fits_to_the_byte(model, seed)


@pytest.mark.parametrize("mebibytes", [4, 17, 37, 49])
def test_a_placement_that_nobody_gave_is_refused_by_its_exact_sizes(mebibytes, tmp_path):
    """Latent attention takes a workspace of 48 MiB that the search does not count. The error told of the 0.001 MiB that
    it was left with, and with the memory that it asked for the model was refused again."""
    folder = tmp_path / "model"
    make_model("glm4_moe_lite", folder)
    settings = {"cpu_memory": "2MiB", "device": "cpu", "dtype": "float32", "hardware": "cpu"}
    settings |= {"offload_dir": str(tmp_path / "off")}
    with pytest.raises(DoesNotFitError, match=rf"attention workspace[\s\S]*budget +{mebibytes}\.000") as refused:
        LLM(str(folder), gpu_memory=f"{mebibytes}MiB", **settings)
    more = float(re.findall(r"raise --gpu-memory by ([\d.]+) MiB", str(refused.value))[0])
    with LLM(str(folder), gpu_memory=f"{mebibytes + more + 0.001}MiB", **settings) as llm:
        prompts, params = random_prompts([3, 40], seed=1), SamplingParams(max_tokens=4, temperature=0)
        assert all(len(each.token_ids) for each in llm.generate(prompts, params))
