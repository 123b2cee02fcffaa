"""Completion and chat on a real tiny model: streaming in order, several rounds, prompt files, FlexFlow's output,
exit codes."""

from __future__ import annotations

import io
import itertools
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import OracleLLM

from flexbatch.apps.completion import main
from flexbatch.cli.answers import OrderedOutput
from flexbatch.request import SamplingParams

ENGINE = ["--device", "cpu", "--dtype", "float32", "--gpu-batch-size", "2", "--num-gpu-batches", "2"]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


@pytest.fixture
def command(monkeypatch, capsys):
    def run(model, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main([*arguments, "--model", str(model), "--max-tokens", "8", *ENGINE])
        return code, *capsys.readouterr()

    return run


@given(st.data(), st.lists(st.text(alphabet="abc", max_size=6), min_size=1, max_size=5))
def test_streams_are_written_whole_and_in_order_however_they_arrive(data, texts):
    """Pieces of all prompts arrive interleaved; what is on the screen is at any time a beginning of the final text."""
    titles = len(texts) > 1
    prompts = [f"<{number}>" for number in range(len(texts))]
    final = io.StringIO()
    output = OrderedOutput(final, prompts, titles=titles)
    left = {number: list(text) for number, text in enumerate(texts)}
    seen = [""]
    while left:
        number = data.draw(st.sampled_from(sorted(left)))
        if left[number] and data.draw(st.booleans()):
            output.add(number, left[number].pop(0))
        else:
            output.finish(number, texts[number])
            del left[number]
        seen.append(final.getvalue())
    output.check()
    blocks = [f"{prompt}{text}\n" if titles else f"{text}\n" for prompt, text in zip(prompts, texts, strict=True)]
    assert final.getvalue() == f"{'-' * 70}\n".join(blocks)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))


def test_one_prompt_prints_its_completion_alone(tiny, command):
    code, out, _ = command(tiny, "Question: which")
    (expected,) = OracleLLM(tiny).generate(["Question: which"], GREEDY)
    assert (code, out) == (0, f"{expected.text}\n")


def test_prompts_from_standard_input_and_json(tiny, command):
    prompts = ["red ale", "dark ale", "The quick"]
    code, out, _ = command(tiny, "--json", stdin="red ale\n\ndark ale\nThe quick")
    lines = sorted(map(json.loads, out.splitlines()), key=lambda line: line["index"])
    assert code == 0 and [line["prompt"] for line in lines] == prompts
    assert [line["token_ids"] for line in lines] == [
        completion.token_ids for completion in OracleLLM(tiny).generate(prompts, GREEDY)
    ]


def test_flexflow_files_in_and_out(tiny, command, tmp_path):
    prompts = ["red ale\nof Product A", "dark ale"]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    words = ("--prompts", str(tmp_path / "prompts.json"), "--flexflow-output", str(tmp_path / "out.txt"))
    code, _, _ = command(tiny, *words, "--output", str(tmp_path / "out.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    assert code == 0
    records = (tmp_path / "out.txt").read_text().split("end-to-end latency: ")[1:]
    for record, prompt, expected in zip(records, prompts, OracleLLM(tiny).generate(prompts, GREEDY), strict=True):
        latency, ids, text = record.split("\n", 2)
        assert 1e3 < float(latency) < 1e9, "microseconds"
        assert ids == "token IDs: " + ",".join(map(str, [*expected.prompt_token_ids, *expected.token_ids]))
        assert text == f"{prompt}{expected.text}\n"


def test_a_chat_sees_what_was_said_before(tiny_chat, command):
    code, out, _ = command(tiny_chat, "--chat", "--system", "Be short.", "--json", stdin="red ale?\nand dark?\n")
    first, second = map(json.loads, out.splitlines())
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "red ale?"}]
    oracle = OracleLLM(tiny_chat)
    (answer,) = oracle.generate([messages], GREEDY)
    assert code == 0 and first["prompt"] == messages and first["text"] == answer.text
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "and dark?"}]
    assert second["prompt"] == messages and second["text"] == oracle.generate([messages], GREEDY)[0].text


def test_a_turn_that_does_not_fit_is_taken_back(tiny_chat, command):
    code, out, err = command(tiny_chat, "--chat", "hello", "long " * 900, "and now?")
    assert code == 3 and "taken back" in err
    assert len(out.splitlines()) >= 2


def test_samples_of_one_prompt_are_all_shown(tiny, command):
    code, out, _ = command(tiny, "red ale", "--n", "3", "--temperature", "1", "--json")
    assert code == 0 and len({sample["text"] for sample in json.loads(out)["samples"]}) == 3


def test_a_prompt_that_does_not_fit_is_an_error_beside_the_others(tiny, command):
    code, out, err = command(tiny, "fine", "x" * 2000, "--json")
    lines = {line["index"]: line for line in map(json.loads, out.splitlines())}
    assert code == 3 and "prompt 1: has 2000 tokens" in err
    assert lines[0]["text"] and "2000 tokens" in lines[1]["error"] and "text" not in lines[1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "no prompts"),
        (["a", "--prompts", "b.txt"], "leave one out"),
        (["a", "--system", "s"], "--system is for --chat"),
        (["--chat", "a"], "no chat template"),
        (["a", "--temperature", "-1"], "temperature"),
    ],
)
def test_usage_errors_are_exit_code_2(tiny, command, caplog, arguments, problem):
    code, out, err = command(tiny, *arguments)
    assert (code, out) == (2, "") and problem in caplog.text + err


def test_several_answers_stand_apart_and_show_their_log_probabilities(tiny, command):
    words = ("red ale", "dark", "--n", "2", "--temperature", "1")
    code, out, _ = command(tiny, *words, "--json")
    lines = {line["index"]: line for line in map(json.loads, out.splitlines())}
    samples = [[sample["text"] for sample in lines[index]["samples"]] for index in range(2)]
    code, out, _ = command(tiny, *words)
    blocks = [
        f"{prompt}[answer 1 of 2]\n{first}\n[answer 2 of 2]\n{second}\n"
        for prompt, (first, second) in zip(words[:2], samples, strict=True)
    ]
    assert code == 0 and out == f"{'-' * 70}\n".join(blocks)
    code, out, _ = command(tiny, "red ale", "--logprobs", "2")
    text, _, table = out.partition("\n\n logprob    rank  token\n")
    (expected,) = OracleLLM(tiny).generate(["red ale"], SamplingParams(max_tokens=8, temperature=0, logprobs=2))
    assert code == 0 and text == expected.text
    rows = table.splitlines()
    for row, token_id, entries in zip(rows, expected.token_ids, expected.logprobs, strict=True):
        assert row.startswith(f"{entries[token_id].logprob:8.3f}  {entries[token_id].rank:6}  ") and "others: " in row
    code, out, _ = command(tiny, "red ale", "--logprobs", "-1", "--n", "2", "--temperature", "1")
    assert out.count(" logprob    rank  token\n") == 2 and out.count(" more\n") == 16, "the whole vocabulary is cut"


def test_a_scored_prompt_shows_its_tokens(tiny, command):
    code, out, _ = command(tiny, "red ale", "--prompt-logprobs", "1", "--max-tokens", "0")
    (scored,) = OracleLLM(tiny).generate(["red ale"], SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=1))
    rows = out.splitlines()
    assert code == 0 and rows[2].split() == ["logprob", "rank", "token", "of", "the", "prompt"]
    assert len(rows) == 2 + len(scored.prompt_token_ids), out  # the first token follows nothing
    assert rows[-1].startswith(f"{scored.prompt_logprobs[-1][scored.prompt_token_ids[-1]].logprob:8.3f}")


def test_words_may_stand_between_flags(tiny, command):
    code, out, _ = command(tiny, "red ale", "--logprobs", "0", "dark", "--limit", "1")
    assert code == 0 and "red ale" not in out and "-----" not in out
    code, out, _ = command(tiny, "red ale", "--top-k", "5", "dark", "--json")
    assert len(out.splitlines()) == 2


def test_a_prompt_that_is_too_long_may_be_cut(tiny, command):
    for side in ("left", "right"):
        code, out, _ = command(tiny, "y" + "x" * 2000 + "z", "--truncate", side, "--json")
        line = json.loads(out)
        assert (code, line["num_input_tokens"], line["num_generated_tokens"]) == (0, 256 - 8, 8)
    code, out, _ = command(tiny, "--chat", "x", "--truncate", "left")
    assert code == 2 and out == ""
