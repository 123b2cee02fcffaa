"""Mixtures of experts through the whole engine: the greedy tokens of transformers, wherever experts lie and whatever
else is in the batch."""

from __future__ import annotations

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.execution.graphs import DecodeGraphs
from flexbatch.kernels import mxfp4_reference
from flexbatch.policy.shapes import SHAPES
from tests.engine.test_parity import ACTIVATIONS, WEIGHTS, run
from tests.execution.test_graphs import Recorder
from tests.grids import grid
from tests.mxfp4_writer import make_packed
from tests.speculative.engines import engine, tokens
from tests.tiny_models import NEW_TOKENS, Reference, greedy_tokens, make_model, random_prompts

FAMILIES = ("qwen3_moe", "mixtral", "glm4_moe", "phimoe", "gpt_oss")
"""Those that route unlike each other; `test_families_in_engine.py` has them all."""


@pytest.mark.parametrize(
    ("family", "weights", "cache", "micro_batches", "overlap", "chunk"),
    grid(FAMILIES, WEIGHTS, ("gpu", "cpu", "mixed"), (1, 2, 3), (True, False), (7, 64)),
)
def test_greedy_tokens_equal_transformers(family, weights, cache, micro_batches, overlap, chunk, reference, tmp_path):
    """Every value of every setting by default, all combinations with ``-m slow``."""
    model = reference(family)
    cell = (weights, cache, weights if weights in ACTIVATIONS else "gpu", micro_batches, overlap, chunk)
    assert run(model, tmp_path, cell, cpu_attention=0.5 if cache == "cpu" else 0.0) == model.token_ids


def test_experts_of_a_layer_are_spread_over_the_tiers(reference, tmp_path):
    """In parts, so that a split is met and every layer streams nearly the same."""
    model = reference("mixtral")
    with engine(model, tmp_path, "mixed") as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        plan = llm.weights.plan
        tiers = [
            {placed.tier for placed in layer if placed.spec.role.startswith("experts.")} for layer in plan.layers[:-1]
        ]
        assert all(found == {"gpu", "cpu", "disk"} for found in tiers)
        streamed = [plan.streamed_bytes(layer) for layer in range(3)]
        largest = max(placed.num_bytes for placed in plan.layers[0])
        assert max(streamed) - min(streamed) <= 2 * largest
        llm.weights.check()


@pytest.mark.parametrize(
    ("family", "weights", "bits"), grid(("granitemoe", "glm4_moe"), ("cpu", "disk", "mixed"), (8, 4)), ids=str
)
@torch.no_grad()
def test_quantized_experts_give_the_same_tokens_wherever_they_lie(family, weights, bits, reference, tmp_path):
    """Those of all weights on the gpu tier; routers keep their bits, experts and shared MLPs do not."""
    model = reference(family)
    settings = {"gpu_batch_size": 3, "gpu_memory": "1GiB", "cpu_memory": "1GiB", "weight_bits": bits, "device": "cpu"}
    found = []
    for placement in ("gpu", weights):
        percent = WEIGHTS[placement] + (100, 0, 100, 0)
        with LLM(str(model.folder), percent=percent, offload_dir=str(tmp_path / placement), **settings) as llm:
            found.append(tokens(llm, model.prompts))
            placed = llm.weights.plan.all_tensors
            assert {t.bits for t in placed if t.spec.role.startswith(("experts.", "shared."))} == {bits}
            assert {t.bits for t in placed if t.spec.role.startswith("router.")} == {16}
            llm.weights.check()
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
def test_tokens_do_not_depend_on_company(family, reference, tmp_path):
    """Each request alone, in a block with others, and among copies of one that all want the same experts."""
    model = reference(family)
    with engine(model, tmp_path, "mixed") as llm:
        for prompt, wanted in list(zip(model.prompts, model.token_ids, strict=True))[3:5]:
            assert tokens(llm, [prompt]) == [wanted]
            assert tokens(llm, [prompt] * 5 + model.prompts[:2])[:5] == [wanted] * 5


def test_16_bits_run_from_every_tier_alike(reference, tmp_path):
    """bfloat16 is no oracle for another implementation, but the tiers must agree."""
    model, found = reference("mixtral"), []
    for placement in ("gpu", "mixed"):
        with engine(model, tmp_path / placement, placement, dtype="bfloat16") as llm:
            found.append(tokens(llm, model.prompts))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("family", "draft", "placement", "tree"),
    grid(
        ("qwen3_moe", "mixtral", "gpt_oss"),
        ("itself", "llama", "ngram"),
        ("gpu", "mixed"),
        ("<2,2,1>", "auto"),
        together=1,
    ),
)
def test_speculation_has_the_tokens_of_plain_decoding(family, draft, placement, tree, reference, tmp_path):
    """Experts verify trees, and draft."""
    model = reference(family)
    drafts = {"itself": str(model.folder), "ngram": "ngram"}
    drafts["llama"] = str(reference("llama").folder)
    with engine(model, tmp_path, placement, draft=(drafts[draft],), tree=tree) as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        report = llm.report()["speculation"]
    if draft == "itself" and tree != "auto":
        assert report["drafts"], "the draft has to have been used"


def test_experts_draft_for_a_dense_model(reference, tmp_path):
    target, draft = reference("llama"), reference("mixtral")
    with engine(target, tmp_path, "cpu", draft=(str(draft.folder),), tree="<2,1>") as llm:
        assert tokens(llm, target.prompts) == target.token_ids


@pytest.mark.parametrize("family", ["glm4_moe-plain", "gpt_oss"])
@torch.no_grad()
def test_an_expert_that_all_choose_and_one_that_none_does(family, tmp_path):
    """Weights of both are moved; the tokens are those of transformers."""
    model = make_model(family, tmp_path)
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith(("correction_bias", "router.bias")):
            tensor[0], tensor[1] = -10.0, 10.0
    model.save_pretrained(tmp_path)
    prompts = random_prompts([3, 40, 9])
    with engine(tmp_path, tmp_path / "offload", "disk") as llm:
        found = tokens(llm, prompts)
    assert found == [greedy_tokens(model, prompt, NEW_TOKENS) for prompt in prompts]


@pytest.mark.parametrize("family", ["glm4_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_decode_graphs(family, reference, tmp_path):
    """The same tokens, and the same counts of them: a graph has more tokens than there are sequences, which are not
    counted, and what is done before a graph is recorded is not counted either."""
    model, found, record = reference(family), [], Recorder()
    for graphs in (False, True):
        with engine(model, tmp_path, "gpu", num_gpu_batches=1, gpu_batch_size=12) as llm:
            llm.prepare(model.prompts * 2, SamplingParams(max_tokens=NEW_TOKENS))
            executor = llm.runner.executor
            if graphs:
                executor.graphs = DecodeGraphs(torch.device("cpu"), 16, 512, record, 4)
            assert tokens(llm, model.prompts * 2) == model.token_ids * 2
            llm.runner.check()
            routing = llm._capacity.routing
            routing.check()
            found.append((routing.total, routing.reached, routing.passes))
    assert sum(graph.replays for graph in record.made) > 3
    assert (
        all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True)) and found[0][2] == found[1][2]
    )


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    """Greedy tokens of the expansion, by transformers."""
    folder = tmp_path_factory.mktemp("mxfp4")
    model, prompts = make_packed(folder), random_prompts([3, 40, 9, 70])
    return Reference(folder, prompts, [greedy_tokens(model, prompt, NEW_TOKENS) for prompt in prompts])


@pytest.mark.parametrize(("placement", "overlap"), [("mixed", True), ("disk", True), ("cpu", False), ("gpu", True)])
def test_mxfp4_stays_packed_and_runs_from_every_tier(placement, overlap, mxfp4, tmp_path):
    """Everything else keeps its bits, and a later start finds the files of an earlier one."""
    for start in (1, 2) if placement == "disk" else (1,):
        with engine(mxfp4.folder, tmp_path, placement, overlap=overlap) as llm:
            assert tokens(llm, mxfp4.prompts) == mxfp4.token_ids
            tensors = llm.weights.plan.all_tensors
            packed = [tensor for tensor in tensors if tensor.quantized]
            assert {tensor.spec.role for tensor in packed} == {
                tensor.spec.role for tensor in tensors if tensor.spec.role.startswith("experts.")
            }
            for tensor in packed:
                assert 8 * tensor.num_bytes == 4.25 * tensor.spec.numel
            assert not any(llm.weights.plan.dequantization_bytes(stage) for stage in ("pre", "post"))
            assert (llm.report()["reused_bytes"] > 0) is (start == 2)
            llm.weights.check()


def test_mxfp4_equals_its_expansion_in_16_bits(tmp_path):
    """Where rounding is coarse enough to show any other weight."""
    make_packed(tmp_path / "packed", tmp_path / "expanded")
    found, prompts = [], random_prompts([3, 40, 9])
    for name in ("packed", "expanded"):
        with engine(tmp_path / name, tmp_path / "offload", "cpu", dtype="bfloat16") as llm:
            params = SamplingParams(max_tokens=6, temperature=0, logprobs=3, ignore_eos=True)
            found.append([(each.token_ids, each.logprobs) for each in llm.generate(prompts, params)])
    assert found[0] == found[1]


def test_dummy_weights_of_a_published_form_are_packed(monkeypatch, tmp_path):
    """gpt-oss of two layers and four experts, 50 MB in MXFP4."""
    small = {"num_hidden_layers": 2, "num_local_experts": 4, "vocab_size": 300, "eos_token_id": 2, "hidden_size": 320}
    monkeypatch.setitem(SHAPES, "gpt-oss-20b", SHAPES["gpt-oss-20b"] | small)
    settings = {"gpu_memory": "2GiB", "cpu_memory": "2GiB", "device": "cpu", "dtype": "float32", "gpu_batch_size": 2}
    with LLM("gpt-oss-20b", dummy_weights=True, percent=(50, 50, 100, 0, 100, 0), num_gpu_batches=1, **settings) as llm:
        found = llm.generate([[5, 6, 7], [9] * 20], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
        assert [len(each.token_ids) for each in found] == [3, 3]
        experts = [t for t in llm.weights.plan.all_tensors if t.spec.role.startswith("experts.")]
        assert all(tensor.floats for tensor in experts)
        view = llm.weights.views[0, "experts.0.down.weight"]
        dense = mxfp4_reference.expand(view.codes, view.parameters, torch.float32)
        assert 0.005 < dense.std() < 0.02, "like any random matrix that writes into the residual stream"


def test_the_report_tells_how_even_the_routing_is(mxfp4, tmp_path):
    """One expert has all tokens and one has none; every layer is counted in every micro-batch, chunk and pass."""
    with engine(mxfp4.folder, tmp_path, "mixed", num_gpu_batches=2) as llm:
        assert "experts" not in llm.report() or not llm.report()["experts"]
        tokens(llm, mxfp4.prompts)
        report, routing = llm.report(), llm._capacity.routing
        routing.check()
        read = report["prefilled_tokens"] + report["generated_tokens"] - len(mxfp4.prompts)
        assert routing.total.sum(1).tolist() == [3 * read] * 3
        assert report["experts"]["passes"] == report["passes"] and 3 <= report["experts"]["distinct_per_pass"] <= 6
        assert 0 < report["experts"]["gini"] < 1 and "experts: " in str(report) and "Gini" in str(report)
        tokens(llm, mxfp4.prompts[:1])
        assert llm.report()["experts"]["passes"] == llm.report()["passes"], "runners change, counts go on"
