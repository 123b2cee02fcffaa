"""Forms of answers from the command line, from a column and from OpenAI requests, through the real engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexbatch import SamplingParams, StructuredOutputsParams, run
from flexbatch.apps.batch import main
from flexbatch.apps.jobs.openai_requests import RequestError, parse_request
from flexbatch.apps.jobs.rows import without_nulls

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
SCHEMA_FILE = Path(__file__).parents[1] / "data" / "person.schema.json"
SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
ENGINE = ["--device", "cpu", "--percent", "100", "0", "100", "0", "100", "0"]
ENGINE += ["--gpu-batch-size", "4", "--num-gpu-batches", "1", "--model", "demo"]


def columns(folder: Path) -> dict[str, list[Any]]:
    return pq.read_table(folder).to_pydict()


def test_a_schema_for_all_rows_and_one_of_its_own_for_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A schema that does not compile is its row's error, with the library's message."""
    own = [json.dumps({"enum": ["x", "y"]}), None, '{"type": "nothing"}', "{", json.dumps({"const": [1, "größer"]})]
    table = pa.table({"prompt": ["a", "b", "c", "d", "e"], "form": own})
    pq.write_table(table, tmp_path / "in.parquet")
    words = [tmp_path / "in.parquet", tmp_path / "out", "--json-schema", SCHEMA_FILE, "--json-schema-column", "form"]
    assert main([str(word) for word in [*words, "--max-tokens", 60, *ENGINE]]) == 3
    found = columns(tmp_path / "out")
    texts, errors = found["generated_text"], found["error"]
    assert json.loads(texts[0]) in ("x", "y") and json.loads(texts[4]) == [1, "größer"]
    if found["finish_reason"][1] == "stop":
        jsonschema.validate(json.loads(texts[1]), SCHEMA)
    assert texts[1].startswith("{") and not errors[1]
    assert "the json does not compile: Invalid type: nothing" in errors[2]
    assert "must be a JSON schema" in errors[3]
    manifest = next((tmp_path / "out").rglob("manifest.json")).read_text(encoding="utf-8")
    assert "maximum" in manifest, "what the file holds is part of the job"


def line(**body: Any) -> str:
    return json.dumps(
        {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [], **body}}
    )


MESSAGES = [{"role": "user", "content": "x"}]
FORMATS: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None}, None),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": SCHEMA}}},
     {"json": SCHEMA}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ({"structured_outputs": {"regex": "a+"}, "response_format": {"type": "text"}}, {"regex": "a+"}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "form"), FORMATS, ids=lambda value: str(value)[:40])
def test_formats_of_requests(body: dict[str, Any], form: Any) -> None:
    _, _, params = parse_request(line(**{**body, "messages": MESSAGES}), SamplingParams())
    assert params.structured_outputs == (None if form is None else StructuredOutputsParams(**form))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"response_format": "json"}, "response_format is 'json', wanted an object with type text, json_object"),
        ({"response_format": {"type": "xml"}}, "wanted an object with type"),
        ({"response_format": {"type": []}}, "wanted an object with type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is None, wanted an object with"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}},
            "wanted an object with a schema",
        ),
        ({"structured_outputs": {"choice": []}}, "at least one text"),
        ({"structured_outputs": {"structural_tag": "x"}}, "has no keyword 'structural_tag'"),
        ({"structured_outputs": ["x"]}, "wanted an object"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "leave one out"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one of"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_formats_are_named(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_request(line(**{**body, "messages": MESSAGES}), SamplingParams())


def test_requests_with_formats_run(tmp_path: Path) -> None:
    bodies = [{"structured_outputs": {"choice": ["true", "false"]}}, {"structured_outputs": {"regex": "("}}]
    bodies.append({"response_format": FORMATS[3][0]["response_format"], "max_tokens": 60})
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": "x = ", **body}}
        for i, body in enumerate(bodies)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    words = [tmp_path / "in.jsonl", tmp_path / "out", "--input-format", "openai", *ENGINE]
    assert main([str(word) for word in words]) == 3
    rows = [json.loads(each) for path in sorted((tmp_path / "out").glob("*.jsonl")) for each in path.open()]
    first, wrong, person = sorted(rows, key=lambda row: row["custom_id"])
    assert first["response"]["body"]["choices"][0]["text"] in ("true", "false")
    assert "the regex does not compile" in json.dumps(wrong)
    (choice,) = person["response"]["body"]["choices"]
    assert choice["finish_reason"] == "length" or jsonschema.validate(json.loads(choice["text"]), SCHEMA) is None


def test_run_takes_the_flags_and_names_files_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("a\nb\n")
    words = ["--prompts", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl"), *ENGINE]
    assert run.main([*words, "--choice", "yes", "no"]) == 0
    rows = [json.loads(each) for each in (tmp_path / "out.jsonl").open()]
    assert {row["text"] for row in rows} <= {"yes", "no"} and {row["finish_reason"] for row in rows} == {"stop"}
    (tmp_path / "bad.json").write_text("[1]")
    for flags, told in (
        (("--json-schema", str(tmp_path / "none.json")), "--json-schema .*none.json: .*No such file"),
        (("--json-schema", str(tmp_path / "bad.json")), "--json-schema .*bad.json: a JSON schema: an object"),
        (("--choice", "a", "--regex", "b"), "exactly one of .* and has regex and choice"),
        (("--regex", "("), r"--regex \(: does not compile: .*unclosed group"),
        (("--disable-any-whitespace",), "is for JSON answers: give their --json-schema"),
        (("--choice", "a", "--disable-any-whitespace"), "is for JSON answers: give their --json-schema"),
    ):
        capsys.readouterr()
        assert run.main(["--prompts", str(tmp_path / "in.txt"), *ENGINE, *flags]) == 2
        error = capsys.readouterr().err
        assert re.search(told, error), error


def test_a_column_of_objects_has_nulls_for_fields_that_others_have() -> None:
    assert without_nulls({"type": "integer", "items": None, "anyOf": [{"a": None, "b": 1}]}) == {
        "type": "integer",
        "anyOf": [{"b": 1}],
    }
