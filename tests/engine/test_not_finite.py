"""NaN and infinity: the request that meets them has an error that says where they begin, and nobody else notices."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexbatch import LLM, SamplingParams
from flexbatch.execution import diagnosis
from flexbatch.run import main as run
from flexbatch.speculative.tree import ROOT, TokenTree, TreeShape
from flexbatch.validation.errors import ConfigurationError
from tests.speculative.engines import PLACEMENTS, Scripted, engine, flags_of, rest_of
from tests.tiny_models import VOCAB, make_model, random_prompts

POISON = 77
"""A token whose embedding is NaN, in the models that have one."""
SHARED = [token if token != POISON else 5 for token in random_prompts([40], seed=9)[0]]
CLEAN = [[token if token != POISON else 5 for token in prompt] for prompt in random_prompts([3, 17, 66], seed=4)] + [
    [*SHARED, 9, 8],
    [*SHARED, 10, 11, 12],
]
POISONED = [[*SHARED, POISON, 4, 5], [POISON], [*CLEAN[2], POISON]]
PROMPTS = [POISONED[0], CLEAN[3], CLEAN[0], POISONED[1], CLEAN[1], CLEAN[4], POISONED[2], CLEAN[2]]
BAD = [prompt in POISONED for prompt in PROMPTS]
KINDS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "seed": 3, "suppress_tokens": [POISON]},
    "logprobs": {"temperature": 0.0, "logprobs": 2, "repetition_penalty": 1.2},
    "restricted": {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 1, "logit_bias": {POISON: -math.inf}},
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """name -> folder of a model with a fault."""
    sound = tmp_path_factory.mktemp("sound")
    make_model("llama", sound)

    def make(change, name: str):
        folder = tmp_path_factory.getbasetemp() / f"broken {name}"
        if not folder.exists():
            model = AutoModelForCausalLM.from_pretrained(sound, dtype=torch.float32)
            with torch.no_grad():
                change(model)
            model.save_pretrained(folder)
            for file in sound.glob("token*"):
                shutil.copy(file, folder)
        return folder

    return make


def poison(model) -> None:
    model.model.embed_tokens.weight[POISON] = math.nan


def start(folder, tmp_path, placement: str = "gpu", **settings) -> LLM:
    return engine(folder, tmp_path, placement, **{"prefill_chunk": 24, **settings})


def outcome(completions) -> list:
    return [completion.token_ids if not completion.error else None for completion in completions]


@pytest.mark.parametrize(
    ("placement", "draft", "kinds"),
    [
        pytest.param("gpu", ("ngram",), ["greedy"]),
        pytest.param("cpu", None, ["sampled"]),
        pytest.param("disk", None, ["logprobs"]),
        pytest.param("mixed", ("ngram",), ["restricted"]),
        *(
            pytest.param(placement, draft, list(KINDS), marks=pytest.mark.slow)
            for placement in PLACEMENTS
            for draft in (None, ("ngram",))
        ),
    ],
    ids=str,
)
def test_only_the_request_that_meets_it_fails(placement, draft, kinds, broken, tmp_path):
    """Prompts that begin alike share pages; the poison of one makes NaN of masked places before it, too, and so of what
    the others read."""
    folder = broken(poison, "embedding")
    with start(folder, tmp_path, placement, draft=draft) as llm:
        for kind in kinds:
            more = KINDS[kind]
            params = SamplingParams(max_tokens=6, ignore_eos=True, **more)
            completions = llm.generate(PROMPTS, params)
            llm.runner.check()
            assert [completion.finish_reason == "error" for completion in completions] == BAD, kind
            for index, completion in enumerate(completions):
                if BAD[index]:
                    assert (
                        completion.error.startswith(f"prompt {index}: ")
                        and "before layer 0" in completion.error
                        and completion.token_ids == []
                    )
            again = (
                [llm.generate([prompt], params)[0] for prompt, bad in zip(PROMPTS, BAD, strict=True) if not bad]
                if "seed" not in more or draft is None
                else []
            )
            assert all(
                one.token_ids == completion.token_ids
                for one, completion in zip(again, (c for c in completions if not c.error), strict=False)
            ), kind
        streamed = dict(
            llm.stream(
                (index, prompt, SamplingParams(max_tokens=3, temperature=0)) for index, prompt in enumerate(PROMPTS)
            )
        )
        assert [streamed[index].finish_reason == "error" for index in range(len(PROMPTS))] == BAD


@pytest.mark.parametrize("placement", ["gpu", "mixed"])
def test_scored_prompts(placement, broken, tmp_path):
    with start(broken(poison, "embedding"), tmp_path, placement) as llm:
        completions = llm.generate(PROMPTS, SamplingParams(max_tokens=0, prompt_logprobs=1))
        # The last token of a prompt is predicted and not read, so that its own embedding does not matter.
        assert [completion.finish_reason == "error" for completion in completions] == [
            bad and prompt[-1] != POISON for bad, prompt in zip(BAD, PROMPTS, strict=True)
        ]
        for completion in completions:
            if not completion.error:
                assert all(
                    math.isfinite(entry.logprob) for step in completion.prompt_logprobs[1:] for entry in step.values()
                )
        assert "logits for prompt token" in completions[0].error
        llm.runner.check()


LAYERS = {
    "layer 0": (
        lambda model: model.model.layers[0].self_attn.q_proj.weight[0].fill_(math.nan),
        "stop being finite in layer 0 ",
    ),
    "layer 1": (
        lambda model: model.model.layers[1].mlp.down_proj.weight[3, 4].fill_(math.inf),
        "stop being finite in layer 1 ",
    ),
    "layer 2": (
        lambda model: model.model.layers[2].input_layernorm.weight[7].fill_(math.nan),
        "stop being finite in layer 2 ",
    ),
    "norm": (lambda model: model.model.norm.weight[0].fill_(math.nan), "final norm or the output head"),
    "head": (lambda model: model.lm_head.weight[5].fill_(math.inf), "final norm or the output head"),
}


@pytest.mark.parametrize("where", LAYERS)
def test_the_layer_of_doubt_is_named(where, broken, tmp_path):
    change, said = LAYERS[where]
    for settings in (
        {},
        {"placement": "mixed", "weight_bits": 8 if where == "layer 1" else 16},
        {"draft": ("ngram",), "overlap": False},
    ):
        with start(broken(change, where), tmp_path, **settings) as llm:
            for completion in llm.generate(CLEAN, SamplingParams(max_tokens=4, temperature=0)):
                assert completion.finish_reason == "error" and said in completion.error, completion.error
            llm.runner.check()


def test_float16_overflow(broken, tmp_path):
    """Values that float32 holds and float16 does not: infinity there, a remedy in the error, and the right tokens in
    float32."""

    def grow(model) -> None:
        model.model.layers[1].mlp.down_proj.weight *= 3e4

    with start(broken(grow, "large"), tmp_path, dtype="float16") as llm:
        completions = llm.generate(
            CLEAN, [SamplingParams(max_tokens=3, temperature=0.0 if i % 2 else 1.0, seed=1) for i in range(len(CLEAN))]
        )
    assert all(
        "in layer 1 " in completion.error and "65504 of float16: try --dtype bfloat16 or float32" in completion.error
        for completion in completions
    )
    with start(broken(grow, "large"), tmp_path, dtype="float32") as llm:
        assert not any(
            completion.error for completion in llm.generate(CLEAN, SamplingParams(max_tokens=3, temperature=0))
        )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_drafted_token_that_is_poison_breaks_nothing(placement, broken, tmp_path):
    folder = broken(poison, "embedding")
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, suppress_tokens=[POISON])
    with start(folder, tmp_path, placement) as llm:
        plain = outcome(llm.generate(CLEAN, params))
    with start(folder, tmp_path, placement, draft=("ngram",), tree="<2,1,1>") as llm:

        def tree(sequence, depth):
            rest = rest_of(sequence, CLEAN, plain)
            return TokenTree((POISON, rest[0], POISON), TreeShape((ROOT, ROOT, 1))) if rest else TokenTree()

        llm.speculator.sources = [Scripted(tree)]
        assert outcome(llm.generate(CLEAN, params)) == plain
        llm.speculator.check()
        llm.runner.check()


@pytest.mark.parametrize("sampling", ["matched", "independent", "without-replacement"])
def test_a_draft_of_nan_breaks_nothing(sampling, broken, tmp_path):
    """A draft that is NaN throughout proposes nothing."""

    def spoil(model) -> None:
        model.model.norm.weight.fill_(math.nan)

    good = broken(lambda model: None, "not at all")
    for params in (SamplingParams(max_tokens=5, temperature=0), SamplingParams(max_tokens=5, temperature=0.9, seed=2)):
        with start(good, tmp_path) as llm:
            plain = outcome(llm.generate(CLEAN, params))
        with start(good, tmp_path, draft=(str(broken(spoil, "draft")),), tree="<2,2>", draft_sampling=sampling) as llm:
            assert outcome(llm.generate(CLEAN, params)) == plain
            llm.speculator.check()


@pytest.mark.parametrize("sampling", ["independent", "without-replacement"])
def test_a_target_of_nan_with_a_sound_draft(sampling, broken, tmp_path):
    with start(
        broken(*LAYERS["layer 1"][:1], "layer 1"),
        tmp_path,
        draft=(str(broken(lambda model: None, "not at all")),),
        tree="<2,2>",
        draft_sampling=sampling,
    ) as llm:
        for completion in llm.generate(CLEAN, SamplingParams(max_tokens=4, temperature=0.9)):
            assert "stop being finite in layer 1 " in completion.error
        llm.speculator.check()


@pytest.mark.parametrize("draft", [None, ("ngram",)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1e39, 1e300])
def test_barred_tokens_are_never_drawn(temperature, draft, broken, tmp_path):
    """Where bias leaves nothing the request fails by itself, at the first token or at a later one; where it leaves one,
    that one is drawn."""
    everything = {token: -math.inf for token in range(VOCAB)}
    two = [token for token in range(3, VOCAB) if token not in CLEAN[3]][:2]
    few = {token: -math.inf for token in range(VOCAB) if token not in two}
    common = {"temperature": temperature, "max_tokens": 4, "logprobs": 1, "seed": 1}
    params = [
        SamplingParams(logit_bias=everything, **common),
        SamplingParams(suppress_tokens=range(VOCAB), **common),
        SamplingParams(logit_bias=few, **common),
        SamplingParams(logit_bias=few, no_repeat_ngram_size=1, **common),
        SamplingParams(logit_bias={two[0]: 2.0}, **{**common, "max_tokens": 3}),
    ]
    with start(broken(lambda model: None, "not at all"), tmp_path, draft=draft) as llm:
        completions = llm.generate(CLEAN, params)
        llm.runner.check()
    assert [completion.finish_reason for completion in completions] == ["error", "error", "length", "error", "length"]
    for index, placement in ((0, 1), (1, 1), (3, 3)):
        assert (
            completions[index].error == f"prompt {index}: bias, suppressed words and other constraints bar every token "
            f"as generated token {placement}"
        )
    assert set(completions[2].token_ids) <= set(two) and all(
        math.isfinite(e.logprob) for step in completions[2].logprobs for e in step.values()
    )


def test_a_failed_sample_stands_for_its_prompt(broken, tmp_path):
    """Of twelve samples some draw the poison and fail."""
    with start(broken(poison, "embedding"), tmp_path) as llm:
        params = SamplingParams(
            max_tokens=2,
            temperature=3.0,
            n=12,
            seed=0,
            logit_bias={token: 40.0 for token in (POISON, 9, 10, 11)},
            ignore_eos=True,
        )
        (completion,) = llm.generate([CLEAN[0]], params)
        failed = [sample.finish_reason == "error" for sample in completion.samples]
        assert any(failed) and not all(failed) and len(failed) == 12
        assert (
            completion.error == completion.samples[failed.index(True)].error
            and f"prompt 0, sample {failed.index(True)}: " in completion.error
        )


def test_without_free_pages_the_layer_stays_unknown(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis, "opened", lambda sequences, batcher: [])
    with start(broken(poison, "embedding"), tmp_path) as llm:
        (completion,) = llm.generate([POISONED[0]], SamplingParams(max_tokens=2))
        assert "no cache pages were free" in completion.error
        llm.runner.check()


def test_the_command_ends_with_row_errors(broken, tmp_path, capsys):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    settings = {"device": "cpu", "gpu_memory": "1GiB", "cpu_memory": "1GiB", "percent": PLACEMENTS["gpu"]}
    flags = flags_of(broken(poison, "embedding"), {**settings, "gpu_batch_size": 3, "num_gpu_batches": 2})
    assert run([*flags, "--prompts", str(prompts), "--json", "--max-tokens", "2"]) == 3
    lines = json.loads(capsys.readouterr().out)["completions"]
    assert ["error" in line for line in lines] == BAD and [line["finish_reason"] == "error" for line in lines] == BAD


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_tokens": 3}, r"sampling_params is \{'max_tokens': 3\}, a dict; give SamplingParams\(\*\*settings\)"),
        ("max_tokens=3", "sampling_params is 'max_tokens=3', a str; give SamplingParams"),
        (5, "sampling_params is 5, a int; give SamplingParams"),
        ([SamplingParams()] * 4, "4 sampling parameters for 5 prompts"),
        ([SamplingParams(), {"n": 1}, None, None, None], r"sampling_params\[1\] is \{'n': 1\}, a dict"),
    ],
)
def test_what_is_no_sampling_params_is_named(given, said, broken, tmp_path):
    with start(broken(lambda model: None, "not at all"), tmp_path) as llm:
        with pytest.raises(ConfigurationError, match=said):
            llm.generate(CLEAN, given)
        if isinstance(given, dict):
            found = dict(llm.stream([(0, CLEAN[0], given), (1, CLEAN[1], SamplingParams(max_tokens=1))]))
            assert (
                found[0].finish_reason == "error" and "a dict" in found[0].error and found[1].finish_reason == "length"
            )
