"""Latent attention through the whole engine: the greedy tokens of transformers, which expands keys and values of all
heads, wherever experts and cache lie."""

from __future__ import annotations

import itertools

import pytest
import torch

from flexbatch import LLM
from flexbatch.models import checkpoint
from flexbatch.planner.problem import model_shape
from flexbatch.policy.limits import PAGE_TOKENS
from flexbatch.validation.errors import ConfigurationError
from tests.engine.test_parity import ACTIVATIONS, WEIGHTS, run
from tests.grids import grid
from tests.speculative.engines import engine, tokens
from tests.tiny_models import NEW_TOKENS, greedy_tokens, make_model, random_prompts

FAMILIES = ("deepseek_v3", "deepseek_v2", "glm4_moe_lite")


def slow_but(first, *axes):
    """All combinations, of which one runs by default."""
    return [pytest.param(*cell, marks=() if cell == first else pytest.mark.slow) for cell in itertools.product(*axes)]


QUANTIZED = slow_but((8, "mixed"), (8, 4), ("cpu", "disk", "mixed"))
SPECULATIVE = slow_but(
    ("deepseek_v3", "itself", "mixed", "<2,2,1>"),
    FAMILIES,
    ("itself", "llama", "ngram"),
    ("gpu", "mixed"),
    ("<2,2,1>", "auto"),
)


@pytest.mark.parametrize(
    ("family", "weights", "cache", "micro_batches", "overlap", "chunk"),
    grid(FAMILIES, WEIGHTS, ("gpu", "cpu", "disk", "mixed"), (1, 2, 3), (True, False), (7, 64)),
)
def test_greedy_tokens_equal_transformers(family, weights, cache, micro_batches, overlap, chunk, reference, tmp_path):
    """Every value of every setting by default, all combinations with ``-m slow``."""
    model = reference(family)
    cell = (weights, cache, weights if weights in ACTIVATIONS else "gpu", micro_batches, overlap, chunk)
    assert run(model, tmp_path, cell) == model.token_ids


@pytest.mark.parametrize(("bits", "placement"), QUANTIZED)
def test_a_quantized_cache_gives_the_same_tokens_wherever_it_lies(bits, placement, reference, tmp_path):
    """With chunks of a prompt and with speculation, too."""
    model, found = reference("deepseek_v3"), []
    prompts = model.prompts[2:7]
    for index, (where, settings) in enumerate(
        (
            ("gpu", {}),
            (placement, {}),
            (placement, {"prefill_chunk": 7}),
            ("gpu", {"draft": ("ngram",), "tree": "<2,1>"}),
        )
    ):
        with engine(model, tmp_path / str(index), where, cache_bits=bits, **settings) as llm:
            found.append(tokens(llm, prompts))
            llm.runner.check()
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize(("bits", "placement"), QUANTIZED)
def test_quantized_weights_give_the_same_tokens_wherever_they_lie(bits, placement, reference, tmp_path):
    """All matrices of attention have these bits, those that lead out of the latent's space as well."""
    model, found = reference("deepseek_v2"), []
    for where in ("gpu", placement):
        with engine(model, tmp_path / where, where, weight_bits=bits) as llm:
            found.append(tokens(llm, model.prompts[2:7]))
            placed = {t.spec.role: t.bits for t in llm.weights.plan.all_tensors}
            assert {placed[f"{role}.weight"] for role in ("q", "kv_a", "k_up", "v_up", "o")} == {bits}
            assert placed["kv_a_norm.weight"] == placed["router.weight"] == 16
    assert found[0] == found[1]


@pytest.mark.parametrize(("family", "draft", "placement", "tree"), SPECULATIVE)
def test_speculation_has_the_tokens_of_plain_decoding(family, draft, placement, tree, reference, tmp_path):
    """Latent attention verifies trees, and drafts."""
    model = reference(family)
    drafts = {"itself": str(model.folder), "ngram": "ngram", "llama": str(reference("llama").folder)}
    with engine(model, tmp_path, placement, draft=(drafts[draft],), tree=tree) as llm:
        assert tokens(llm, model.prompts[:7]) == model.token_ids[:7]


def test_prefixes_are_shared(reference, tmp_path):
    """Pages of the latent, as any others."""
    model = reference("deepseek_v3")
    head = max(model.prompts, key=len)
    prompts = [[*head, token] for token in (5, 6, 7, 8)]
    with engine(model, tmp_path / "one", "mixed") as llm:
        alone = [tokens(llm, [prompt])[0] for prompt in prompts]
    with engine(model, tmp_path / "all", "cpu") as llm:
        assert tokens(llm, prompts) == alone
        report = llm.report()
        assert report["prefilled_tokens"] < report["prompt_tokens"] - 2 * len(head) + 2 * PAGE_TOKENS


@torch.no_grad()
def test_an_expert_that_all_choose_and_one_that_none_does(tmp_path):
    model = make_model("deepseek_v3", tmp_path, n_group=1, topk_group=1)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer[0], buffer[1] = -10.0, 10.0
    model.save_pretrained(tmp_path)
    prompts = random_prompts([3, 40, 9])
    with engine(tmp_path, tmp_path / "offload", "disk") as llm:
        found = tokens(llm, prompts)
    assert found == [greedy_tokens(model, prompt, NEW_TOKENS) for prompt in prompts]


def test_attention_on_the_cpu_is_refused_and_never_planned(reference, tmp_path):
    model = reference("deepseek_v3")
    with pytest.raises(ConfigurationError, match=r"cpu_attention=0.5: deepseek_v3 has latent attention.* 36 numbers"):
        tokens(engine(model, tmp_path, "cpu", cpu_attention=0.5), model.prompts)
    with LLM(str(model.folder), device="cpu", gpu_memory="1GiB", cpu_memory="1GiB") as llm:
        tokens(llm, model.prompts[:3])
        assert llm.report()["policy"]["cpu_attention"] == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_plan_counts_the_bytes_that_are_stored(family, bits, reference):
    """One row for all heads: 36 numbers, not 6 heads of 22 and 6 of 10."""
    from flexbatch.execution.block_sizes import cache_layout

    arch = checkpoint.read_arch(reference(family).folder)
    assert arch.head_dim == 36 and arch.num_kv_heads == 1
    layout, shape = cache_layout(arch, bits, torch.float32), model_shape(family, arch, 4)
    assert shape.token_bytes(bits) == layout.token_bytes
    assert bits != 16 or layout.token_bytes == 36 * 4
