"""Text out of the engine, in the context of its prompt: generated, streamed and stopped alike, for prompts of every
form, samples, and drafted tokens."""

from __future__ import annotations

import dataclasses
import random
import shutil

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.text.decoder import common_length
from tests.text.kinds import KINDS, SPECIAL
from tests.tiny_models import make_model, random_prompts

DRAWN = SamplingParams(max_tokens=14, temperature=1.0, ignore_eos=True, seed=3)
SETTINGS = {"plain": {}, "drafted": {"draft": ("ngram",), "tree": "chain:4"}}
FAST = [("byte-level", "plain"), ("byte-fallback-llama", "drafted"), ("unigram-always", "drafted")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    make_model("llama", folder)
    return folder


def expected(tokenizer, prompt: list[int], answer: list[int], special: bool = False) -> str:
    before, whole = (tokenizer.decode(ids, skip_special_tokens=not special) for ids in (prompt, prompt + answer))
    return whole[common_length(before, whole) :]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param(kind, SETTINGS[name], id=f"{kind}-{name}", marks=() if (kind, name) in FAST else pytest.mark.slow)
        for kind in KINDS
        for name in SETTINGS
    ],
)
def test_text_is_that_of_prompt_and_answer_less_the_prompts(kind: str, settings: dict, model, tmp_path) -> None:
    shutil.copytree(model, tmp_path / "model")
    tokenizer = KINDS[kind]()
    tokenizer.save_pretrained(tmp_path / "model")
    size, chance = min(len(tokenizer), 307), random.Random(1)
    marked = tokenizer.convert_tokens_to_ids(SPECIAL)
    # a few tokens again and again, so that n-grams are found; special ones among them, which are drawn now and then
    few = [*chance.sample(range(size), 12), *marked]
    prompts = [
        *random_prompts([1, 5, 40], seed=2, vocab_size=size),
        [*marked[:1], *few, *few],
        {"prompt_token_ids": few * 3},
        "the cats sat at",
        {"prompt": "at"},
    ]
    bias = {token: 12.0 for token in few}
    params = [
        dataclasses.replace(DRAWN, n=1 + index % 3, logit_bias=bias if index > 2 else None)
        for index in range(len(prompts))
    ]
    where = {
        "percent": (100, 0, 100, 0, 100, 0),
        "gpu_batch_size": 4,
        "num_gpu_batches": 2,
        "gpu_memory": "1GiB",
        "cpu_memory": "1GiB",
    }
    with LLM(
        str(tmp_path / "model"), device="cpu", dtype="float32", offload_dir=str(tmp_path), **where, **settings
    ) as llm:
        plain = llm.generate(prompts, params)
        for done in plain:
            assert (
                type(done.prompt_token_ids) is type(done.token_ids) is list and done.prompt_token_ids + done.token_ids
            )
            for sample in done.samples or [done]:
                assert sample.text == expected(llm.tokenizer, sample.prompt_token_ids, sample.token_ids)
        assert [done.prompt for done in plain[-2:]] == ["the cats sat at", "at"]
        stopped = []
        for done, each in zip(plain, params, strict=True):
            spelled = expected(llm.tokenizer, done.prompt_token_ids, done.token_ids, special=True)
            spelled = max(spelled.split("\ufffd"), key=len)  # the longest part of whole characters
            begin = min(len(spelled) - 1, chance.randrange(4))
            stops = [stop for stop in (spelled[begin : begin + 3], spelled[5:9] + "~", "<|im_end|>") if stop]
            stopped.append(dataclasses.replace(each, stop=stops))
        heard: dict[int, str] = dict.fromkeys(range(len(prompts)), "")

        def hear(key, text: str) -> None:
            assert text
            heard[key] += text

        found = dict(llm.stream(zip(range(len(prompts)), prompts, stopped, strict=True), hear))
    assert heard == {key: done.text for key, done in found.items()}
    assert sum(done.stop_reason is not None for done in found.values()) >= 3
    for key, done in found.items():
        for sample, whole in zip(done.samples or [done], plain[key].samples or [plain[key]], strict=True):
            assert sample.token_ids == whole.token_ids[: len(sample.token_ids)]
            assert expected(tokenizer, sample.prompt_token_ids, sample.token_ids).startswith(sample.text)
            if sample.stop_reason is not None:
                assert sample.stop_reason in expected(
                    tokenizer, sample.prompt_token_ids, sample.token_ids, special=True
                ) + expected(tokenizer, sample.prompt_token_ids, sample.token_ids)
