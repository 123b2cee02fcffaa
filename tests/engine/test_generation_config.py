"""generation_config.json: without sampling settings of the user, greedy tokens are those of transformers' `generate`
with that file; the rest is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from flexbatch import LLM, SamplingParams
from flexbatch.models.checkpoint import CheckpointError, read_arch
from flexbatch.models.generation_config import NOTHING, GenerationDefaults, read_generation
from flexbatch.models.resolve import DEMO
from flexbatch.run import main as run
from flexbatch.speculative.tree import ROOT, TokenTree, TreeShape
from flexbatch.validation.errors import ConfigurationError
from tests.speculative.engines import Scripted, flags_of, rest_of
from tests.tiny_models import make_model, random_prompts

pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
NEW_TOKENS = 14
PROMPTS = [prompt * 3 for prompt in random_prompts([1, 2, 6, 11], seed=3)]
SETTINGS = {
    "gpu_batch_size": 2,
    "num_gpu_batches": 2,
    "gpu_memory": "1GiB",
    "cpu_memory": "1GiB",
    "device": "cpu",
    "percent": (100, 0, 100, 0, 100, 0),
}


class Model:
    """A tiny model that ends answers at tokens which it likes, transformers' answers, and engines without and with
    speculation."""

    def __init__(self, folder) -> None:
        self.folder = folder
        make_model("llama", folder)
        self.reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.liked = self.generate({}, PROMPTS[0])
        # EOS that plain answers reach, so that whatever puts off the end changes something.
        self.eos = sorted({self.generate({}, prompt)[5] for prompt in PROMPTS[:2]})
        self.write({})

    def write(self, content: dict) -> None:
        (self.folder / "generation_config.json").write_text(
            json.dumps({"eos_token_id": self.eos, "pad_token_id": 0, **content})
        )

    @torch.no_grad()
    def generate(self, content: dict, prompt: list[int]) -> list[int]:
        ids, config = torch.tensor([prompt]), dict(content)
        config.pop("do_sample", None)
        made = GenerationConfig(
            **{"max_new_tokens": NEW_TOKENS, "eos_token_id": getattr(self, "eos", None), "pad_token_id": 0, **config}
        )
        return self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=made, do_sample=False
        )[0, len(prompt) :].tolist()

    def wanted(self, content: dict) -> list[list[int]]:
        return [self.generate(content, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("generation"))


@pytest.fixture(scope="module")
def engines(model):
    """Plain, with n-gram lookup, and with trees that hold the right tokens beside wrong ones."""
    with (
        LLM(str(model.folder), **SETTINGS) as plain,
        LLM(str(model.folder), draft=("ngram",), tree="<2,2,1>", **SETTINGS) as looking,
        LLM(str(model.folder), draft=("ngram",), tree="<2,2,1>", **SETTINGS) as scripted,
    ):
        yield plain, looking, scripted


def tokens(llm: LLM, params: SamplingParams | None) -> list[list[int]]:
    found = [completion.token_ids for completion in llm.generate(PROMPTS, params)]
    llm.runner.check()
    return found


def check(model, engines, content: dict, chosen: tuple[int, ...] = (0, 1, 2)) -> list[list[int]]:
    """The chosen engines give what transformers gives; of trees, every node has to follow the rules of its own path."""
    wanted = model.wanted(content)
    params = GenerationDefaults("generation_config.json", content).params(max_tokens=NEW_TOKENS)

    def tree(sequence, depth):
        rest = rest_of(sequence, PROMPTS, wanted)
        if len(rest) < 3:
            return TokenTree()
        wrong = (rest[0] + 1) % 300
        return TokenTree((wrong, rest[0], rest[0], rest[1]), TreeShape((ROOT, ROOT, 0, 1)))

    engines[2].speculator.sources = [Scripted(tree)]
    for placement in chosen:
        assert tokens(engines[placement], params) == wanted, content
    return wanted


def cases(model) -> dict[str, dict]:
    """Every key alone, with values that change what this model says."""
    a, b, c, d = model.liked[:4]
    return {
        "repetition_penalty": {"repetition_penalty": 1.7},
        "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
        "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
        "suppress_tokens": {"suppress_tokens": [a, c, 5, 400_000]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [a, 9]},
        "bad_words_ids": {"bad_words_ids": [[a], [b, c], [PROMPTS[0][-1], b], [model.eos[0]]]},
        "min_new_tokens": {"min_new_tokens": 9},
        "min_new_tokens beyond the end": {"min_new_tokens": 90},
        "min_length": {"min_length": 12},
        "forced_bos_token_id": {"forced_bos_token_id": d},
        "forced_eos_token_id": {"forced_eos_token_id": 2, "min_new_tokens": 50},
        "forced_eos_token_id of several": {"forced_eos_token_id": [7, 2], "min_new_tokens": 50},
        "sequence_bias": {"sequence_bias": [[[a], -9.0], [[b, c], -30.0], [[5], 1.5]]},
        "max_new_tokens": {"max_new_tokens": 3},
        "temperature and the like": {
            "temperature": 0.3, "top_k": 3, "top_p": 0.4, "min_p": 0.2, "do_sample": False, "typical_p": 0.5,
            "renormalize_logits": True,
        },
        "everything": {
            "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [c], "begin_suppress_tokens": [a],
            "bad_words_ids": [[b, d], [d]],
            "min_new_tokens": 8, "forced_eos_token_id": 2, "sequence_bias": [[[b], 2.0], [[a, b], 3.0]],
            "max_new_tokens": 11,
        },
    }  # fmt: skip


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["by turns", "all"])
def test_every_key_alone_as_transformers(thorough, model, engines):
    """By turns: in one of the three engines, with several keys in each."""
    plain = model.wanted({})
    assert tokens(engines[0], SamplingParams(max_tokens=NEW_TOKENS, temperature=0)) == plain
    for turn, (name, content) in enumerate(cases(model).items()):
        wanted = check(model, engines, content, (0, 1, 2) if thorough else ((0, 2, 1, 2)[turn % 4],))
        if name not in ("temperature and the like", "forced_bos_token_id"):
            assert wanted != plain, f"{name} changes nothing here and proves nothing"


def test_the_first_token_is_forced_after_a_prompt_of_one(model, engines):
    for content in ({"forced_bos_token_id": 33}, {"forced_bos_token_id": 33, "begin_suppress_tokens": model.liked}):
        params = GenerationDefaults("", content).params(max_tokens=NEW_TOKENS)
        assert [c.token_ids for c in engines[0].generate([[17]], params)] == [model.generate(content, [17])]
        assert model.generate(content, [17])[0] == 33


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_combinations_as_transformers(data, model, engines):
    _drawn(data, model, engines)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_drawn_combinations_as_transformers(data, model, engines):
    _drawn(data, model, engines)


def _drawn(data, model, engines) -> None:
    token = st.sampled_from([*model.liked, *PROMPTS[2][:4], *model.eos, 9, 250])
    words = st.lists(st.lists(token, min_size=1, max_size=3), min_size=1, max_size=5)
    keys = {
        "repetition_penalty": st.sampled_from([0.6, 1.1, 2.5]),
        "no_repeat_ngram_size": st.integers(0, 5),
        "suppress_tokens": st.lists(token, max_size=4),
        "begin_suppress_tokens": st.lists(token, min_size=1, max_size=4),
        "bad_words_ids": words.filter(lambda found: any(len(word) > 1 or word[0] not in model.eos for word in found)),
        "min_new_tokens": st.integers(0, 20),
        "min_length": st.integers(0, 40),
        "forced_eos_token_id": st.one_of(st.just(2), st.just([2, 8])),
        "sequence_bias": words.flatmap(
            lambda found: st.tuples(
                *(st.tuples(st.just(word), st.floats(-8, 8, width=16)).map(list) for word in found)
            ).map(list)
        ),
        "max_new_tokens": st.integers(1, 18),
        "temperature": st.floats(0.1, 3),
        "top_k": st.integers(1, 60),
    }
    chosen = data.draw(st.lists(st.sampled_from(sorted(keys)), min_size=1, max_size=6, unique=True))
    content = {name: data.draw(keys[name], label=name) for name in chosen}
    if forced := content.get("forced_eos_token_id"):
        # Forced and suppressed tokens leave nothing: transformers goes on with token 0, the engine says so.
        content["suppress_tokens"] = [
            t for t in content.get("suppress_tokens", []) if t not in (forced if isinstance(forced, list) else [forced])
        ] or [301]
        content.pop("begin_suppress_tokens", None)
    if "temperature" in content:
        content["do_sample"] = False
    check(model, engines, content)


def test_the_file_counts_where_nothing_is_given(model, tmp_path, capsys):
    """`generate`, `stream`, one entry of a list, and the command without flags; a flag beats the file, key by key."""
    content = {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "max_new_tokens": 7}
    model.write(content)
    wanted = model.wanted(content)
    try:
        with LLM(str(model.folder), **SETTINGS) as llm:
            assert llm.get_default_sampling_params() == SamplingParams(
                max_tokens=7, temperature=0, repetition_penalty=1.6, no_repeat_ngram_size=2
            )
            assert tokens(llm, None) == wanted
            assert {
                key: completion.token_ids for key, completion in llm.stream((i, p, None) for i, p in enumerate(PROMPTS))
            } == dict(enumerate(wanted))
            longer = replace(llm.get_default_sampling_params(), max_tokens=9)
            assert tokens(llm, [None, longer, None, None])[0::2] == wanted[0::2]
        prompts = tmp_path / "prompts.json"
        prompts.write_text(json.dumps(PROMPTS))
        flags = ["--prompts", str(prompts), "--json"]
        assert run([*flags_of(model.folder, SETTINGS), *flags]) == 0
        assert [line["token_ids"] for line in json.loads(capsys.readouterr().out)["completions"]] == wanted
        fewer = {name: value for name, value in SETTINGS.items() if name != "num_gpu_batches"}
        assert run([*flags_of(model.folder, fewer), *flags, "--max-tokens", "5"]) == 0
        assert [line["token_ids"] for line in json.loads(capsys.readouterr().out)["completions"]] == model.wanted(
            {**content, "max_new_tokens": 5}
        )
        with LLM(str(model.folder), generation_config="none", **SETTINGS) as llm:
            assert llm.get_default_sampling_params() == SamplingParams(temperature=0)
    finally:
        model.write({})


@pytest.mark.parametrize(
    ("content", "temperature"),
    [
        ({}, 0.0), ({"top_k": 5}, 0.0), ({"do_sample": True}, 1.0), ({"do_sample": True, "temperature": 0.6}, 0.6),
        ({"temperature": 0.6}, 0.6),
        ({"do_sample": False, "temperature": 0.6}, 0.0), ({"do_sample": True, "temperature": 0.0}, 0.0),
    ],
)  # fmt: skip
def test_what_is_drawn(content, temperature):
    generation = GenerationDefaults("f", content)
    assert generation.params().temperature == temperature and generation.params({"temperature": 1.5}).temperature == 1.5
    assert generation.params(sample=True).temperature == (temperature or (0.0 if "do_sample" in content else 1.0))


def test_what_params_leave_out_is_told_once(model, caplog):
    model.write(
        {
            "repetition_penalty": 1.6,
            "temperature": 0.7,
            "do_sample": True,
            "num_beams": 2,
            "max_new_tokens": 7,
            "use_cache": True,
        }
    )
    try:
        with LLM(str(model.folder), **SETTINGS) as llm, caplog.at_level(logging.WARNING, "flexbatch"):
            for _ in range(2):
                llm.generate(PROMPTS, SamplingParams(max_tokens=3, temperature=0))
            (line,) = [record.getMessage() for record in caplog.records if "not applied" in record.getMessage()]
            assert (
                line.count("=") == 2
                and "repetition_penalty=1.6" in line
                and "num_beams=2" in line
                and str(model.folder) in line
            )
            caplog.clear()
            llm.generate(PROMPTS, SamplingParams(max_tokens=0))
            assert not caplog.records
            with pytest.raises(ConfigurationError, match=r"generation_config\.json asks for num_beams=2"):
                llm.generate(PROMPTS)
    finally:
        model.write({})


ASKING = {
    "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "constraints": [1], "force_words_ids": [[1]],
    "guidance_scale": 1.5,
    "encoder_repetition_penalty": 1.1, "encoder_no_repeat_ngram_size": 2, "exponential_decay_length_penalty": [5, 1.1],
    "token_healing": True,
    "dola_layers": "high", "watermarking_config": {}, "penalty_alpha": 0.6, "top_h": 0.4, "typical_p": 0.9,
    "epsilon_cutoff": 0.01, "eta_cutoff": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(NOTHING))
def test_what_cannot_be_followed_is_refused_by_name(key, tmp_path):
    def defaults(value, **more):
        (tmp_path / "generation_config.json").write_text(json.dumps({key: value, **more}))
        return read_generation(tmp_path)

    with pytest.raises(ConfigurationError, match=f"generation_config.json asks for {key}="):
        defaults(ASKING[key], do_sample=key != "penalty_alpha").params()
    for value in (None, *NOTHING[key]):
        assert defaults(value, do_sample=True).params() == SamplingParams()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"repetition_penalty": "much"}, "repetition_penalty='much'"), ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"suppress_tokens": 5}, "suppress_tokens=5"),
        ({"bad_words_ids": [5]}, "bad_words_ids="), ({"sequence_bias": {"5": 1.0}}, "sequence_bias="),
        ({"max_new_tokens": 2.5}, "json: max_new_tokens=2.5"), ({"stop_strings": [5]}, "json: stop_strings=[5]"),
        ({"num_return_sequences": 0}, "json: num_return_sequences=0"), ({"top_k": "a"}, "json: top_k='a'"),
        ({"min_new_tokens": -1}, "json: min_new_tokens=-1"), ([1], "holds a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_file_is_named_with_it(content, named, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        read_generation(tmp_path).params()
    assert named in str(error.value) and "generation_config.json" in str(error.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, '{"a":' * 100_000, "\ufeff{}", b"\xff", "null", "5", '"text"', '{"top_k": 1,}']
)
def test_a_file_that_is_none_is_named(content, tmp_path):
    (tmp_path / "generation_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"generation_config\.json (cannot be read as JSON|holds a)"):
        read_generation(tmp_path)


@pytest.mark.parametrize("value", ["0", True, 0.5, [[0]], {"a": 0}, ["0"]])
def test_a_wrong_end_token_is_named_with_its_file(value, tmp_path):
    config = json.loads((DEMO / "config.json").read_text())
    for generation, named in (({"eos_token_id": value}, "generation_config.json"), ({}, "config.json")):
        (tmp_path / "config.json").write_text(json.dumps(config if generation else {**config, "eos_token_id": value}))
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        with pytest.raises(CheckpointError, match=f": {named}: eos_token_id="):
            read_arch(tmp_path)


def test_a_model_without_the_file_has_no_settings(tmp_path):
    assert read_generation(tmp_path) == GenerationDefaults()


def test_a_token_outside_the_vocabulary_is_named(model, engines):
    with pytest.raises(ConfigurationError, match="prompt 0: bad_words_ids names token id 4000, outside"):
        engines[0].generate(PROMPTS, SamplingParams(bad_words_ids=[[5, 4000]]))


def test_samples_seeds_and_logprobs_keep_to_the_rules(model, engines):
    """Drawn tokens never break a rule, log-probabilities stay the model's, and speculation with matched noise changes
    nothing."""
    barred = list(range(0, 300, 2))
    params = SamplingParams(
        max_tokens=8,
        temperature=1.5,
        seed=5,
        n=3,
        logprobs=2,
        suppress_tokens=barred,
        no_repeat_ngram_size=1,
        bad_words_ids=[[3, 5]],
    )
    engines[2].speculator.sources = [
        Scripted(lambda sequence, depth: TokenTree((7, 9, 11), TreeShape((ROOT, ROOT, 0))))
    ]
    found = [llm.generate(PROMPTS, params) for llm in engines]
    for plain, *others in zip(*found, strict=True):
        for index, sample in enumerate(plain.samples):
            assert all(token % 2 for token in sample.token_ids if token < 300) and len(set(sample.token_ids)) == len(
                sample.token_ids
            )
            assert any(set(entry) & set(barred) for entry in sample.logprobs), (
                "log-probabilities are those of the model"
            )
            assert all(other.samples[index].token_ids == sample.token_ids for other in others)
