"""`run`, `batch` and `complete` share the names and defaults of their flags, and prompts come in the same forms."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flexbatch import run
from flexbatch.apps import batch, completion
from flexbatch.apps.completion import CompletionConfig
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.cli import prompt_files
from flexbatch.cli.run_settings import InputConfig, RunConfig, SamplingConfig
from flexbatch.cli.settings import settings_of
from flexbatch.config import EngineConfig
from flexbatch.models.generation_config import GenerationDefaults
from flexbatch.request import SamplingParams
from flexbatch.validation.errors import ConfigurationError
from flexbatch.validation.sampling_fields import CHECKS

PARSERS = {"run": run.make_parser, "batch": batch.make_parser, "complete": completion.make_parser}


def flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {option: action for action in parser._actions for option in action.option_strings}


def test_every_flag_of_sampling_input_and_engine_is_one_of_all_three_commands() -> None:
    found = {name: flags(make()) for name, make in PARSERS.items()}
    shared = [s.flag for config in (SamplingConfig, InputConfig, EngineConfig) for s in settings_of(config)]
    for flag in shared:
        actions = [found[name][flag] for name in PARSERS]
        assert len({(str(a.nargs), str(a.choices), type(a)) for a in actions}) == 1, flag
    same = {**SamplingConfig.__dataclass_fields__}
    for config in (RunConfig, CompletionConfig, JobConfig):
        for field in dataclasses.fields(config):
            if field.name in same or field.name in InputConfig.__dataclass_fields__:
                assert field.default == {**InputConfig.__dataclass_fields__, **same}[field.name].default, field.name


def test_every_flag_of_the_engine_stands_in_a_group_with_others() -> None:
    for name, make in PARSERS.items():
        assert "engine" not in {group.title for group in make()._action_groups}, name


def test_what_a_request_may_say_a_flag_may_say() -> None:
    """But for what has a place of its own, and what only transformers' file names."""
    elsewhere = {"seed", "truncate_prompt_tokens", "prompt_logprobs_start", "detokenize", "logit_bias"}
    of_the_file = {
        *("min_length", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
        *("forced_bos_token_id", "forced_eos_token_id", "sequence_bias"),
    }
    forms = {"json_schema", "disable_any_whitespace", "choice", "regex"}
    fields = CHECKS.keys() - elsewhere - of_the_file - {"structured_outputs"}
    assert {setting.name for setting in settings_of(SamplingConfig)} == fields | forms


def test_without_flags_all_draw_alike() -> None:
    none = GenerationDefaults()
    wanted = SamplingParams(max_tokens=64, temperature=0)
    assert SamplingConfig().params(none) == JobConfig().params(none) == wanted
    assert JobConfig().api_params(none) == SamplingParams(max_tokens=16, temperature=1.0), "as the API says"
    given = {"min_tokens": 2, "bad_words": ("x",), "allowed_token_ids": (5,), "skip_special_tokens": False, "n": 2}
    assert (
        SamplingConfig(**given).params(none) == JobConfig(**given).params(none) == dataclasses.replace(wanted, **given)
    )


STDIN = [
    ("a\n\n b \r\nc", ["a", " b ", "c"], [{}] * 3),
    ('{"prompt": "a", "id": 3}\n{"prompt": [5, 6]}\n', ["a", [5, 6]], [{"id": 3}, {}]),
    ("[5, 6]\n[7]\n", [[5, 6], [7]], [{}, {}]),
    ('{"prompt": "a"}\nplain', ['{"prompt": "a"}', "plain"], [{}, {}]),
    ('{"text": "a"}\n', ['{"text": "a"}'], [{}]),
    ("{ not json\n", ["{ not json"], [{}]),
    ("\ufeffgrößer\n", ["größer"], [{}]),
]


@pytest.mark.parametrize(("text", "prompts", "fields"), STDIN)
@pytest.mark.parametrize("binary", [True, False])
def test_prompts_come_from_standard_input(
    text: str, prompts: list, fields: list, binary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())) if binary else io.StringIO(text))
    rows = prompt_files.read_prompts("-")
    assert [row.prompt for row in rows] == prompts and [row.fields for row in rows] == fields


def test_standard_input_without_prompts_or_in_another_encoding_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for content, problem in (
        (b"\n \n", "standard input holds no prompts"),
        (b"a\n\xff\n", "standard input: is not UTF"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        with pytest.raises(ConfigurationError, match=problem):
            prompt_files.read_prompts("-")


CSV = 'id,prompt,price\n007,"a, ""b""\nc",1.10\n8,größer,\n'


@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "in.CSV"])
def test_prompts_come_from_csv(name: str, tmp_path: Path) -> None:
    text = CSV.replace(",", "\t").replace("a\t", "a,") if name == "in.tsv" else CSV
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    rows = prompt_files.read_prompts(tmp_path / name)
    assert [row.prompt for row in rows] == ['a, "b"\nc', "größer"]
    assert [row.fields for row in rows] == [{"id": "007", "price": "1.10"}, {"id": "8", "price": ""}]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("id,text\n1,a\n", 'has no column "prompt"; its header has id, text'),
        ("", 'has no column "prompt"; its header has nothing'),
        ("prompt,prompt\na,b\n", "column names repeat: prompt"),
        ("prompt,id\na,1\nb\n", "line 3 has 1 cells, the header has 2"),
        ('prompt\n"a\n', "line 2 opens a quote that is never closed"),
        ("prompt\n", "holds no prompts"),
    ],
)
def test_csv_that_is_not_in_order_names_its_line(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(text)
    with pytest.raises(ConfigurationError, match=problem):
        prompt_files.read_prompts(tmp_path / "in.csv")


def test_run_takes_standard_input_and_goes_on_where_it_stopped(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    words = ("--prompts", "-", "--output", str(out), "--temperature", "1", "--limit", "3")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\nthree\nfour\n"))
    assert command(*words) == 0
    whole = out.read_text()
    assert [json.loads(line)["prompt"] for line in whole.splitlines()] == ["one", "two", "three"]
    out.write_text("".join(whole.splitlines(keepends=True)[:1]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\nthree\nfour\n"))
    assert command(*words) == 0 and out.read_text() == whole, "the rest draws what it would have drawn"


@pytest.mark.parametrize("side", ["left", "right"])
def test_run_cuts_what_is_too_long(command: Any, tmp_path: Path, side: str, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "in.csv").write_text(f"prompt\n{'a' * 50}{'zz' * 100}\nshort\n")
    assert command("--prompts", str(tmp_path / "in.csv"), "--truncate", side, "--json") == 0
    long, short = json.loads(capsys.readouterr().out)["completions"]
    assert (long["num_input_tokens"], long["num_generated_tokens"]) == (96 - 6, 6) and short["num_input_tokens"] < 9


def batch_words(model: Path, *words: object) -> list[str]:
    fixed = ("--device", "cpu", "--percent", 100, 0, 100, 0, 100, 0, "--gpu-batch-size", 4, "--num-gpu-batches", 1)
    return [*map(str, words), "--model", str(model), *map(str, fixed), "--max-tokens", "4"]


def test_batch_has_the_flags_of_run_and_run_and_batch_write_the_same(
    command: Any, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "in.csv"
    source.write_text("id,prompt\n" + "".join(f"{i},prompt {i}\n" for i in range(30)))
    flags = ["--limit", "7", "--min-p", "0.1", "--frequency-penalty", "0.5", "--repetition-penalty", "1.2"]
    flags += ["--stop-token-ids", "5", "--ignore-eos", "--logprobs", "1", "--prompt-logprobs", "0"]
    assert command("--prompts", str(source), "--json", *flags, "--max-tokens", "4") == 0
    lines = json.loads(capsys.readouterr().out)["completions"]
    # The words may stand between flags, or be flags.
    assert batch.main(batch_words(model_folder, source, *flags, "--part-rows", 3, tmp_path / "out")) == 0
    table = pq.read_table(tmp_path / "out").to_pylist()
    assert [(row["id"], row["generated_text"]) for row in table] == [(line["id"], line["text"]) for line in lines]
    for row, line in zip(table, lines, strict=True):
        shown = [[entry["token_id"] for entry in step] for step in line["logprobs"]]
        assert [{entry["token_id"] for entry in step} for step in row["logprobs"]] == list(map(set, shown))
        assert row["prompt_logprobs"][0] is None and len(row["prompt_logprobs"]) == row["num_input_tokens"]
    by_flags = batch_words(model_folder, "--prompts", source, "--output", tmp_path / "out", *flags, "--part-rows", 3)
    assert batch.main(by_flags) == 0, "nothing is left to do"


def test_several_answers_to_a_row_are_lists(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('prompt\nab\n""\ncd\n')
    words = (tmp_path / "in.csv", tmp_path / "out", "--n", 3, "--temperature", 1, "--logprobs", 0, "--generated-tokens")
    assert batch.main(batch_words(model_folder, *words)) == 3
    assert batch.main(batch_words(model_folder, *words, "--retry-failed")) == 3, "a part is read and written again"
    rows = pq.read_table(tmp_path / "out").to_pylist()
    for row in (rows[0], rows[2]):
        assert len({*row["generated_text"]}) == 3 and row["num_generated_tokens"] == [4, 4, 4] and row["error"] == ""
        assert [[step[0]["token_id"] for step in answer] for answer in row["logprobs"]] == row["generated_tokens"]
    assert (rows[1]["finish_reason"], rows[1]["generated_text"]) == (["error"], None) and "empty" in rows[1]["error"]


def test_a_dry_run_of_a_batch_writes_nothing(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "in.csv").write_text("prompt\n" + "some words\n" * 9)
    assert batch.main(batch_words(model_folder, tmp_path / "in.csv", tmp_path / "out", "--dry-run")) == 0
    captured = capsys.readouterr()
    assert "weights" in captured.out and "9 rows in 1 parts" in captured.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["in.csv"], "missing OUTPUT; see"),
        ([], "missing INPUT; see"),
        (["in.csv", "out", "--output", "out"], "given both as words and by"),
        (["in.csv", "out", "--limit", "0"], "--limit 0 must be at least 1"),
        (["in.csv", "out", "--min-tokens", "70"], "min_tokens=70 must be at most max_tokens=64"),
    ],
)
def test_usage_of_batch_is_told(words: list[str], problem: str, capsys: pytest.CaptureFixture) -> None:
    assert batch.main(words) == 2
    assert problem in capsys.readouterr().err
