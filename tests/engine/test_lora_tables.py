"""Adapters with an embedding, a head, or single rows of their own: greedy fp32 tokens equal those of transformers with
the same tables, whatever else is in the block, and wherever they lie."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch import LLM, LoRARequest
from flexbatch.execution.graphs import DecodeGraphs
from flexbatch.models.lora.adapter import read_adapter
from flexbatch.models.opened import open_model
from flexbatch.planner.adapters import checked
from flexbatch.validation.errors import CheckpointError, DoesNotFitError
from tests.engine.test_lora import GREEDY, MEMORY, NEW_TOKENS, PLACEMENTS, SAMPLED, run, scores_of, tokens_of
from tests.execution.test_graphs import Recorder
from tests.peft_folders import TOKENS, embedding, linear_modules, write_adapter
from tests.tiny_models import FAMILY_CASES, make_model, random_prompts

SCORES = replace(GREEDY, prompt_logprobs=0)


def ends_of(model):
    return embedding(model), linear_modules(model, head=True)[-1]


def write_tables(model, folder, prompts):
    """A table of each kind, with and without updates, and an adapter without tables. Tokens of the prompts are among
    those that are trained."""
    table, head = ends_of(model)
    linear = linear_modules(model)
    some = sorted({token for prompt in prompts for token in prompt})[::3]
    answers = list(range(0, model.config.vocab_size, 2))
    makers = {
        "embedding": {"modules": linear[:1], "saved": [table]},
        "head": {"modules": linear[:2], "saved": [head]},
        "both": {"modules": linear, "saved": [table, head]},
        "beside": {"modules": [linear[0], table], "saved": [head]},
        "tokens": {"modules": linear[:1], "tokens": {table: some}},
        "plain": {"modules": linear},
    }
    makers["of the head"] = {"modules": linear[:1], "tokens": {table: some[::-1], head: answers}}
    return {
        name: write_adapter(folder / name, model, seed=i, strength=1.0, **options)
        for i, (name, options) in enumerate(makers.items())
    }


QUICK = ("codegen",)
"""A head with biases. A table that is the head is merged below; the other families are slow."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in FAMILY_CASES]
)
def test_every_family(case, tmp_path):
    model = make_model(case, tmp_path / "model")
    prompts = random_prompts([2, 21], seed=len(case))
    folders = write_tables(model, tmp_path, prompts)
    placement = dict(list(PLACEMENTS.values())[list(FAMILY_CASES).index(case) % len(PLACEMENTS)])
    if hasattr(model.config, "kv_lora_rank"):
        placement.pop("cpu_attention", None)
    wanted = {name: tokens_of(model, prompts, path) for name, path in {**folders, None: None}.items()}
    scores = {name: scores_of(model, prompts[1], path) for name, path in {**folders, None: None}.items()}
    with LLM(str(tmp_path / "model"), lora=folders, offload_dir=str(tmp_path / "off"), **MEMORY, **placement) as llm:
        assert run(llm, prompts, wanted) == []
        found = llm.generate([prompts[1]] * len(wanted), SCORES, lora_request=list(wanted))
        for name, each in zip(wanted, found, strict=True):
            entries = zip(prompts[1][1:], each.prompt_logprobs[1:], strict=True)
            logprobs = torch.tensor([entry[token].logprob for token, entry in entries])
            torch.testing.assert_close(logprobs, scores[name], atol=1e-4, rtol=0)
            assert name is None or (scores[name] - scores[None]).abs().max() > 0.01, "it has to change something"
        assert run(llm, prompts, wanted, ["tokens", None, "both"]) == [], "pages are shared, each by its own"
        llm.weights.check()
        llm.tiers.check()


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    model = make_model("llama", folder / "model")
    header = random_prompts([33], seed=4)[0]
    prompts = [header + end for end in random_prompts([1, 9], seed=5)]
    folders = write_tables(model, folder, prompts)
    wanted = {name: tokens_of(model, prompts, path) for name, path in {**folders, None: None}.items()}
    return folder, folders, prompts, wanted


@pytest.mark.parametrize("placement", SAMPLED)
def test_placements(placement, tables, tmp_path):
    folder, folders, prompts, wanted = tables
    settings = {**MEMORY, **PLACEMENTS[placement], "offload_dir": str(tmp_path)}
    with LLM(str(folder / "model"), lora=folders, **settings) as llm:
        llm.prepare(prompts * len(wanted), GREEDY)
        builder = llm.runner.executor.builder
        llm.runner.executor.head.logit_rows = builder.logit_rows = 5
        assert run(llm, prompts, wanted) == []
        placed = {e.spec.role: e.tier for e in llm.weights.plan.all_tensors if e.spec.role.endswith(".rows")}
        assert placed.keys() == {"adapters.embed.rows", "adapters.head.rows"}
        assert placement == "mixed" or set(placed.values()) == {"gpu" if placement == "gpu" else "cpu"}


WAYS = {
    "n-grams": {"draft": "ngram", "tree": "chain:3"},
    "a model": {"tree": "<2,1>"},
    "4 bits": {"weight_bits": 4},
    "one pass ahead": {"async_scheduling": True},
    "few pages": {"reserve": "expected", "gpu_batch_size": 3},
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way in ("n-grams", "one pass ahead") else pytest.mark.slow) for way in WAYS]
)
def test_whatever_a_pass_does_besides(way, tables, tmp_path):
    folder, folders, prompts, wanted = tables
    more = {"draft": str(folder / "model"), **WAYS[way]} if way == "a model" else WAYS[way]
    settings = {**MEMORY, **PLACEMENTS["gpu"], "offload_dir": str(tmp_path), **more}
    with LLM(str(folder / "model"), lora=folders, **settings) as llm:
        if way == "4 bits":
            alone = {name: llm.generate(prompts, GREEDY, lora_request=name) for name in wanted}
            wanted = {name: [each.token_ids for each in found] for name, found in alone.items()}
            assert len({str(tokens) for tokens in wanted.values()}) > 4
        assert run(llm, prompts, wanted) == []


def test_decode_graphs(tables):
    folder, folders, prompts, wanted = tables
    record = Recorder()
    settings = {**MEMORY, **PLACEMENTS["gpu"], "gpu_batch_size": 32}
    with LLM(str(folder / "model"), lora=folders, **settings) as llm:
        for names in (None, ["tokens", None, "both"], [None], ["head"]):
            llm.prepare(prompts * len(wanted), GREEDY)
            executor = llm.runner.executor
            group = executor.builder.group_adapters
            executor.graphs = executor.graphs or DecodeGraphs(torch.device("cpu"), 16, 512, record, 4, group)
            assert run(llm, prompts, wanted, names) == []
        assert sum(graph.replays for graph in record.made) > 10


@pytest.mark.parametrize(
    "case", ["llama-tied", *(pytest.param(case, marks=pytest.mark.slow) for case in ("llama", "codegen"))]
)
def test_the_only_adapter_of_a_job_is_merged(case, tmp_path):
    """Not where the table is the head, and one of both was trained, or each by itself."""
    model = make_model(case, tmp_path / "model")
    prompts = random_prompts([2, 21], seed=9)
    folders = write_tables(model, tmp_path, prompts)
    tied = model.config.tie_word_embeddings
    for name, folder in folders.items():
        settings = {**MEMORY, **PLACEMENTS["disk"], "offload_dir": str(tmp_path / "off")}
        with LLM(str(tmp_path / "model"), lora={name: folder}, lora_default=name, **settings) as llm:
            assert run(llm, prompts, {None: tokens_of(model, prompts, folder)}) == [], name
            merged = llm.planner.deployment.adapters.merged is not None
        assert merged == (not tied or name in ("plain", "tokens")), name


def test_tables_that_come_with_a_request(tables, tmp_path):
    folder, folders, prompts, wanted = tables
    settings = {**MEMORY, **PLACEMENTS["cpu"], "offload_dir": str(tmp_path)}
    with LLM(str(folder / "model"), **settings) as llm:
        assert run(llm, prompts, {None: wanted[None]}) == []
        for names in (["tokens"], ["head", None], ["both", "plain", "tokens", "head"]):
            asked = [name and LoRARequest(name, 1, str(folders[name])) for name in names]
            found = llm.generate([prompts[1]] * len(names), GREEDY, lora_request=asked)
            assert [each.token_ids for each in found] == [wanted[name][1] for name in names]
        llm.weights.check()


def test_a_plan_counts_them(tables, tmp_path):
    folder, folders, prompts, _ = tables
    settings = {**MEMORY, **PLACEMENTS["cpu"], "offload_dir": str(tmp_path), "reserve": "all"}

    def rows(**more):
        with LLM(str(folder / "model"), **settings, **more) as llm:
            llm.prepare(prompts * 4, GREEDY)
            return [row for row in llm.report()["memory"] if row["tier"] == "cpu"]

    def of_weights(rows):
        return sum(row["num_bytes"] for row in rows if row["what"] == "weights")

    before, after = rows(), rows(lora={"both": folders["both"]})
    assert of_weights(after) - of_weights(before) >= 2 * 307 * 60 * 4
    settings["cpu_memory"] = of_weights(after) - 1
    with pytest.raises(DoesNotFitError), LLM(str(folder / "model"), lora=folders, **settings) as llm:
        llm.generate(prompts, GREEDY)


def test_rows_of_the_model_are_not_kept(tables, tmp_path):
    """A table that was saved whole, of which three rows were trained."""
    folder = tables[0]
    model = make_model("llama", tmp_path / "model")
    table, head = ends_of(model)
    path = write_adapter(tmp_path / "a", model, [linear_modules(model)[0]], saved=[table, head])
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in (table, head):
        weight = model.get_submodule(name).weight.detach().clone()
        weight[[5, 9, 300]] += 1
        tensors[f"base_model.model.{name}.weight"] = weight
    save_file(tensors, file)
    request = LoRARequest("a", 1, str(path))
    found = checked(request, open_model(str(folder / "model"))).replaced
    assert [each.tokens.tolist() for each in found] == [[5, 9, 300]] * 2
    assert [len(each.tokens) for each in read_adapter(request, open_model(str(folder / "model")).arch).replaced] == [
        307,
        307,
    ]
    prompts = [[5, 1, 9], [300, 2, 3, 7]]
    wanted = {"a": tokens_of(model, prompts, path), None: tokens_of(model, prompts, None)}
    with LLM(str(tmp_path / "model"), lora={"a": path}, **MEMORY, **PLACEMENTS["gpu"]) as llm:
        assert run(llm, prompts, wanted) == []


def spoil(folder, changes, **config):
    path, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    tensors = load_file(file)
    changes(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


TABLE = "base_model.model.model.embed_tokens.weight"
ROWS = f"base_model.model.model.embed_tokens{TOKENS}"
WRONG = {
    "another vocabulary": (
        "embedding", lambda tensors: tensors.update({TABLE: torch.zeros(311, 60)}), {},
        r"embed_tokens.weight of shape \[311, 60\] .* wanted \[307, 60\] .* its vocabulary was changed",
    ),
    "a norm": (
        "plain", lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(60)}),
        {"modules_to_save": ["norm"]}, "model.norm.weight, trained whole: only embedding and head can be",
    ),
    "a table that is not there": (
        "embedding", lambda tensors: None, {"modules_to_save": ["embed_tokens", "lm_head"]},
        "lacks tensors of lm_head, which adapter_config.json says were trained",
    ),
    "fewer rows": (
        "tokens", lambda tensors: tensors.update({ROWS: tensors[ROWS][1:]}), {}, "tokens of model.embed_tokens",
    ),
    "a token that is not there": (
        "tokens", lambda tensors: tensors.update({ROWS: torch.zeros(2, 60)}), {"trainable_token_indices": [1, 307]},
        r"trains tokens \[1, 307\] of model.embed_tokens, wanted different ones of 307",
    ),
    "a token twice": (
        "tokens", lambda tensors: tensors.update({ROWS: torch.zeros(2, 60)}), {"trainable_token_indices": [1, 1]},
        "wanted different ones",
    ),
    "words": ("tokens", lambda tensors: None, {"trainable_token_indices": ["a"]}, "must be a list of tokens"),
    "whole numbers": (
        "embedding", lambda tensors: tensors.update({TABLE: torch.zeros(307, 60, dtype=torch.int8)}), {},
        "floating-point numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_tables_that_do_not_fit_are_refused(what, tables, tmp_path):
    name, changes, config, message = WRONG[what]
    model = make_model("llama", tmp_path / "model")
    spoil(write_tables(model, tmp_path, [[1, 2, 3, 4]])[name], changes, **config)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(LoRARequest(name, 1, str(tmp_path / name)), open_model(str(tmp_path / "model")).arch)


PEFT = {
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 1, 50]},
    "some of each": {"trainable_token_indices": {"lm_head": list(range(0, 300, 3)), "embed_tokens": [2, 5]}},
    "tokens and head": {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 1, 50]},
}


@pytest.mark.parametrize("case", ["llama", "llama-tied"])
def test_peft_itself(case, tmp_path):
    """Folders that PEFT saves, and its own forward pass."""
    peft = pytest.importorskip("peft")
    prompts = [[3, 1, 50, 2], random_prompts([25], seed=2)[0]]
    folders, wanted = {}, {}
    for name, settings in PEFT.items():
        if case == "llama-tied" and name == "tokens and head":
            continue  # PEFT puts one wrapper into the other
        model = make_model(case, tmp_path / "model")
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], **settings)
        whole, generator = peft.get_peft_model(model, config), torch.Generator().manual_seed(len(name))
        for parameter in whole.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(0.7 * parameter.std().clamp(min=0.02) * noise)
        folders[name] = tmp_path / name.replace(" ", "-")
        whole.save_pretrained(folders[name])
        with torch.no_grad():
            wanted[name] = [
                whole.generate(
                    input_ids=torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
                )[0, len(prompt) :].tolist()
                for prompt in prompts
            ]
    with LLM(str(tmp_path / "model"), lora=folders, **MEMORY, **PLACEMENTS["mixed"]) as llm:
        assert run(llm, prompts, wanted) == []
