"""--retry-truncated: answers that were cut are run again with more tokens, whole ones stay."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.apps_batch.fake import FakeLLM
from tests.apps_batch.helpers import benchmark_prompts, parts_of, read_output, run_here, write_input

ROWS = 60


def parquet_rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder).sort_by("id").to_pylist()


def test_cut_answers_get_more_and_whole_ones_stay(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", benchmark_prompts(ROWS))
    words = [source, tmp_path / "out", "--max-tokens", 8, "--part-rows", 7]
    assert run_here(*words) == 0
    before = parquet_rows(tmp_path / "out")
    cut = {row["id"] for row in before if row["finish_reason"] == "length"}
    assert 3 < len(cut) < ROWS - 3
    engine = FakeLLM()
    assert run_here(*words, "--retry-truncated", 20, fake=engine) == 0
    after = parquet_rows(tmp_path / "out")
    assert engine.prompts_seen == len(cut)
    for old, new in zip(before, after, strict=True):
        if old["id"] not in cut:
            assert new == old
            continue
        assert new["num_generated_tokens"] >= 10
        assert (new["finish_reason"] == "stop") == (new["num_generated_tokens"] < 20)
    engine = FakeLLM()
    assert run_here(*words, "--retry-truncated", 20, fake=engine) == 0
    assert engine.prompts_seen == 0, "what was cut at as many tokens is not run once more"


def test_rows_that_were_not_run_yet_get_as_many(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", benchmark_prompts(ROWS))
    words = [source, tmp_path / "out", "--max-tokens", 8, "--part-rows", 7]
    assert run_here(*words, fail_after=12, block=8) != 0
    assert run_here(*words, "--retry-truncated", 20) == 0
    rows = parquet_rows(tmp_path / "out")
    assert len(rows) == ROWS
    assert {row["num_generated_tokens"] for row in rows if row["finish_reason"] == "length"} == {20}


def test_requests_of_the_api(tmp_path: Path) -> None:
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": text, "max_tokens": 8}}
        for i, text in enumerate(benchmark_prompts(ROWS))
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = [tmp_path / "in.jsonl", tmp_path / "out", "--input-format", "openai"]

    def reasons() -> dict[str, tuple[str, int]]:
        rows = [json.loads(line) for path in (tmp_path / "out").glob("*.jsonl") for line in path.open()]
        bodies = {row["custom_id"]: row["response"]["body"] for row in rows}
        return {key: (body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"])
                for key, body in bodies.items()}  # fmt: skip

    assert run_here(*words) == 0
    before = reasons()
    engine = FakeLLM()
    assert run_here(*words, "--retry-truncated", 20, fake=engine) == 0
    after = reasons()
    assert engine.prompts_seen == sum(reason == "length" for reason, _ in before.values()) > 0
    assert all(after[key] == before[key] for key in before if before[key][0] == "stop")
    assert all(made >= 10 for key, (_, made) in after.items() if before[key][0] == "length")


class Stopped(FakeLLM):
    """Is lost when the given number of answers are there."""

    answers = 0

    def stream(self, items: Any, on_tokens: Any = None) -> Iterator[Any]:
        for count, pair in enumerate(super().stream(items), 1):
            yield pair
            if count == self.answers:
                raise RuntimeError("the fake device is lost")


def stopped_after(answers: int) -> Stopped:
    engine = Stopped(block=4)
    engine.answers = answers
    return engine


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("answers", range(1, 11))
def test_longer_answers_stay_whatever_is_run_again_later(answers: int, copied: bool, tmp_path: Path) -> None:
    """A segment of the journal that still holds the short answers of a part lives on for the sake of another part."""
    prompts: list[str | None] = [f"p{row}" for row in range(20)]
    prompts[3] = None  # an error, so that --retry-failed writes its part once more
    out = tmp_path / "out"
    words = [write_input(tmp_path / "in.parquet", prompts), out]
    words += ["--max-tokens", 4, "--part-rows", 10, "--window-rows", 1]
    assert run_here(*words, fake=stopped_after(12)) == 1
    assert run_here(*words, "--retry-truncated", 64, fake=stopped_after(answers)) == 1
    if copied:
        for path in parts_of(out):
            os.utime(path)
    before = read_output(out).to_pylist()
    assert run_here(*words, "--retry-failed", block=4) == 3
    after = read_output(out).to_pylist()
    assert [row["id"] for row in after] == list(range(20))
    for old, new in zip(before, after, strict=False):
        assert new["num_generated_tokens"] >= old["num_generated_tokens"], f"row {old['id']} lost what it had"
