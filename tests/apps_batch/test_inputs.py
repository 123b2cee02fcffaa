"""Whole jobs with the fake engine, from every form of input."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.apps_batch.helpers import read_output, run_here, write_input

ROWS = [{"prompt": f'row {i}: ünï, "quoted"\nsecond line', "number": i} for i in range(60)]
SETTINGS = ("--temperature", 0, "--part-rows", 25)


def delimited(path: Path, delimiter: str) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "number"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def json_lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def folder_of_parquet(path: Path) -> Path:
    path.mkdir()
    for position in range(3):
        pq.write_table(
            pa.Table.from_pylist(ROWS[position * 20 : position * 20 + 20]),
            path / f"{position}.parquet",
            row_group_size=7,
        )
    (path / "notes.txt").write_text("not data")
    return path


def saved(path: Path) -> Path:
    pytest.importorskip("datasets").Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


FORMS: dict[str, Callable[[Path], object]] = {
    "folder": lambda folder: folder_of_parquet(folder / "in"),
    "glob": lambda folder: f"{folder_of_parquet(folder / 'in')}/[0-2].par*",
    "uri": lambda folder: f"file://{folder_of_parquet(folder / 'in')}",
    "csv": lambda folder: delimited(folder / "in.csv", ","),
    "tsv": lambda folder: delimited(folder / "in.tsv", "\t"),
    "jsonl": lambda folder: written(folder / "in.jsonl", json_lines()),
    "jsonl.gz": lambda folder: written(folder / "in.jsonl.gz", gzip.compress(json_lines())),
    "saved data set": lambda folder: saved(folder / "in"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "whole.parquet")
    assert run_here(tmp_path / "whole.parquet", tmp_path / "whole", *SETTINGS) == 0
    typed = ("--column-types", "number=int64") if "csv" in form or "tsv" in form else ()
    assert run_here(FORMS[form](tmp_path), tmp_path / "out", *SETTINGS, *typed) == 0
    assert read_output(tmp_path / "out").to_pylist() == read_output(tmp_path / "whole").to_pylist()


def test_the_name_of_a_data_set_goes_to_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*words: object, **options: object) -> object:
        asked.append((words, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert run_here("org/prompts", tmp_path / "out", *SETTINGS, "--dataset-config", "main", "--split", "test[:60]") == 0
    assert asked == [(("org/prompts", "main"), {"split": "test[:60]"})] and read_output(tmp_path / "out")[
        "number"
    ].to_pylist() == list(range(60))


def test_messages_come_as_lists_as_json_or_by_their_name(tmp_path: Path) -> None:
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"question {i}"}] for i in range(9)
    ]
    source = write_input(
        tmp_path / "in.parquet", [""] * 9, chat=chats, packed=[json.dumps(chat) for chat in chats[:8]] + ["[]"]
    )
    assert run_here(source, tmp_path / "lists", "--messages-column", "chat") == 0
    assert run_here(source, tmp_path / "json", "--messages-column", "packed") == 3
    pq.write_table(pa.table({"messages": chats}), tmp_path / "named.parquet")
    assert run_here(tmp_path / "named.parquet", tmp_path / "named") == 0
    texts = [read_output(tmp_path / name)["generated_text"].to_pylist() for name in ("lists", "json", "named")]
    assert texts[0] == texts[2] == [*texts[1][:8], texts[0][8]] and len(set(texts[0])) == 9
    assert read_output(tmp_path / "json")["error"].to_pylist() == [""] * 8 + ["'packed' holds no list of messages"]


def test_openai_batch_files(tmp_path: Path) -> None:
    def request(name: object, url: str, **body: object) -> str:
        return json.dumps({"custom_id": name, "method": "POST", "url": f"/v1/{url}", "body": {"model": "m", **body}})

    lines = [
        request("a", "completions", prompt="hello", max_tokens=5, temperature=0),
        request(
            "b",
            "chat/completions",
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=7,
            logprobs=True,
            top_logprobs=1,
        ),
        request("c", "chat/completions", messages=[]),
        request("d", "completions", prompt="x", tools=[{"type": "function"}]),
        request("e", "embeddings", input="x"),
        request("f", "completions", prompt="x", temperature=-1),
        request("g", "completions", prompt="x" * 1000),
        "not json",
        request("h", "completions", prompt=[5, 6, 7], max_tokens=4, logprobs=1, stream=False, stop=None),
        request(7, "completions", prompt="x"),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    assert run_here(tmp_path / "in.jsonl", tmp_path / "out", "--input-format", "openai", "--part-rows", 4) == 3
    out = [
        json.loads(line)
        for path in sorted((tmp_path / "out").glob("part-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert [row["custom_id"] for row in out] == ["a", "b", "c", "d", "e", "f", "g", None, "h", None]
    assert all(
        set(row) == {"id", "custom_id", "response", "error"} and (row["response"] is None) != (row["error"] is None)
        for row in out
    )
    assert [row["error"]["code"] for row in out if row["error"]] == [
        "invalid_value", "unsupported_parameter", "invalid_url", "invalid_value", "invalid_request",
        "invalid_json_line", "missing_required_parameter",
    ]  # fmt: skip
    text, chat, ids = (out[i]["response"]["body"] for i in (0, 1, 8))
    assert (
        text["object"] == "text_completion"
        and len(text["choices"][0]["text"]) <= 5
        and text["usage"]["prompt_tokens"] == 6
    )
    assert chat["choices"][0]["message"]["role"] == "assistant" and chat["usage"]["completion_tokens"] <= 7
    assert len(chat["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 1
    assert (
        ids["usage"]["prompt_tokens"] == 3
        and len(ids["choices"][0]["logprobs"]["token_logprobs"]) == ids["usage"]["completion_tokens"]
    )
    assert len({row["id"] for row in out}) == 10


@pytest.mark.parametrize(
    ("location", "output", "taken"),
    [
        ("data", "data/out", False), ("data", "data", False), ("data", "data/_out", True), ("data", "out", True),
        ("file://data", "data/out", False), ("data/**/*.parquet", "data/out", False),
        ("data/*/*.parquet", "data/k/v/out", True),
        ("data/*/*.parquet", "data/out", False), ("data/**", "data/out", False), ("data/*/*", "data/k/out", True),
        ("data/*/*/*.parquet", "data/out", False), ("data/in*/*.parquet", "data/out", True),
        ("data/?n/*.parquet", "data/out", True), ("data/[io]*/*", "data/out", False),
        ("data/**/*.parquet", "data/.out", True), ("data/**/*.jsonl", "data/out", False),
    ],
)  # fmt: skip
def test_an_output_that_would_be_read_as_input_is_refused_at_the_first_start(
    location: str, output: str, taken: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that is resumed finds the input that it began with, whatever it has written since."""
    head = "file://" if location.startswith("file://") else ""
    source = f"{head}{tmp_path}/{location.removeprefix(head)}"
    if "jsonl" in location:
        (tmp_path / "data" / "in").mkdir(parents=True)
        (tmp_path / "data" / "in" / "a.jsonl").write_bytes(json_lines())
    else:
        for folder in ("in", "k/v"):
            write_input(tmp_path / "data" / folder / "a.parquet", ["a", "b", "c"])
    words = [source, tmp_path / output, "--part-rows", 1, "--window-rows", 1]
    if not taken:
        assert run_here(*words) == 2 and "would be read as input" in capsys.readouterr().err
        assert not list(tmp_path.rglob("part-*")) and not list(tmp_path.rglob(".flexbatch"))
        return
    assert run_here(*words, block=1, fail_after=70) == 1 and list(tmp_path.rglob("part-*"))
    assert run_here(*words) == 0 and run_here(*words) == 0
