"""What vLLM users type, and get: sampling parameters, results, chats, and calls that draw anew. Against transformers,
or against what the words mean."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList

from flexbatch import LLM, SamplingParams
from flexbatch.planner.vllm_keywords import engine_settings
from flexbatch.request import CompletionOutput
from flexbatch.text.chat import ChatPrompt
from flexbatch.text.prompts import PromptError
from flexbatch.validation.errors import ConfigurationError
from tests.tiny_models import EOS, VOCAB, greedy_tokens, make_model, make_tokenizer, random_prompts

PROMPTS = ["def add(a, b):", "the cat sat on", "import os\n", "größer 🙂 than"]
TEMPLATE = """{{ bos_token }}{% if tools %}tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}
{% endif %}{% if short %}be short
{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor -%}
{% if add_generation_prompt %}<assistant>{% endif %}"""
CHAT = [{"role": "user", "content": "hello there"}]
HALF = [*CHAT, {"role": "assistant", "content": "well, it"}]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("look", "listen")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names") / "model"
    make_model("llama", folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def start(folder, **settings):
    fixed = {"device": "cpu", "percent": (100, 0, 100, 0, 100, 0), "gpu_batch_size": 4, "num_gpu_batches": 2}
    return LLM(str(folder), **{**fixed, **settings})


@pytest.fixture(scope="module")
def llm(folder):
    with start(folder) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer(llm):
    return llm.get_tokenizer()


def greedy(llm, prompts, **params):
    return llm.generate(prompts, SamplingParams(**{"max_tokens": 10, "temperature": 0, "ignore_eos": True, **params}))


def test_bad_words_are_those_of_transformers_at_the_beginning_and_after_a_space(llm, model, tokenizer):
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        plain = greedy_tokens(model, ids, 10, eos_token_id=None)
        # Words of one token and of several, with a space before them and without, that would come at once.
        words = [tokenizer.decode(plain[:1]), tokenizer.decode(plain[2:4]), "zq word"]
        words = [word for word in words if word.strip() and "�" not in word]
        barred = {
            tuple(tokenizer(start + word.lstrip(), add_special_tokens=False)["input_ids"])
            for word, start in itertools.product(words, ("", " "))
        }
        wanted = greedy_tokens(model, ids, 10, eos_token_id=None, bad_words_ids=[list(each) for each in barred])
        (found,) = greedy(llm, prompt, bad_words=words)
        assert found.token_ids == wanted
        text = [*ids, *found.token_ids]
        assert not any(tuple(text[i : i + len(each)]) == each for each in barred for i in range(len(ids), len(text)))


def test_a_bad_word_bars_both_of_its_spellings(llm, tokenizer):
    encoder = llm.planner.encoder
    params = encoder.with_tokens(0, SamplingParams(bad_words=["ab", "  cd", "ab"], bad_words_ids=[[7]]))
    spelled = [tuple(tokenizer(word)["input_ids"]) for word in ("ab", " ab", "cd", " cd")]
    assert params.bad_words_ids == ((7,), *spelled)
    with pytest.raises(PromptError, match="bad word '  ' has no token of its own"):
        greedy(llm, "x", bad_words=["  "])


def test_only_allowed_tokens_come_and_they_come_as_if_the_others_were_not(llm, model, tokenizer):
    allowed = [5, 9, 40, 41, 42, 200, 300]

    def only(ids, scores):
        barred = torch.ones(VOCAB, dtype=torch.bool)
        barred[allowed] = False
        return scores.masked_fill(barred, -torch.inf)

    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        wanted = greedy_tokens(model, ids, 10, eos_token_id=None, logits_processor=LogitsProcessorList([only]))
        (found,) = greedy(llm, prompt, allowed_token_ids=allowed)
        assert found.token_ids == wanted
    drawn = SamplingParams(
        max_tokens=30, temperature=1.5, allowed_token_ids=allowed, n=4, repetition_penalty=1.3, logit_bias={3: 50.0}
    )
    for each in llm.generate(PROMPTS, drawn):
        assert {token for output in each.outputs for token in output.token_ids} <= set(allowed)
    with pytest.raises(PromptError, match=f"allowed_token_ids names token id {VOCAB}, outside"):
        greedy(llm, "x", allowed_token_ids=[5, VOCAB])


def test_nothing_is_left_where_bias_bars_what_is_allowed(llm):
    (found,) = greedy(llm, "x", allowed_token_ids=[5], logit_bias={5: float("-inf")})
    assert found.finish_reason == "error" and "bar every token" in found.error


def test_drafts_change_no_token_of_allowed_ones_and_bad_words(folder, llm):
    params = [
        SamplingParams(max_tokens=12, temperature=0.0, allowed_token_ids=[5, 9, 40, 41], ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=1.0, seed=3, allowed_token_ids=[5, 9, 40, 41], ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.0, bad_words=["ab", "e"], ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.0, logprobs=-1, ignore_eos=True),
    ]
    prompts = [[5, 9, 40] * 6] * 3 + [[7, 8] * 5]
    wanted = llm.generate(prompts, params)
    with start(folder, draft="ngram", tree="chain:3") as drafting:
        found = drafting.generate(prompts, params)
        assert drafting.report()["speculation"]["drafted_tokens"] > 0
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert [len(entries) for entries in found[3].logprobs] == [VOCAB] * 12


def test_min_tokens_bars_eos_and_stop_tokens_until_then(llm, model):
    prompts = random_prompts([9] * 5, seed=5)
    for prompt in prompts:
        free = greedy_tokens(model, prompt, 3, eos_token_id=None)
        stops = [EOS, free[0], free[1]]
        wanted = greedy_tokens(model, prompt, 12, eos_token_id=stops, min_new_tokens=5)
        (found,) = greedy(llm, [prompt], max_tokens=12, ignore_eos=False, stop_token_ids=stops[1:], min_tokens=5)
        assert found.token_ids == wanted and len(found.token_ids) >= 5
        assert not set(found.token_ids[:5]) & set(stops)


@torch.no_grad()
def test_logprobs_of_the_whole_vocabulary(llm, model):
    (prompt,) = random_prompts([12], seed=8)
    (found,) = greedy(llm, [prompt], max_tokens=3, logprobs=-1, prompt_logprobs=-1)
    logits = model(torch.tensor([prompt + found.token_ids])).logits[0].log_softmax(-1)
    placements = [*found.prompt_logprobs[1:], *found.logprobs]
    assert found.prompt_logprobs[0] is None and len(placements) == 14
    for position, (entries, following) in enumerate(zip(placements, (prompt + found.token_ids)[1:], strict=True)):
        assert sorted(entries) == list(range(VOCAB)) and next(iter(entries)) == following
        values = torch.tensor([entries[token].logprob for token in range(VOCAB)])
        torch.testing.assert_close(values, logits[position], atol=1e-4, rtol=0)
        ranks = [entries[token].rank for token in logits[position].argsort(descending=True).tolist()]
        assert sorted(ranks) == list(range(1, VOCAB + 1))
    total = sum(logits[11 + i, token].item() for i, token in enumerate(found.token_ids))
    assert found.outputs[0].cumulative_logprob == pytest.approx(total, abs=1e-3)
    tokenizer = llm.get_tokenizer()
    assert {t: e.decoded_token for t, e in found.logprobs[0].items()} == {
        t: tokenizer.decode([t]) for t in range(VOCAB)
    }


def test_the_text_holds_special_tokens_and_what_ended_it_on_request(llm, model, tokenizer):
    """Forced token by token, so that the text is known: a special token amid it, then a stop string, stop token or
    EOS."""
    middle, end = tokenizer("ab")["input_ids"], tokenizer("yz!")["input_ids"]
    special = tokenizer.convert_tokens_to_ids("<s>")
    cases = [
        ([*middle, special, *end], {"stop": "z!"}, "z!", "ab<s>yz!", "ab<s>y"),
        ([*middle, special, *end], {"stop": "b<s>y"}, "b<s>y", None, None),
        ([*middle, special, *end], {"stop_token_ids": end[-1:]}, end[-1], "ab<s>yz!", "ab<s>yz"),
        ([*middle, special, *middle, EOS], {}, None, "ab<s>ab</s>", "ab<s>ab"),
        ([*middle, special, *middle], {"max_tokens": 3}, None, "ab<s>ab", "ab<s>ab"),
    ]
    prompt = tokenizer("say ")["input_ids"]
    for script, params, reason, whole, without in cases:
        biases = [((*prompt[-1:], *script[:index], token), 500.0) for index, token in enumerate(script)]
        for keep, skip in itertools.product((False, True), (False, True)):
            settings = {"ignore_eos": False, "max_tokens": 9, "sequence_bias": biases, **params}
            (found,) = greedy(llm, [prompt], include_stop_str_in_output=keep, skip_special_tokens=skip, **settings)
            assert found.token_ids == script[: len(found.token_ids)] and found.outputs[0].stop_reason == reason
            shown = found.outputs[0].text
            if whole is None:  # the stop string begins before the special token and ends behind it
                wanted = {(0, 0): "a", (0, 1): "a", (1, 0): "ab<s>y", (1, 1): "aby"}[keep, skip]
            else:
                wanted = whole if keep or (reason is None and params) else without
                wanted = wanted.replace("<s>", "").replace("</s>", "") if skip else wanted
            assert shown == wanted, (params, keep, skip)
            pieces: list[str] = []
            request = SamplingParams(
                temperature=0, include_stop_str_in_output=keep, skip_special_tokens=skip, **settings
            )
            llm.add_request(prompt, request, on_text=pieces.append)
            while llm.has_unfinished():
                llm.step()
            assert "".join(pieces) == shown, "as it comes"


def test_no_text_is_made_where_none_is_wanted(llm):
    wanted = greedy(llm, PROMPTS)
    found = greedy(llm, PROMPTS, detokenize=False, logprobs=0)
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert all(each.text == "" and each.prompt == prompt for each, prompt in zip(found, PROMPTS, strict=True))
    assert found[0].logprobs[0][found[0].token_ids[0]].decoded_token is None


@pytest.mark.parametrize("keep", [1, 3, 5, 400, -1])
def test_a_prompt_may_be_cut_to_its_last_tokens(folder, keep):
    ids = random_prompts([30], seed=2)[0]
    with start(folder, max_model_len=20) as llm:
        assert llm.arch.context == 20
        if keep == 400:
            with pytest.raises(PromptError, match="prompt 0: has 30 tokens; the model's context of 20 allows 19"):
                greedy(llm, [ids], truncate_prompt_tokens=keep)
            return
        (found,) = greedy(llm, [ids], truncate_prompt_tokens=keep, max_tokens=6)
        kept = 14 if keep == -1 else keep
        assert found.prompt_token_ids == ids[-kept:] and len(found.token_ids) == 6
        (whole,) = greedy(llm, [ids[-kept:]], max_tokens=6)
        assert found.token_ids == whole.token_ids
        (rest,) = greedy(llm, [ids], truncate_prompt_tokens=-1, max_tokens=None)
        assert rest.prompt_token_ids == ids[-19:] and len(rest.token_ids) == 1


def test_bos_before_a_text_stays_when_it_is_cut(folder, tmp_path):
    tokenizer = make_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(tmp_path / "bos")
    with start(folder, tokenizer=tmp_path / "bos") as llm:
        ids = llm.get_tokenizer()("hello world")["input_ids"]
        assert ids[0] == 1
        (text, plain) = greedy(llm, ["hello world", ids], truncate_prompt_tokens=4)
        assert text.prompt_token_ids == [1, *ids[-3:]] and plain.prompt_token_ids == ids[-4:]


def test_results_have_the_names_of_vllm(llm):
    params = SamplingParams(max_tokens=5, n=3, temperature=1.0, seed=1, logprobs=1)
    one, two = llm.generate(["ab", [5, 6]], [params, SamplingParams(max_tokens=0)])
    assert (one.prompt, two.prompt, two.prompt_token_ids, one.finished) == ("ab", None, [5, 6], True)
    assert [output.index for output in one.outputs] == [0, 1, 2] and int(two.request_id) == int(one.request_id) + 1
    for output, sample in zip(one.outputs, one.samples, strict=True):
        assert isinstance(output, CompletionOutput)
        assert (output.text, output.token_ids, output.finish_reason) == (sample.text, sample.token_ids, "length")
        assert output.cumulative_logprob == pytest.approx(
            sum(entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True))
        )
    assert (one.text, one.token_ids) == (one.outputs[0].text, one.outputs[0].token_ids)
    assert [output.cumulative_logprob for output in two.outputs] == [None]
    assert (llm.add_request("x", SamplingParams(max_tokens=1), "mine"), llm.step()[0][1].request_id) == ("mine", "mine")
    streamed = dict(llm.stream([("a", "x", params), ("b", "", params)]))
    assert {key: each.request_id for key, each in streamed.items()} == {"a": "a", "b": "b"} and streamed["b"].error


def drawn(completions):
    return [[output.token_ids for output in each.outputs] for each in completions]


def test_two_calls_draw_anew_and_a_seeded_engine_draws_the_same_again(folder):
    params = SamplingParams(max_tokens=12, temperature=1.0, n=2, ignore_eos=True)
    items = [(0, PROMPTS[0], params), (1, PROMPTS[1], params)]

    def calls(llm):
        found = [drawn(llm.generate(PROMPTS[:2], params)) for _ in range(2)]
        found += [drawn(dict(sorted(llm.stream(items), key=lambda pair: pair[0])).values()) for _ in range(2)]
        llm.prepare(PROMPTS[:2], params)  # draws nothing
        for prompt in PROMPTS[:2]:
            llm.add_request(prompt, params)
        stepped = {}
        while llm.has_unfinished():
            stepped |= dict(llm.step())
        return [*found, drawn(stepped[key] for key in sorted(stepped)), drawn(llm.chat([CHAT], params))]

    with start(folder, seed=4) as first, start(folder, seed=4, gpu_batch_size=3) as second:
        found = calls(first)
        assert found == calls(second), "the same calls of another engine, in other blocks"
        answers = [str(answer) for call in found for each in call for answer in each]
        assert len(set(answers)) == len(answers), "no call repeats another, nor a sample another sample"
        seeded = SamplingParams(max_tokens=12, temperature=1.0, seed=9)
        assert drawn(first.generate(PROMPTS, seeded)) == drawn(second.generate(PROMPTS, seeded))
        assert drawn(first.generate(PROMPTS, seeded)) == drawn(first.generate(PROMPTS, seeded))
        # The rest of a job draws what it would have drawn, whatever the engine did before.
        whole = drawn(first.generate(PROMPTS, params, first_index=0))
        assert drawn(second.generate(PROMPTS[2:], params, first_index=2)) == whole[2:] != whole[:2]
    with start(folder, seed=5) as other:
        assert drawn(other.generate(PROMPTS[:2], params)) != found[0]


@pytest.mark.parametrize(
    ("messages", "options", "applied"),
    [
        (CHAT, {}, {"add_generation_prompt": True}),
        (HALF, {}, {"add_generation_prompt": True}),
        (HALF, {"continue_final_message": True}, {"continue_final_message": True}),
        (HALF, {"add_generation_prompt": False}, {"add_generation_prompt": False}),
        (CHAT, {"tools": TOOLS}, {"add_generation_prompt": True, "tools": TOOLS}),
        (CHAT, {"chat_template_kwargs": {"short": True}}, {"add_generation_prompt": True, "short": True}),
        (CHAT, {"chat_template": "{{ messages[0]['content'] }}!"}, {"chat_template": "{{ messages[0]['content'] }}!"}),
    ],
)
def test_chats_are_what_the_template_writes(llm, tokenizer, messages, options, applied):
    text = tokenizer.apply_chat_template(messages, tokenize=False, **applied)
    params = SamplingParams(max_tokens=1, temperature=0)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for found in (*llm.chat(messages, params, **options), *llm.chat([messages, messages], params, **options)):
        assert (found.prompt, found.prompt_token_ids) == (text, ids)
    if options:
        assert [each.prompt for each in llm.generate([messages] * 2, params, **options)] == [text] * 2


def test_without_options_a_last_text_of_the_assistant_is_continued(llm, tokenizer):
    params = SamplingParams(max_tokens=1, temperature=0)
    (found,) = llm.generate(HALF, params)
    assert found.prompt == tokenizer.apply_chat_template(HALF, tokenize=False, continue_final_message=True)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda llm: llm.chat("hello"), "prompt 0: is no list of chat messages, to which add_generation_prompt"),
        (lambda llm: llm.generate([CHAT, "hello"], tools=TOOLS), "prompt 1: is no list of chat messages"),
        (lambda llm: llm.chat(CHAT, add_generation_prompt=True, continue_final_message=True), "set only one of them"),
        (lambda llm: llm.chat(CHAT, tools=["look"]), "chat option tools=.*must be a list of tools"),
        (lambda llm: llm.chat(CHAT, chat_template_kwargs={"tokenize": True}), "only the template knows: 'tokenize'"),
        (lambda llm: llm.chat(CHAT, chat_template="{{ nothing.here }"), "prompt 0: the chat template failed"),
        (lambda llm: llm.chat([{"role": "assistant", "content": ""}], continue_final_message=True), "has no text that"),
        (lambda llm: llm.generate(ChatPrompt("hello")), "is no list of chat messages"),
    ],
)
def test_what_no_template_can_write_is_told(llm, call, problem):
    with pytest.raises(ConfigurationError, match=problem):
        call(llm)


def test_a_bar_counts_answers(llm, capsys):
    bars = []

    class Bar:
        def __init__(self, total, **options):
            self.total, self.done = total, 0
            bars.append(self)

        def set_postfix_str(self, text, refresh):
            pass

        def update(self, count):
            self.done += count

        def close(self):
            self.closed = True

    llm.generate(PROMPTS, SamplingParams(max_tokens=1, n=2), use_tqdm=Bar)
    assert (bars[0].total, bars[0].done, bars[0].closed) == (8, 8, True)
    llm.generate(PROMPTS, SamplingParams(max_tokens=1), use_tqdm=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "4/4" in captured.err


VLLM_DEFAULTS = {
    "n": 1, "best_of": None, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "top_p": 1.0,
    "top_k": 0, "min_p": 0.0, "seed": None, "stop": None, "stop_token_ids": None, "bad_words": None,
    "ignore_eos": False, "min_tokens": 0, "logprobs": None, "prompt_logprobs": None, "flat_logprobs": False,
    "detokenize": True, "skip_special_tokens": True, "spaces_between_special_tokens": True, "logits_processors": None,
    "include_stop_str_in_output": False, "truncate_prompt_tokens": None, "output_kind": None, "guided_decoding": None,
    "structured_outputs": None, "logit_bias": None, "allowed_token_ids": None, "extra_args": None,
    "skip_reading_prefix_cache": None, "thinking_token_budget": None,
}  # fmt: skip


def test_every_default_of_vllm_may_be_spelled_out():
    spelled = SamplingParams(temperature=0.5, **VLLM_DEFAULTS)
    assert spelled == SamplingParams(temperature=0.5) and spelled.clone() == spelled
    for name, value in VLLM_DEFAULTS.items():
        assert SamplingParams(**{name: value}) == SamplingParams(), name
        setattr(spelled, name, value)
    assert spelled == SamplingParams(temperature=0.5)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("guided_decoding", {"regex": "a"}, "did you mean 'structured_outputs'"),
        ("spaces_between_special_tokens", False, "the tokenizer decides"),
        ("flat_logprobs", True, "one dict for each token"),
        ("best_of", 2, "did you mean 'n'"),
        ("best_of", True, "did you mean 'n'"),
        ("early_stopping", 0, "there is no beam search"),
        ("logits_processors", [print], "no code of the caller"),
    ],
)
def test_what_a_field_without_a_counterpart_asks_for_is_refused(name, value, problem):
    with pytest.raises(ConfigurationError, match=problem):
        SamplingParams(**{name: value})
    params = SamplingParams()
    with pytest.raises(ConfigurationError, match=problem):
        setattr(params, name, value)


def test_keywords_of_calls_that_change_nothing_are_taken_and_others_told(llm):
    params = SamplingParams(max_tokens=1, temperature=0)
    neutral = {"lora_request": None, "priority": None, "tokenization_kwargs": None, "mm_processor_kwargs": None}
    (plain,), (spelled,) = llm.generate("hello", params), llm.generate("hello", params, **neutral)
    assert spelled.token_ids == plain.token_ids
    assert llm.chat(CHAT, params, chat_template_content_format="auto", **neutral)
    for name, value, problem in [
        ("lora_request", object(), r"give LoRARequest\(name, number, folder\)"),
        ("priority", [1], "in the order in which they are given"),
        ("prompt_token_ids", [[5, 6]], "as prompts"),
        ("chat_template_content_format", "openai", "templates get the text"),
    ]:
        with pytest.raises(ConfigurationError, match=problem):
            llm.generate("hello", params, **{name: value})
    for call, name, meant in [
        (llm.generate, "use_tdqm", "use_tqdm"),
        (llm.chat, "add_generation_promt", "add_generation_prompt"),
        (llm.chat, "tool", "tools"),
    ]:
        with pytest.raises(TypeError, match=rf"no keyword '{name}'; did you mean '{meant}'\?"):
            call(CHAT, params, **{name: None})


def test_attributes_of_vllm_that_are_not_here_say_what_is(llm):
    for name, instead in [("embed", "max_tokens=0 with prompt_logprobs"), ("sleep", "close"), ("llm_engine", "step")]:
        with pytest.raises(AttributeError, match=rf"LLM has no '{name}': .*{instead}"):
            getattr(llm, name)
    with pytest.raises(AttributeError, match=r"LLM has no 'generat'$"):
        _ = llm.generat
    assert not hasattr(llm, "embed") and llm.generate("a", SamplingParams(max_tokens=1))[0].outputs[0].finished()


@pytest.mark.parametrize(
    "keyword",
    [
        {"swap_space": 4}, {"limit_mm_per_prompt": {}}, {"logprobs_mode": "raw_logprobs"},
        {"config_format": "auto"}, {"mm_processor_kwargs": None}, {"enable_sleep_mode": False},
    ],
)  # fmt: skip
def test_defaults_of_the_engine_may_be_spelled_out(keyword):
    assert engine_settings(keyword) == {}


def test_keywords_of_the_engine_name_the_setting_to_use():
    for keyword, problem in [
        ({"kv_cache_memory_bytes": 2**30}, "use gpu_memory"),
        ({"logprobs_mode": "processed_logits"}, "the model's own"),
        ({"chat_template": "x"}, "give it to chat"),
        ({"attention_backend": "FLASHINFER"}, "leave it out"),
    ]:
        with pytest.raises(ConfigurationError, match=problem):
            engine_settings(keyword)
