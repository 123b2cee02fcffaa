"""Experts that the CPU computes where they lie: the tokens of transformers, whatever crosses the link meanwhile."""

from __future__ import annotations

import pytest
import torch

from flexbatch import LLM
from flexbatch.execution.routed_rows import RoutedRows
from flexbatch.validation.errors import ConfigurationError
from tests.engine.test_parity import ACTIVATIONS, CACHE, WEIGHTS
from tests.grids import grid
from tests.mxfp4_writer import make_packed
from tests.speculative.engines import engine, tokens
from tests.tiny_models import NEW_TOKENS, Reference, greedy_tokens, make_model, random_prompts

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2", "llama4_text")
"""Of the last the choices scale what an expert is given."""


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    """Greedy tokens of the expansion, by transformers."""
    folder = tmp_path_factory.mktemp("mxfp4")
    model, prompts = make_packed(folder), random_prompts([3, 40, 9, 70])
    return Reference(folder, prompts, [greedy_tokens(model, prompt, NEW_TOKENS) for prompt in prompts])


def checked(llm: LLM) -> int:
    """Bytes of experts that the CPU has computed, of an engine whose parts are in order."""
    for part in (llm.runner, llm.weights, llm.tiers, llm.queues):
        part.check()
    return llm.queues.cpu_experts.num_bytes


@pytest.mark.parametrize(
    ("family", "weights", "cache", "micro_batches", "overlap", "chunk", "share"),
    grid(FAMILIES, ("cpu", "mixed"), ("gpu", "cpu", "mixed"), (1, 2, 3), (True, False), (5, 7, 64), (40, 100)),
)
def test_greedy_tokens_equal_transformers(
    family, weights, cache, micro_batches, overlap, chunk, share, reference, tmp_path
):
    model = reference(family)
    attention = 0.5 if cache == "cpu" and family != "deepseek_v2" else 0.0
    percent = WEIGHTS[weights] + CACHE[cache] + ACTIVATIONS[weights]
    settings = {"percent": percent, "num_gpu_batches": micro_batches, "overlap": overlap, "prefill_chunk": chunk}
    with LLM(
        str(model.folder), gpu_batch_size=3, gpu_memory="1GiB", cpu_memory="1GiB", offload_dir=str(tmp_path),
        device="cpu", cpu_attention=attention, cpu_experts=share, **settings,
    ) as llm:  # fmt: skip
        assert tokens(llm, model.prompts) == model.token_ids
        assert checked(llm) > 0


@pytest.mark.parametrize(
    ("place", "share", "overlap"), [("cpu", 50, True), ("cpu", 100, False), pytest.param("mixed", 100, True)]
)
def test_mxfp4_is_computed_as_it_is_packed(place, share, overlap, mxfp4, tmp_path):
    with engine(mxfp4, tmp_path, place, overlap=overlap, cpu_experts=share) as llm:
        assert tokens(llm, mxfp4.prompts) == mxfp4.token_ids
        assert checked(llm) > 0


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_own_bits_give_the_tokens_of_the_device(bits, reference, tmp_path):
    model, found = reference("granitemoe"), []
    for share in (0, 60):
        with engine(model, tmp_path, "cpu", weight_bits=bits, cpu_experts=share) as llm:
            found.append(tokens(llm, model.prompts))
            assert (checked(llm) > 0) is (share > 0)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("family", "draft"), [("qwen3_moe", "itself"), pytest.param("gpt_oss", "ngram", marks=pytest.mark.slow)]
)
def test_trees_are_verified(family, draft, reference, tmp_path):
    model = reference(family)
    settings = {"draft": (str(model.folder) if draft == "itself" else draft,), "tree": "<2,2,1>"}
    with engine(model, tmp_path, "cpu", cpu_experts=70, **settings) as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        assert checked(llm) > 0


@torch.no_grad()
def test_an_expert_that_all_choose_and_one_that_none_does(tmp_path):
    """Weights of both are moved: first those that nothing is known of are on the CPU, later the one that nobody wants.
    What crosses the link changes between passes, and layers that are on their way are used as they come."""
    model = make_model("gpt_oss", tmp_path)
    for name, tensor in model.named_parameters():
        if name.endswith("router.bias"):
            tensor[0], tensor[1] = 10.0, -10.0
    model.save_pretrained(tmp_path)
    prompts = random_prompts([3, 40, 9])
    with engine(tmp_path, tmp_path / "offload", "cpu", cpu_experts=34) as llm:
        assert tokens(llm, prompts) == [greedy_tokens(model, prompt, NEW_TOKENS) for prompt in prompts]
        assert checked(llm) > 0
        for layer, left_out in llm.weights.cpu_experts.chosen.items():
            chosen, counts = left_out.experts, llm._capacity.routing.total[layer]
            assert 1 in chosen and 0 not in chosen and len(chosen) == 2
            assert counts[1] == 0 and counts[0] == counts.max()


@pytest.mark.parametrize("family", ["llama4_text", "qwen3_moe"])
def test_rows_go_through_buffers(family, reference, tmp_path, monkeypatch):
    """As they do beside a GPU: down, and up with the choices that they are of."""
    monkeypatch.setattr(RoutedRows, "copies", True)
    model = reference(family)
    with engine(model, tmp_path, "cpu", cpu_experts=70, num_gpu_batches=3) as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        assert checked(llm) > 0 and len(llm.runner.routed.buffers) == 3
        assert not llm.runner.routed.owned


def test_passes_of_many_tokens_stream_all(reference, tmp_path, monkeypatch):
    """And those between them do not: what was left out of layers on their way is brought after them."""
    model, brought = reference("qwen3_moe"), []
    monkeypatch.setattr("flexbatch.policy.limits.CPU_EXPERT_ROWS", 4)
    with engine(model, tmp_path, "cpu", cpu_experts=100) as llm:
        send = llm.queues.h2d.submit
        monkeypatch.setattr(
            llm.queues.h2d, "submit",
            lambda job, after, name="", num_bytes=0: (brought.append(name), send(job, after, name, num_bytes))[1],
        )  # fmt: skip
        assert tokens(llm, model.prompts) == model.token_ids
        assert tokens(llm, model.prompts) == model.token_ids
        assert checked(llm) > 0
        assert llm.runner.routed.max_tokens == 2 * llm.policy.gpu_batch_size < 4 * 6 // 3
    assert any(name.startswith("experts ") for name in brought)


def test_a_token_does_not_depend_on_its_company(reference, tmp_path):
    model = reference("mixtral")
    with engine(model, tmp_path, "cpu", cpu_experts=50) as llm:
        for prompt, wanted in list(zip(model.prompts, model.token_ids, strict=True))[3:5]:
            assert tokens(llm, [prompt]) == [wanted]
            assert tokens(llm, [prompt] * 5 + model.prompts[:2])[:5] == [wanted] * 5


def test_what_cannot_be_is_refused(reference):
    with pytest.raises(ConfigurationError, match="opt has no experts"):
        LLM(str(reference("opt").folder), device="cpu", cpu_experts=50)
    with pytest.raises(ConfigurationError, match="cpu_experts=101 must be between 0 and 100"):
        LLM(str(reference("mixtral").folder), device="cpu", cpu_experts=101)
