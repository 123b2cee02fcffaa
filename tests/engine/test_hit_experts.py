"""Passes of few tokens bring only the experts that are hit: the tokens of transformers, and fewer bytes."""

from __future__ import annotations

import pytest
import torch

from flexbatch.memory.weights import WeightStore
from flexbatch.policy.limits import hit_expert_tokens
from tests.grids import grid
from tests.mxfp4_writer import make_packed
from tests.speculative.engines import PLACEMENTS, engine, tokens
from tests.tiny_models import NEW_TOKENS, Reference, greedy_tokens, random_prompts

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v2", "llama4_text")
"""Of the last the choices scale what an expert is given, and of the one before a layer is dense."""
NOTHING = 255
"""Bytes of a slab before anything crosses to it: as numbers of any dtype not a number, or a scale beyond all."""


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mxfp4")
    model, prompts = make_packed(folder), random_prompts([3, 40, 9])
    return Reference(folder, prompts, [greedy_tokens(model, prompt, NEW_TOKENS) for prompt in prompts])


@pytest.fixture
def leases(monkeypatch):
    """All leases; every slab is empty when a layer gets it."""
    found, lease = [], WeightStore.lease

    def emptied(store: WeightStore, layer: int):
        made = lease(store, layer)
        store.slabs[made.slab].fill_(NOTHING)
        found.append(made)
        return made

    monkeypatch.setattr(WeightStore, "lease", emptied)
    return found


def crossed(llm) -> int:
    """Bytes over the link so far, of an engine whose parts are in order."""
    for part in (llm.runner, llm.weights, llm.tiers, llm.queues):
        part.check()
    return llm.queues.h2d.num_bytes


def always(monkeypatch) -> None:
    """Not in passes of few tokens only, but in those of 90."""
    monkeypatch.setattr("flexbatch.policy.limits.HIT_SHARE", 1 - 1e-16)


@pytest.mark.parametrize(
    ("family", "place", "overlap", "micro_batches", "share"),
    grid(FAMILIES, ("cpu", "mixed"), (True, False), (1, 2, 3), (0, 50)),
)
def test_greedy_tokens_equal_transformers(
    family, place, overlap, micro_batches, share, reference, tmp_path, monkeypatch, leases
):
    always(monkeypatch)
    model = reference(family)
    settings = {"overlap": overlap, "num_gpu_batches": micro_batches, "cpu_experts": share, "prefill_chunk": 20}
    with engine(model, tmp_path, place, **settings) as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        crossed(llm)
    assert any(lease.by_hit and lease.arrived is not None for lease in leases)


@pytest.mark.parametrize("share", [0, 50])
def test_an_engine_whose_weights_were_placed_in_inference_mode_can_be_closed(share, reference, tmp_path):
    """So the engines are that share a job with others, and one whose first job runs in the caller's inference mode."""
    model = reference("qwen3_moe")
    with engine(model, tmp_path, "mixed", cpu_experts=share) as llm:
        with torch.inference_mode():
            assert tokens(llm, model.prompts) == model.token_ids
        assert llm.weights.hit_experts is not None
        assert tokens(llm, model.prompts) == model.token_ids


@pytest.mark.parametrize(
    ("bits", "family"), [(16, "mxfp4"), (4, "granitemoe"), pytest.param(8, "granitemoe", marks=pytest.mark.slow)]
)
def test_experts_in_codes_come_with_their_scales(bits, family, mxfp4, reference, tmp_path, monkeypatch, leases):
    model, found = mxfp4 if family == "mxfp4" else reference(family), []
    for share in (0.0, 1 - 1e-16):
        monkeypatch.setattr("flexbatch.policy.limits.HIT_SHARE", share)
        with engine(model, tmp_path, "cpu", weight_bits=bits) as llm:
            found.append((tokens(llm, model.prompts), crossed(llm)))
    assert found[0][0] == found[1][0] and found[1][1] < found[0][1]
    assert family != "mxfp4" or found[0][0] == model.token_ids


@torch.no_grad()
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_only_what_is_hit_crosses_and_that_once(micro_batches, reference, tmp_path, monkeypatch, leases):
    """Byte for byte, by the routers' counts: though micro-batches hit the same experts."""
    always(monkeypatch)
    model = reference("mixtral")
    with engine(model, tmp_path, "cpu", num_gpu_batches=micro_batches) as llm:
        assert tokens(llm, model.prompts[:3]) == model.token_ids[:3]
        experts, plan = llm.arch.experts, llm.weights.plan
        each = sum(end - start for _, start, end in llm.weights.hit_experts.parts[0]) / experts.count
        assert all(plan.layer_bytes(layer, "cpu") > experts.count * each for layer in range(llm.arch.num_layers))
        reached = int(llm._capacity.routing.reached.sum())
        arrived = [lease for lease in leases if lease.arrived is not None]
        assert all(lease.by_hit for lease in arrived)
        assert sum(int(lease.arrived.sum()) for lease in arrived) == reached
        assert reached < len(arrived) * experts.count
        by_copies, llm.queues.h2d.num_bytes = llm.queues.h2d.num_bytes, 0
        assert crossed(llm) == 0 < by_copies - reached * each


def test_passes_of_few_tokens_only(reference, tmp_path, leases):
    """A single token at 3 of 6, and what is on its way when passes change over is used as it came."""
    model = reference("qwen3_moe")
    assert hit_expert_tokens(6, 3) == 1
    with engine(model, tmp_path, "cpu") as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        many = [lease.by_hit for lease in leases]
        assert tokens(llm, model.prompts[3:4]) == model.token_ids[3:4]
        few = [lease.by_hit for lease in leases[len(many) :]]
        assert tokens(llm, model.prompts) == model.token_ids
        sparse = sum(map(bool, llm.weights.hit_experts.parts.values()))
    assert few.count(True) >= sparse * (NEW_TOKENS - 2) and many.count(False) > len(many) / 2


def test_experts_on_the_disk_come_whole(reference, tmp_path, monkeypatch, leases):
    always(monkeypatch)
    model = reference("mixtral")
    assert PLACEMENTS["disk"][1] == 0
    with engine(model, tmp_path, "disk") as llm:
        assert tokens(llm, model.prompts[:3]) == model.token_ids[:3]
        assert not any(llm.weights.hit_experts.parts.values())
    assert leases and not any(lease.by_hit for lease in leases)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_trees_are_verified(micro_batches, reference, tmp_path, monkeypatch, leases):
    always(monkeypatch)
    model = reference("gpt_oss")
    settings = {"draft": ("ngram",), "tree": "<2,2,1>", "num_gpu_batches": micro_batches}
    with engine(model, tmp_path, "cpu", **settings) as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        crossed(llm)
    assert any(lease.by_hit for lease in leases)
