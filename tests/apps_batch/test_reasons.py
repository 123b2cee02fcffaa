"""The end of a job whose rows failed: how many for which reason, and only remedies that help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexbatch.apps.jobs.reasons import MEMORY, PASSING, TOO_LONG, described_errors, reason_of
from flexbatch.text.prompts import PromptEncoder
from tests.apps_batch.fake import FakeTokenizer
from tests.apps_batch.helpers import read_output, run_here, write_input

KNOWN = {
    "has 700 tokens; the model's context of 512 allows 496. Shorten it": TOO_LONG.title,
    "300 prompt and up to 64 generated tokens need 1.2 GiB more on the cpu tier than its budget of 1.0 GiB, in a block "
    "of their own. Lower max_tokens": MEMORY.title,
    "300 prompt and up to 64 generated tokens need 23 cache pages of 16 tokens; the largest tier has 4": MEMORY.title,
    "'text' is null": "empty",
    "template field 'meta.title' is missing or null": "empty",
    "is empty: it has no token, and the tokenizer adds none": "empty",
    "'text' is not UTF-8: invalid start byte at byte 3": "not Unicode text",
    "holds half of a surrogate pair, '\\ud800', at character 3: no Unicode text": "not Unicode text",
    "setting max_tokens is 'many', wanted a whole number": "of an invalid setting",
    "sampling parameter temperature=-1 must be >= 0 and finite": "of an invalid setting",
    "data.jsonl: line 7 is not JSON: Expecting value": "unreadable as JSON",
    "data.csv: row 9 has 3 cells, the header 4": "unlike the other rows of their file",
    "the model's logits for generated token 3 are not finite numbers": "of logits that are no finite numbers",
    "the chat template failed: roles must alternate": "of messages that make no prompt",
    '\'messages\': message 0 needs "role" and "content"': "of messages that make no prompt",
    "'audio' is not supported": "asking for what FlexBatch does not have",
    "OSError: [Errno 28] No space left on device": PASSING.title,
}


@pytest.mark.parametrize("error", KNOWN)
def test_reasons_are_known_by_their_errors(error: str) -> None:
    reason = reason_of(error)
    assert reason.title == KNOWN[error] and reason.retry == (reason in (MEMORY, PASSING))


def test_the_encoder_s_own_errors_are_known() -> None:
    encoder = PromptEncoder(FakeTokenizer(), max_context=8, vocab_size=300)
    for prompt, title in (("far too long for this", TOO_LONG.title), ([], "empty")):
        with pytest.raises(ValueError) as caught:
            encoder.encode(0, prompt, 4)
        assert reason_of(str(caught.value)).title == title


def test_what_is_not_known_is_told_without_its_numbers() -> None:
    told = described_errors([f"the frob {number} is at {number * 7}" for number in range(12)] + ["'a' is null"], 1000)
    lines = told.splitlines()
    assert lines[0] == "13 of 1,000 rows have an error (the column error has it):"
    assert lines[1:] == ["  12 of this error: the frob N is at N", "   1 empty"]
    many = described_errors([f"error {'x' * number}" for number in range(30)], 30)
    assert len(many.splitlines()) == 12 and "20 of 20 other reasons" in many
    assert described_errors([""], 1).endswith("of this error: without a message")


def run_job(tmp_path: Path, capsys: pytest.CaptureFixture, *words: object, prompts: list[str | None]) -> str:
    source = write_input(tmp_path / "in.parquet", prompts)
    assert run_here(source, tmp_path / "out", "--max-tokens", 8, "--part-rows", 5, *words, max_positions=64) == 3
    return capsys.readouterr().err


def test_a_job_says_why_rows_failed_and_what_helps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompts = ["fine", None, *["much too long for a context of 64 tokens, by far" * 2] * 3, *["fine"] * 10, None]
    said = run_job(tmp_path, capsys, prompts=prompts)
    assert "5 of 16 rows have an error" in said and "  3 too long for the model: --truncate left cuts such" in said
    assert "  2 empty" in said and "--retry-failed" not in said
    assert sum(bool(error) for error in read_output(tmp_path / "out")["error"].to_pylist()) == 5
    # Those of an earlier run count too.
    again = run_job(tmp_path, capsys, prompts=prompts)
    assert "nothing left to do" in again and "  3 too long for the model" in again


def test_the_remedy_of_a_cut_works(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_input(tmp_path / "in.parquet", ["much too long for a context of 64 tokens, by far" * 2, "fine"])
    words = (source, tmp_path / "out", "--max-tokens", 8)
    assert run_here(*words, max_positions=64) == 3
    assert run_here(*words, "--truncate", "left", "--overwrite", max_positions=64) == 0
    assert read_output(tmp_path / "out")["error"].to_pylist() == ["", ""]


def test_a_batch_file_says_why_lines_failed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    body = {"model": "m", "prompt": "a", "max_tokens": 4}
    lines = [{"custom_id": str(row), "method": "POST", "url": "/v1/completions", "body": body} for row in range(3)]
    lines.append({**lines[0], "custom_id": "x", "body": {**body, "audio": {}}})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    assert run_here(tmp_path / "in.jsonl", tmp_path / "out", "--input-format", "openai") == 3
    said = capsys.readouterr().err
    assert "2 of 5 rows have an error" in said and "  1 asking for what FlexBatch does not have" in said
    assert "  1 without a custom_id of their own" in said and "--retry-failed" not in said


@pytest.mark.parametrize(("template", "warned"), [("Summarize", True), ("{{prompt}}", True), ("Say {prompt}", False)])
def test_a_template_without_a_field_warns(
    template: str, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = write_input(tmp_path / "in.parquet", ["a", "b"])
    assert run_here(source, tmp_path / "out", "--prompt-template", template, "--max-tokens", 3) == 0
    assert ("has no field, so that every row has the same prompt" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("name", ["answers.parquet", "answers.jsonl", "answers"])
def test_an_output_named_like_a_file_becomes_a_folder_and_says_so(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = write_input(tmp_path / "in.parquet", ["a"])
    for told in (name != "answers", False):
        assert run_here(source, tmp_path / name, "--max-tokens", 3) == 0
        assert ("becomes a folder of parts" in capsys.readouterr().err) == told
    assert (tmp_path / name / "part-00000.parquet").is_file()
