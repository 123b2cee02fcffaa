"""Adapters through the engine: greedy fp32 tokens equal those of transformers with the same updates, whatever else is
in the block, wherever weights and cache lie, and whatever a pass does besides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch import LLM, LoRARequest, SamplingParams
from flexbatch.execution.graphs import DecodeGraphs
from flexbatch.execution.piece_graphs import PieceGraphs
from flexbatch.execution.scheduler import Scheduler
from flexbatch.kernels import ops, reference
from flexbatch.policy.limits import weight_group
from flexbatch.validation.errors import CheckpointError, ConfigurationError, DoesNotFitError
from tests.execution.test_graphs import Recorder
from tests.peft_folders import adapted, embedding, linear_modules, write_adapter
from tests.tiny_models import FAMILY_CASES, greedy_tokens, make_model, random_prompts

NEW_TOKENS = 6
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
MEMORY = {"device": "cpu", "gpu_memory": "1GiB", "cpu_memory": "1GiB"}
PLACEMENTS = {
    "gpu": {"percent": (100, 0, 100, 0, 100, 0), "gpu_batch_size": 18, "num_gpu_batches": 1},
    "cpu": {"percent": (0, 100, 0, 100, 0, 100), "gpu_batch_size": 9, "num_gpu_batches": 2, "cpu_attention": 0.5},
    "disk": {"percent": (0, 0, 0, 0, 100, 0), "gpu_batch_size": 7, "num_gpu_batches": 3, "prefill_chunk": 7},
    "mixed": {"percent": (30, 40, 40, 30, 50, 50), "gpu_batch_size": 5, "num_gpu_batches": 2, "overlap": False},
}


def tokens_of(model, prompts, folder):
    with torch.no_grad(), adapted(model, folder):
        return [greedy_tokens(model, prompt, NEW_TOKENS, eos_token_id=None) for prompt in prompts]


def scores_of(model, prompt, folder):
    """Log-probabilities of a prompt's tokens from the second on: an answer's may all be next to 0."""
    with torch.no_grad(), adapted(model, folder):
        logits = model(torch.tensor([prompt])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


def write_three(model, folder):
    """All linear modules; some with ranks and alphas of their own, rank-stabilized; embedding and head beside one."""
    linear = linear_modules(model)
    write_adapter(folder / "all", model, linear, seed=1, rank=4, strength=1.0)
    some = [name for i, name in enumerate(linear) if i % 3]
    patterns = {"rank_pattern": {re_name(some[0]): 7}, "alpha_pattern": {re_name(some[-1]): 3}}
    write_adapter(folder / "some", model, some, seed=2, rank=16, use_rslora=True, binary=True, strength=1.0, **patterns)
    ends = [embedding(model), linear_modules(model, head=True)[-1]]
    write_adapter(folder / "ends", model, [linear[1], *ends], seed=3, rank=5, strength=3.0)
    return {name: folder / name for name in ("all", "some", "ends")}


def re_name(module):
    return module.split(".", 1)[1]


QUICK = ("gpt2", "gemma3-linear")
"""Transposed matrices, a scaled embedding; interleaved ones and Llama are in the other tests."""
SAMPLED = [pytest.param(name, marks=() if name in ("gpu", "disk") else pytest.mark.slow) for name in PLACEMENTS]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in FAMILY_CASES]
)
def test_every_family(case, tmp_path):
    model = make_model(case, tmp_path / "model")
    folders = write_three(model, tmp_path)
    prompts = random_prompts([1, 29], seed=len(case))
    placement = dict(list(PLACEMENTS.values())[list(FAMILY_CASES).index(case) % len(PLACEMENTS)])
    if hasattr(model.config, "kv_lora_rank"):
        placement.pop("cpu_attention", None)
    wanted = {name: tokens_of(model, prompts, folder) for name, folder in {**folders, None: None}.items()}
    order = [(name, i) for i in range(len(prompts)) for name in wanted]
    with LLM(str(tmp_path / "model"), lora=folders, offload_dir=str(tmp_path / "off"), **MEMORY, **placement) as llm:
        params = replace(GREEDY, prompt_logprobs=0)
        found = llm.generate([prompts[i] for _, i in order], params, lora_request=[name for name, _ in order])
        llm.weights.check()
        llm.tiers.check()
    for (name, i), each in zip(order, found, strict=True):
        assert each.token_ids == wanted[name][i]
        if i:
            entries = zip(prompts[i][1:], each.prompt_logprobs[1:], strict=True)
            scores = torch.tensor([entry[token].logprob for token, entry in entries])
            expected, plain = (scores_of(model, prompts[i], path) for path in (folders.get(name), None))
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
            assert name is None or (expected - plain).abs().max() > 0.01, "an adapter has to change something"


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A model, eight adapters with ranks from 1 to 256, prompts that begin alike, and the tokens of each, by name."""
    folder = tmp_path_factory.mktemp("eight")
    model = make_model("llama", folder / "model")
    linear = linear_modules(model)
    folders = {}
    for i, rank in enumerate((1, 4, 16, 64, 256, 8, 3, 16)):
        chosen = [linear, linear[::2], linear[1::3]][i % 3]
        folders[f"a{i}"] = write_adapter(folder / f"a{i}", model, chosen, seed=i, rank=rank, strength=0.7)
    header = random_prompts([37], seed=4)[0]
    prompts = [header + end for end in random_prompts([1, 9], seed=5)]
    wanted = {name: tokens_of(model, prompts, path) for name, path in {**folders, None: None}.items()}
    assert len({str(tokens) for tokens in wanted.values()}) == 9
    return folder, model, folders, prompts, wanted


def run(llm, prompts, wanted, names=None):
    """Every prompt with every adapter, in one block; tokens that differ by (name, prompt)."""
    order = [(name, i) for i in range(len(prompts)) for name in (names or wanted)]
    found = llm.generate([prompts[i] for _, i in order], GREEDY, lora_request=[name for name, _ in order])
    return [key for key, each in zip(order, found, strict=True) if each.token_ids != wanted[key[0]][key[1]]]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_eight_adapters_and_none_in_one_block(placement, eight, tmp_path):
    folder, _, folders, prompts, wanted = eight
    settings = {**MEMORY, **PLACEMENTS[placement], "offload_dir": str(tmp_path)}
    with LLM(str(folder / "model"), lora=folders, **settings) as llm:
        assert run(llm, prompts, wanted) == []
        assert run(llm, prompts, wanted, ["a3", None, "a3"]) == [], "pages of the first run are shared, each by its own"
        llm.runner.check()
        placed = {each.tier for each in llm.weights.plan.all_tensors if each.spec.role.startswith("adapters.")}
        assert placed == {"gpu": {"gpu"}, "mixed": {"gpu", "cpu"}}.get(placement, {"cpu"})


def test_switching_adapters_reads_nobody_elses_prefix(eight, tmp_path):
    """One prompt after another in one engine: what a prompt shares was read with its own adapter."""
    folder, _, folders, prompts, wanted = eight
    settings = {**MEMORY, **PLACEMENTS["gpu"], "offload_dir": str(tmp_path)}
    with LLM(str(folder / "model"), lora=folders, **settings) as llm:
        llm.prepare(prompts * 9, GREEDY)
        for name in ("a0", None, "a4", "a0", "a4", None):
            assert llm.generate(prompts[0], GREEDY, lora_request=name)[0].token_ids == wanted[name][0]
        prefixes = llm.runner.cache.pools["gpu"].prefixes
        assert sorted(key[0] for key in prefixes.pages if key[0] < 0) == [-6, -2, -1], "one beginning for each adapter"


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_adapters_beside_quantized_weights(bits, eight, tmp_path):
    folder, _, folders, prompts, _ = eight
    model = make_model("llama", tmp_path / "copy")
    for name in linear_modules(model):
        weight = model.get_submodule(name).weight
        group = weight_group(model.config.hidden_size)
        coder = ops.fit if bits == 4 else reference.quantize
        codes, parameters = coder(weight.data, bits, group)
        weight.data.copy_(reference.dequantize(codes, parameters, weight.shape[1], bits, group))
    names = ("a1", "a4", None)
    wanted = {name: tokens_of(model, prompts, folders.get(name)) for name in names}
    settings = {**MEMORY, **PLACEMENTS["mixed"], "offload_dir": str(tmp_path), "weight_bits": bits}
    with LLM(str(folder / "model"), lora=folders, **settings) as llm:
        assert run(llm, prompts, wanted) == []
    # The only one of a job is not merged into codes.
    with LLM(str(folder / "model"), lora={"a4": folders["a4"]}, lora_default="a4", **settings) as llm:
        assert run(llm, prompts, {None: wanted["a4"]}) == []
        assert llm.planner.deployment.adapters.merged is None


@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_speculation(draft, eight, tmp_path):
    """The draft runs without adapters; what it proposes is verified with the sequence's own."""
    folder, _, folders, prompts, wanted = eight
    name = draft if draft == "ngram" else str(folder / "model")
    settings = {**MEMORY, **PLACEMENTS["mixed"], "offload_dir": str(tmp_path), "draft": name, "tree": "chain:3"}
    with LLM(str(folder / "model"), lora=folders, **settings) as llm:
        assert run(llm, prompts, wanted) == []
        assert draft == "ngram" or llm.report()["speculation"]["accepted_tokens"] > 0


def test_decode_graphs(eight, tmp_path):
    """One graph serves passes with other adapters, with fewer sequences, and without any adapter."""
    folder, _, folders, prompts, wanted = eight
    settings = {**MEMORY, **PLACEMENTS["gpu"], "gpu_batch_size": 32}
    record = Recorder()
    with LLM(str(folder / "model"), lora=folders, **settings) as llm:
        for names in (None, ["a2", None, "a0"], [None], ["a7"]):
            llm.prepare(prompts * 9, GREEDY)
            executor = llm.runner.executor
            executor.graphs = executor.graphs or DecodeGraphs(
                torch.device("cpu"), 16, 512, record, 4, executor.builder.group_adapters
            )
            assert run(llm, prompts, wanted, names) == []
        llm.runner.check()
        assert sum(graph.replays for graph in record.made) > 10


def test_passes_in_pieces(eight, tmp_path):
    """The same of passes with prompts, of which few come at a time; those that were not used for longest go."""
    folder, _, folders, prompts, wanted = eight
    settings = {**MEMORY, **PLACEMENTS["gpu"], "gpu_batch_size": 3}
    record, kinds = Recorder(), set()
    with LLM(str(folder / "model"), lora=folders, **settings) as llm:
        for names in (None, ["a2", None, "a0"], [None], ["a7"], None):
            llm.prepare(prompts * 9, GREEDY)
            executor = llm.runner.executor
            if executor.pieces is None:
                executor.graphs = DecodeGraphs(torch.device("cpu"), 16, 512, record, 0)
                group = executor.builder.group_adapters
                executor.pieces = PieceGraphs(executor.halves, torch.device("cpu"), record, (32, 64, 128), group)
                executor.pieces.recording_passes = 2
            assert run(llm, prompts, wanted, names) == []
            llm.runner.check()
            kinds |= {adapters for _, adapters in executor.pieces.captured}
        assert kinds == {True, False} and len(executor.pieces.captured) == 3
        assert record.kept == 3 * (llm.arch.num_layers + 1) < len(record.made)
        assert executor.pieces.passes > 20


@pytest.mark.parametrize("placement", ["gpu", pytest.param("mixed", marks=pytest.mark.slow)])
def test_those_that_step_aside_come_back_with_their_adapter(placement, eight, tmp_path, monkeypatch):
    """Before every second pass somebody leaves the block, and its pages are gone: its tokens are read anew."""
    folder, _, folders, prompts, wanted = eight
    next_pass, times = Scheduler.next_pass, []

    def disturbed(scheduler):
        times.append(scheduler)
        if len(times) % 2 == 0 and len(scheduler.running) > 1:
            chosen = list(scheduler.running.values())[len(times) // 2 % len(scheduler.running)]
            scheduler.step_aside(chosen, drop=True)
        return next_pass(scheduler)

    monkeypatch.setattr(Scheduler, "next_pass", disturbed)
    settings = {**MEMORY, **PLACEMENTS[placement], "offload_dir": str(tmp_path)}
    with LLM(str(folder / "model"), lora=folders, **settings) as llm:
        assert run(llm, prompts, wanted) == []
        assert llm.report()["preemptions"]["recomputed_tokens"] > 0


@pytest.mark.parametrize("placement", SAMPLED)
def test_the_only_adapter_of_a_job_is_merged(placement, eight, tmp_path):
    """No pass knows of it then. Files of merged weights on the disk are not taken for those of others."""
    folder, _, folders, prompts, wanted = eight
    settings = {**MEMORY, **PLACEMENTS[placement], "offload_dir": str(tmp_path)}
    for name in ("a1", "a4", "a1"):
        with LLM(str(folder / "model"), lora={name: folders[name]}, lora_default=name, **settings) as llm:
            assert run(llm, prompts, {None: wanted[name], name: wanted[name]}) == []
            assert not any(each.spec.role.startswith("adapters.") for each in llm.weights.plan.all_tensors)
            with pytest.raises(ConfigurationError, match="merged into the weights"):
                llm.generate(prompts, GREEDY, lora_request=LoRARequest("a2", 2, str(folders["a2"])))
    with LLM(str(folder / "model"), **settings) as llm:
        assert run(llm, prompts, {None: wanted[None]}) == []


@pytest.mark.parametrize(
    "case",
    ["llama-tied", "bloom"]
    + [pytest.param(case, marks=pytest.mark.slow) for case in ("llama", "gpt2", "codegen", "falcon-40b", "phi3")],
)
def test_merging_embedding_head_and_fused_projections(case, tmp_path):
    """Where the table is the head as well, only one of both was trained: it is not merged, and right all the same."""
    model = make_model(case, tmp_path / "model")
    folder = write_adapter(tmp_path / "a", model, [*linear_modules(model, head=True), embedding(model)], seed=6)
    prompts = random_prompts([3, 20], seed=1)
    wanted = tokens_of(model, prompts, folder)
    with LLM(str(tmp_path / "model"), lora={"a": folder}, lora_default="a", **MEMORY, **PLACEMENTS["gpu"]) as llm:
        assert [each.token_ids for each in llm.generate(prompts, GREEDY)] == wanted
        assert (llm.planner.deployment.adapters.merged is None) == llm.arch.tie_word_embeddings


@pytest.mark.parametrize("case", ["opt-postnorm", "llama-tied"])
def test_adapters_of_nothing_but_the_ends(case, tmp_path):
    """Of the embedding, of its projections, of the head: no layer has any, and a chunk of logits has a few rows."""
    model = make_model(case, tmp_path / "model")
    ends = {"embed": [embedding(model)], "head": [linear_modules(model, head=True)[-1]]}
    ends["project"] = [name for name in linear_modules(model) if "project" in name]
    folders = {n: write_adapter(tmp_path / n, model, each, seed=8, strength=3.0) for n, each in ends.items() if each}
    prompts = random_prompts([2, 9], seed=3)
    wanted = {name: tokens_of(model, prompts, path) for name, path in {**folders, None: None}.items()}
    assert len(set(map(str, wanted.values()))) == len(wanted)
    with LLM(str(tmp_path / "model"), lora=folders, **MEMORY, **PLACEMENTS["cpu"]) as llm:
        llm.prepare(prompts * 4, GREEDY)
        builder = llm.runner.executor.builder
        llm.runner.executor.head.logit_rows = builder.logit_rows = 3
        assert run(llm, prompts, wanted) == []


@pytest.mark.parametrize("placement", SAMPLED)
def test_adapters_that_come_with_a_request(placement, eight, tmp_path):
    """As in vLLM: none is known when the engine is made, and more come after weights have been placed."""
    folder, _, folders, prompts, wanted = eight
    requests = {name: LoRARequest(name, i + 1, str(path)) for i, (name, path) in enumerate(folders.items())}
    settings = {**MEMORY, **PLACEMENTS[placement], "offload_dir": str(tmp_path)}
    with LLM(str(folder / "model"), enable_lora=True, max_lora_rank=256, **settings) as llm:
        assert run(llm, prompts, {None: wanted[None]}) == []
        for names in (["a0"], ["a0", None, "a4"], ["a1", "a2", "a0", None]):
            asked = [requests.get(name) for name in names]
            found = llm.generate([prompts[0]] * len(names), GREEDY, lora_request=asked)
            assert [each.token_ids for each in found] == [wanted[name][0] for name in names]
            llm.weights.check()
            llm.tiers.check()
        assert llm.generate(prompts[1], GREEDY, lora_request=requests["a2"])[0].token_ids == wanted["a2"][1]


def test_streams_steps_and_chats_name_adapters(eight, tmp_path):
    folder, _, folders, prompts, wanted = eight
    settings = {**MEMORY, **PLACEMENTS["gpu"]}
    names = ["a0", None, "a5"]
    with LLM(str(folder / "model"), lora=folders, lora_default="a6", **settings) as llm:
        items = [(name, prompts[0], GREEDY, None, name) for name in names] + [("unknown", prompts[0], GREEDY, 1, "b")]
        found = dict(llm.stream(iter(items)))
        assert "no adapter 'b'; known: a0, a1" in found.pop("unknown").error
        default = {**wanted, None: wanted["a6"]}
        assert {name: each.token_ids for name, each in found.items()} == {name: default[name][0] for name in names}
        conversation = [{"role": "user", "content": "x"}]
        template = "{{ messages[0]['content'] }}"
        plain = llm.generate("x", GREEDY, lora_request="a1")[0].token_ids
        assert llm.chat(conversation, GREEDY, chat_template=template, lora_request="a1")[0].token_ids == plain
        llm.add_request(prompts[1], GREEDY, "x", lora_request="a2")
        llm.add_request(prompts[1], GREEDY, "y")
        llm.add_request(prompts[1], GREEDY, "z", lora_request=LoRARequest("new", 9, str(folders["a1"])))
        llm.step()
        with pytest.raises(ConfigurationError, match="'late' is not loaded, and requests are waiting"):
            llm.add_request(prompts[1], GREEDY, "w", lora_request=LoRARequest("late", 9, str(folders["a1"])))
        done = {}
        while llm.has_unfinished():
            done.update({key: each.token_ids for key, each in llm.step()})
        assert done == {"x": wanted["a2"][1], "y": wanted["a6"][1], "z": wanted["a1"][1]}


WRONG = {
    "unknown name": ("b", "there is no adapter 'b'; known: a0"),
    "other folder": (LoRARequest("a0", 1, "elsewhere"), "the name 'a0' belongs to the adapter in"),
    "no adapter": (7, "lora_request is 7, of type int; give LoRARequest"),
    "too many": (["a0", "a0"], "2 lora_request for 1 prompts"),
    "no folder": (LoRARequest("new", 1, "/nowhere"), "adapter folder /nowhere does not exist"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_requests(what, eight):
    folder, _, folders, prompts, _ = eight
    value, message = WRONG[what]
    with (
        LLM(str(folder / "model"), lora={"a0": folders["a0"]}, **MEMORY, **PLACEMENTS["gpu"]) as llm,
        pytest.raises((ConfigurationError, CheckpointError), match=message),
    ):
        llm.generate([prompts[0]], GREEDY, lora_request=value)


SETTINGS = {
    "no name": ({"lora": "folder"}, "lora='folder' must be NAME=FOLDER"),
    "twice": ({"lora": ("a=x", "a=y")}, "the name 'a' stands there twice"),
    "default": ({"lora_default": "b"}, "lora_default='b' is none of the adapters that lora names: none"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_wrong_settings(what, eight):
    settings, message = SETTINGS[what]
    with pytest.raises(ConfigurationError, match=message):
        LLM(str(eight[0] / "model"), **MEMORY, **settings)


@pytest.mark.parametrize("placement", ["gpu", pytest.param("cpu", marks=pytest.mark.slow)])
def test_a_plan_counts_the_adapters(placement, eight, tmp_path):
    """The budget of its table is enough, and one that is too small for weights and adapters is refused."""
    folder, _, folders, prompts, wanted = eight
    tier = placement
    settings = {**MEMORY, **PLACEMENTS[placement], "offload_dir": str(tmp_path), "reserve": "all"}

    def needed(**more):
        with LLM(str(folder / "model"), **settings, **more) as llm:
            llm.prepare(prompts * 9, GREEDY)
            rows = llm.report()["memory"]
            assert llm.report()["peak_bytes"][tier] <= sum(row["num_bytes"] for row in rows if row["tier"] == tier)
            of_tier = [row for row in rows if row["tier"] == tier]
            weights = sum(row["num_bytes"] for row in of_tier if row["what"] == "weights")
            return sum(row["num_bytes"] for row in of_tier), weights

    (without, weights), (with_adapters, weights_with) = needed(), needed(lora=folders)
    files = sum(path.stat().st_size for each in folders.values() for path in each.glob("adapter_model*"))
    assert weights_with - weights > 0.9 * files and with_adapters - without >= weights_with - weights
    settings[f"{tier}_memory"] = with_adapters
    with LLM(str(folder / "model"), lora=folders, **settings) as llm:
        assert run(llm, prompts, wanted) == []
    settings[f"{tier}_memory"] = weights_with
    with pytest.raises(DoesNotFitError), LLM(str(folder / "model"), lora=folders, **settings) as llm:
        run(llm, prompts, wanted)


def test_peft_itself(tmp_path):
    """Folders that PEFT saves, and its own forward pass."""
    peft = pytest.importorskip("peft")
    prompts = random_prompts([3, 25], seed=2)
    folders, wanted = {}, {}
    for name, settings in {
        "linear": {"r": 4, "target_modules": "all-linear", "layers_to_transform": None},
        "regex": {"r": 6, "target_modules": r".*\.[02]\.self_attn\.(q|v)_proj", "use_rslora": True},
        "layers": {"r": 5, "target_modules": ["up_proj", "o_proj"], "layers_to_transform": [1]},
        "ends": {"r": 9, "target_modules": ["embed_tokens", "lm_head", "k_proj"], "alpha_pattern": {"lm_head": 40}},
    }.items():
        model = make_model("llama", tmp_path / "model")
        whole = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", lora_alpha=12, **settings))
        generator = torch.Generator().manual_seed(len(name))
        for key, parameter in whole.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        folders[name] = tmp_path / name
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


def test_a_fault_is_looked_for_with_the_adapter_that_has_it(tmp_path):
    """An adapter with an infinite number in layer 1 fails its own sequences, naming the layer, and nobody else's."""
    model = make_model("llama", tmp_path / "model")
    names = linear_modules(model)
    good, bad = (write_adapter(tmp_path / name, model, names, seed=3) for name in ("good", "bad"))
    tensors = load_file(bad / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = float("inf")
    save_file(tensors, bad / "adapter_model.safetensors")
    prompts = random_prompts([19, 20], seed=3)
    with LLM(str(tmp_path / "model"), lora={"good": good, "bad": bad}, **MEMORY, **PLACEMENTS["gpu"]) as llm:
        found = llm.generate([prompts[0], prompts[0], prompts[1]], GREEDY, lora_request=["bad", "good", None])
    assert "stop being finite in layer 1" in found[0].error
    wanted = [*tokens_of(model, prompts[:1], good), *tokens_of(model, prompts[1:], None)]
    assert [each.token_ids for each in found[1:]] == wanted
