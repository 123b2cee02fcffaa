"""OpenAI batch files: several prompts in a request, echo, and the fields of vLLM's server, against the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.apps.batch import main
from flexbatch.apps.jobs.pipeline import RowCompletions
from flexbatch.apps.jobs.rows import RowRequest
from flexbatch.request import Completion
from tests.apps_batch.helpers import run_here
from tests.tiny_models import make_model, make_tokenizer

TEMPLATE = """{% if tools %}{{ tools[0].function.name }}|{% endif %}{% if mood %}{{ mood }}|{% endif %}\
{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}\
{% if add_generation_prompt %}<a>{% endif %}"""
FIXED = (
    "--device",
    "cpu",
    "--percent",
    *["100", "0", "100", "0", "100", "0"],
    "--gpu-batch-size",
    "4",
    "--num-gpu-batches",
    "1",
)
MESSAGES = [{"role": "user", "content": "hi you"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openai") / "model"
    make_model("llama", folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    with LLM(str(folder), device="cpu", percent=(100, 0, 100, 0, 100, 0), gpu_batch_size=4, num_gpu_batches=1) as llm:
        yield llm


def write(path: Path, *bodies: dict[str, Any], url: str = "/v1/completions") -> Path:
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/chat/completions" if "messages" in body else url,
            "body": {"model": "m", "max_tokens": 6, "temperature": 0, "ignore_eos": True, **body},
        }
        for i, body in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(folder: Path) -> list[Any]:
    lines = [json.loads(line) for path in sorted(folder.glob("part-*.jsonl")) for line in path.read_text().splitlines()]
    return [line["error"] or line["response"]["body"] for line in lines]


def answers(tmp_path: Path, folder: Path, *bodies: dict[str, Any], code: int = 0) -> list[Any]:
    path = write(tmp_path / "in.jsonl", *bodies)
    words = [str(path), str(tmp_path / "out"), "--input-format", "openai", "--model", str(folder), *FIXED]
    assert main(words) == code
    return read(tmp_path / "out")


def texts(body: Any) -> list[str]:
    return [choice.get("text", choice.get("message", {}).get("content")) for choice in body["choices"]]


def greedy(llm: Any, prompt: Any, **params: Any) -> Completion:
    settings = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, **params}
    return llm.generate([prompt], SamplingParams(**settings))[0]


def test_several_prompts_are_answered_as_one_each_would_be(tmp_path: Path, folder: Path, llm: Any) -> None:
    prompts = ["the cat", "def add", "größer"]
    ids = [llm.get_tokenizer()(prompt)["input_ids"] for prompt in prompts]
    many, tokens, single, drawn = answers(
        tmp_path,
        folder,
        {"prompt": prompts, "n": 2},
        {"prompt": ids},
        {"prompt": prompts[:1]},
        {"prompt": ["ab", "ab", "ab"], "temperature": 1.0, "n": 2},
    )
    wanted = [greedy(llm, prompt).text for prompt in prompts]
    assert texts(many) == [text for text in wanted for _ in range(2)] and texts(tokens) == wanted
    assert texts(single) == wanted[:1]
    assert [choice["index"] for choice in many["choices"]] == list(range(6))
    used = sum(map(len, ids))
    assert many["usage"] == {"prompt_tokens": used, "completion_tokens": 36, "total_tokens": used + 36}
    assert len(set(texts(drawn))) == 6, "each prompt and each sample draws for itself"


def test_one_prompt_that_cannot_run_is_the_error_of_its_line(tmp_path: Path, folder: Path) -> None:
    long, fine = answers(tmp_path, folder, {"prompt": ["ab", "x" * 600]}, {"prompt": ["ab", "cd"]}, code=3)
    assert "has 600 tokens" in long["message"] and len(fine["choices"]) == 2


@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_job_that_is_cut_off_amid_a_request_draws_what_it_would_have_drawn(tmp_path: Path, after: int) -> None:
    bodies = [{"prompt": [f"{i}.{j}" for j in range(1 + i % 4)], "temperature": 1.0} for i in range(9)]
    source = write(tmp_path / "in.jsonl", *bodies)
    words = (source, "--input-format", "openai", "--part-rows", 2)
    assert run_here(*words, tmp_path / "whole") == 0
    assert run_here(*words, tmp_path / "out", fail_after=after, block=3) == 1
    assert run_here(*words, tmp_path / "out", block=2) == 0
    found, wanted = ([body["choices"] for body in read(tmp_path / name)] for name in ("out", "whole"))
    assert found == wanted
    assert [len(body["choices"]) for body in read(tmp_path / "out")] == [1 + i % 4 for i in range(9)]


def test_the_completions_of_a_row_come_together_in_any_order() -> None:
    rows = RowCompletions()
    requests = [RowRequest(0, i, i, f"{i}.{j}", number=j, prompts=3) for i in range(2) for j in range(3)]
    done = []
    for placement in (4, 0, 2, 3, 1, 5):
        found = rows.add(requests[placement], Completion([placement]))
        done.append(None if found is None else (found[0].index, [each.prompt_token_ids for each in found[1]]))
        assert found is None or [request.prompt for request in found[0].requests] == [
            f"{found[0].index}.{j}" for j in range(3)
        ]
    assert done == [None, None, None, None, (0, [[0], [1], [2]]), (1, [[3], [4], [5]])]


def test_echo_puts_the_prompt_before_the_answer_with_its_log_probabilities(
    tmp_path: Path, folder: Path, llm: Any
) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer("the größer")["input_ids"]
    plain, scored, only, tokens, cut = answers(
        tmp_path,
        folder,
        {"prompt": ["the größer", "ab"], "echo": True},
        {"prompt": "the größer", "echo": True, "logprobs": 2},
        {"prompt": "the größer", "echo": True, "max_tokens": 0, "logprobs": 0},
        {"prompt": [ids, [1, *ids]], "echo": True, "max_tokens": 2},
        {"prompt": "the größer", "echo": True, "truncate_prompt_tokens": 3, "logprobs": 0},
    )
    answer = greedy(llm, "the größer", logprobs=2, prompt_logprobs=2)
    assert texts(plain) == [f"the größer{answer.text}", f"ab{greedy(llm, 'ab').text}"]
    assert texts(scored) == texts(plain)[:1] and texts(only) == ["the größer"]
    assert all(text.startswith("the größer") for text in texts(tokens))
    found = scored["choices"][0]["logprobs"]
    wanted = [*answer.prompt_logprobs, *answer.logprobs]
    everything = [*ids, *answer.token_ids]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for placement, entries in list(enumerate(wanted))[1:]:
        assert found["token_logprobs"][placement] == pytest.approx(entries[everything[placement]].logprob, abs=1e-4)
        assert len(found["top_logprobs"][placement]) == len(entries)
    text, offsets = texts(scored)[0], found["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[len(ids)] == len("the größer")
    plainly = [index for index, name in enumerate(found["tokens"]) if not name.startswith("bytes:")]
    assert all(
        text[offsets[placement] :].startswith(found["tokens"][placement])
        for placement in plainly
        if placement < len(ids)
    )
    assert len(only["choices"][0]["logprobs"]["tokens"]) == len(ids)
    assert texts(cut)[0].startswith(tokenizer.decode(ids[-3:])) and cut["usage"]["prompt_tokens"] == 3


def test_fields_of_vllms_server_mean_what_they_mean_in_python(tmp_path: Path, folder: Path, llm: Any) -> None:
    free = greedy(llm, "the cat").token_ids
    bad = llm.get_tokenizer().decode(free[:1])
    fields: list[dict[str, Any]] = [
        {"stop_token_ids": [free[2]]},
        {"stop_token_ids": [free[2]], "min_tokens": 5},
        {"stop_token_ids": [free[2]], "include_stop_str_in_output": True},
        {"stop": [llm.get_tokenizer().decode(free[2:4])], "include_stop_str_in_output": True},
        {"allowed_token_ids": [7, 8, 9]},
        {"skip_special_tokens": False, "logit_bias": {"1": 500}},
        {"truncate_prompt_tokens": 2},
        *([{"bad_words": [bad]}] if bad.strip() and "�" not in bad else []),
    ]
    found = answers(tmp_path, folder, *({"prompt": "the cat", **each} for each in fields))
    for each, body in zip(fields, found, strict=True):
        bias = {int(token): value for token, value in each.pop("logit_bias", {}).items()} or None
        wanted = greedy(llm, "the cat", logit_bias=bias, **each)
        assert texts(body) == [wanted.text], each
        assert (body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]) == (
            wanted.finish_reason,
            len(wanted.token_ids),
        )


def test_chats_take_tools_and_values_for_their_template(tmp_path: Path, folder: Path, llm: Any) -> None:
    half = [*MESSAGES, {"role": "assistant", "content": "well"}]
    options: list[tuple[list[Any], dict[str, Any]]] = [
        (MESSAGES, {"tools": TOOLS}),
        (MESSAGES, {"chat_template_kwargs": {"mood": "calm"}}),
        (MESSAGES, {"add_generation_prompt": False}),
        (half, {"add_generation_prompt": True}),
        (half, {"continue_final_message": True}),
        (half, {}),
    ]
    bodies = [{"messages": messages, **each, "tool_choice": "auto"} for messages, each in options]
    found = answers(tmp_path, folder, *bodies)
    for (messages, each), body in zip(options, found, strict=True):
        (wanted,) = llm.generate([messages], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True), **each)
        assert texts(body) == [wanted.text] and body["usage"]["prompt_tokens"] == len(wanted.prompt_token_ids), each
    assert len({body["usage"]["prompt_tokens"] for body in found}) >= 5, "the options change the prompt"
