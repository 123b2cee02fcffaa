"""Prompt files of every kind, and the output file."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from flexbatch.cli import prompt_files, random_prompts, result_file, result_rows
from flexbatch.cli.prompt_files import PromptRow
from flexbatch.cli.result_file import ResultFile
from flexbatch.cli.result_rows import RESULTS
from flexbatch.cli.run_work import digest
from flexbatch.files.atomic import remove_leftovers
from flexbatch.request import Completion, TokenLogprob
from flexbatch.text.files import parse_json
from flexbatch.validation.errors import ConfigurationError

PROMPTS = ["first\nwith two lines", "zweiter größer 🙂", "third\u2028still third"]


def prompts_of(path: Path) -> list:
    return [row.prompt for row in prompt_files.read_prompts(path)]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path) -> None:
    objects = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    assert prompts_of(written(tmp_path, "a.json", json.dumps(PROMPTS))) == PROMPTS
    assert prompts_of(written(tmp_path, "b.json", json.dumps(objects))) == PROMPTS
    lines = "\n".join(json.dumps(value, ensure_ascii=False) for value in objects)
    assert prompts_of(written(tmp_path, "c.jsonl", lines + "\n\n")) == PROMPTS
    pyarrow.parquet.write_table(pyarrow.table({"prompt": PROMPTS, "other": [1, 2, 3]}), tmp_path / "d.parquet")
    assert prompts_of(tmp_path / "d.parquet") == PROMPTS
    assert prompts_of(written(tmp_path, "e.TXT", "one\n\n  two\n")) == ["one", "  two"]


def test_prompts_may_be_token_ids_or_chats(tmp_path: Path) -> None:
    values = [[1, 2, 3], [{"role": "user", "content": "hi"}]]
    lines = "\n".join(json.dumps({"prompt": value}) for value in values)
    assert prompts_of(written(tmp_path, "a.jsonl", lines)) == values


def test_bundled_prompts_are_a_dozen_different_ones() -> None:
    prompts = prompts_of(prompt_files.BUNDLED_PROMPTS)
    assert len(set(prompts)) == 12


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", "x", "told by its ending: .txt, .json, .jsonl, .csv, .tsv, .parquet"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.txt", "", "holds no prompts"),
        ("a.json", "[]", "holds no prompts"),
        ("a.jsonl", "", "holds no prompts"),
        ("a.txt", b"\xff\xfe", "is UTF-16, as its byte order mark says"),
        ("a.txt", b"\xff", "is not UTF-8"),
        ("a.json", "{", "is not JSON: .*character 1"),
        ("a.json", '["a",\n"b",]', "is not JSON: .*line 2, character 5"),
        ("a.jsonl", '"a"\r"b"', "line 1 is not JSON"),
        ("a.jsonl", '"a"\n{"prompt": "b", "prompt": "c"}', "line 2: the key 'prompt' stands twice"),
        ("a.jsonl", "[" * 100_000 + "]" * 100_000, "line 1 is not JSON .*: more than 200 levels"),
        ("a.json", "[" * 100_000, "more than 200 levels"),
        ("a.json", '["a"]'.encode("utf-16"), "is UTF-16"),
        ("a.jsonl", '"a"'.encode("utf-32"), "is UTF-32"),
        ("a.jsonl", b"\x00\x00", "line 1 is not JSON"),
        ("a.jsonl", b'"a"\n"\xff"', "is not UTF-8 text: .*in line 2"),
        ("a.json", "{}", "needs a list of prompts; it holds a dict"),
        ("a.json", '["a", 5]', "element 1 holds a int"),
        ("a.jsonl", '"a"\n{"text": "b", "id": 1}', 'line 2 has no "prompt"; it has text, id'),
        ("a.jsonl", '"a"\n{}', 'line 2 has no "prompt"; it has nothing'),
        ("a.jsonl", '"a"\n\nnull', "line 3 holds a NoneType"),
        ("a.jsonl", '"a"\nb', "line 2 is not JSON"),
        ("a.parquet", "no parquet", "is not a Parquet file"),
        ("none/a.txt", None, "cannot be read: No such file"),
    ],
)
def test_errors_name_file_and_place(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    path = tmp_path / name if content is None else written(tmp_path, name, content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        prompt_files.read_prompts(path)
    assert str(path) in str(caught.value)


MARK = "\ufeff"


def test_what_careless_editors_leave_is_not_in_prompts(tmp_path: Path) -> None:
    """Byte order marks, ends of lines of other systems, and characters that only look like ends of lines."""
    texts = ["one", "two \u2028 \x85 \x0b \r three"]
    values = [json.dumps(text, ensure_ascii=False) for text in texts]
    for end in ("\n", "\r\n"):
        for mark in ("", MARK):
            assert prompts_of(written(tmp_path, "a.txt", mark + end.join(texts) + end)) == texts
            assert prompts_of(written(tmp_path, "a.jsonl", mark + end.join(values) + end)) == texts
            assert prompts_of(written(tmp_path, "a.json", f"{mark}[{end}{f',{end}'.join(values)}{end}]{end}")) == texts
    with pytest.raises(ConfigurationError, match="holds no prompts"):
        prompt_files.read_prompts(written(tmp_path, "a.txt", MARK))


NUMBERS = [
    "1.10",
    "18446744073709551617",
    "0.12345678901234567890123",
    "1E+400",
    "-0.0",
    "9" * 5000,
    "1E-7",
    "-1",
    "NaN",
]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_come_along_digit_by_digit(tmp_path: Path, number: str) -> None:
    """Also inside of lists and objects, and half of a surrogate pair as it was; in the prompt, numbers are doubles."""
    field, prompt = f'{{"a": [{number}, "\\ud83d"]}}', '[{"role": "user", "content": "x", "weight": 1.50}]'
    path = written(tmp_path, "a.jsonl", f'{{"x": {number}, "\\ude00": {field}, "prompt": {prompt}}}')
    (row,) = prompt_files.read_prompts(path)
    assert json.dumps(row.prompt) == prompt.replace("1.50", "1.5")
    json.dumps(row.prompt)
    with ResultFile(tmp_path / "out.jsonl") as out:
        out.begin({"prompts": digest([row.prompt, row.fields])}, [row.prompt])
        out.add(0, result_rows.output_line(row, Completion((1,), [2], "t", "stop")))
    line = (tmp_path / "out.jsonl").read_bytes().decode()
    assert f'"x": {number}, ' in line and f'"a": [{number}, "\\ud83d"]' in line and '"\\ude00"' in line
    parse_json(line, exact=True, constants=True)


def column_cases() -> dict[str, tuple[pyarrow.Array, object]]:
    arrow, moment = pyarrow, pyarrow.timestamp("us", "Europe/Berlin")
    return {
        "uint64": (arrow.array([2**64 - 1], arrow.uint64()), 2**64 - 1),
        "nanoseconds": (arrow.array([1], arrow.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
        "time of nanoseconds": (arrow.array([1], arrow.time64("ns")), "00:00:00.000000001"),
        "zone": (arrow.array([0], arrow.int64()).cast(moment), "1970-01-01 01:00:00+01:00"),
        "the year 10183": (arrow.array([3_000_000], arrow.date32()), "10183-09-21"),
        "dictionary": (arrow.array(["a"]).dictionary_encode(), "a"),
        "map": (arrow.array([[("k", 1)]], arrow.map_(arrow.string(), arrow.int32())), [["k", 1]]),
        "nested null": (arrow.array([{"a": None, "b": [None, {"c": 1}]}]), {"a": None, "b": [None, {"c": 1}]}),
        "null": (arrow.nulls(1), None),
        "view": (arrow.array(["a"], arrow.string_view()), "a"),
        "long decimal": (arrow.array([decimal.Decimal("1.10")], arrow.decimal256(50, 2)), "1.10"),
    }


@pytest.mark.parametrize("kind", column_cases())
def test_columns_of_odd_types_come_along(tmp_path: Path, kind: str) -> None:
    column, expected = column_cases()[kind]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], "x": column}), tmp_path / "a.parquet")
    (row,) = prompt_files.read_prompts(tmp_path / "a.parquet")
    assert row.fields == {"x": expected}


def test_what_a_parquet_file_cannot_be_read_for_is_named(tmp_path: Path) -> None:
    torn = pyarrow.array([b"a", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    ones = pyarrow.array([1, 1])
    twice = pyarrow.StructArray.from_arrays([ones, ones], names=["a", "a"])
    tables = {
        "column names repeat: x": pyarrow.Table.from_arrays([torn, ones, ones], names=["prompt", "x", "x"]),
        "column names repeat: prompt": pyarrow.Table.from_arrays([torn, torn], names=["prompt", "prompt"]),
        "row 1, column 'prompt' is not UTF-8": pyarrow.table({"prompt": torn}),
        "row 1, column 'prompt' is not UTF-8: invalid": pyarrow.table({"prompt": torn.cast(pyarrow.binary())}),
        "row 0, column 'x' cannot be read as JSON": pyarrow.table({"prompt": ["a", "b"], "x": twice}),
    }
    for message, table in tables.items():
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(ConfigurationError, match=message):
            prompt_files.read_prompts(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [b"gr\xc3\xb6\xc3\x9fer"]}), tmp_path / "a.parquet")
    assert prompts_of(tmp_path / "a.parquet") == ["größer"]


def test_a_parquet_file_needs_its_column(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigurationError, match='no column "prompt"; it has text, n'):
        prompt_files.read_prompts(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigurationError, match="row 1 holds a NoneType"):
        prompt_files.read_prompts(tmp_path / "b.parquet")


def test_synthetic_prompts_differ_and_repeat() -> None:
    prompts = random_prompts.synthetic_prompts(50, 20, 300, seed=3)
    assert len({tuple(prompt) for prompt in prompts}) == 50
    assert all(len(prompt) == 20 and min(prompt) >= 0 and max(prompt) < 300 for prompt in prompts)
    assert prompts[:10] == random_prompts.synthetic_prompts(10, 20, 300, seed=3)
    assert prompts != random_prompts.synthetic_prompts(50, 20, 300, seed=4)


def test_output_lines_hold_what_was_promised() -> None:
    one = Completion(
        [1, 2, 3],
        [7, 8],
        " größer",
        "length",
        logprobs=[{7: TokenLogprob(7, -0.5, 1)}, {8: TokenLogprob(8, -2.0, 3)}],
    )
    two = Completion([4], [9], "x", "stop", prompt_logprobs=[None])
    two.samples = [two, Completion([4], [5], "y", "stop")]
    first, second = (
        result_rows.output_line(PromptRow(prompt), answer) for prompt, answer in (("größer", one), ([4], two))
    )
    expected = {
        "prompt": "größer",
        "text": " größer",
        "token_ids": [7, 8],
        "finish_reason": "length",
        "num_input_tokens": 3,
        "num_generated_tokens": 2,
    }
    assert {key: first[key] for key in expected} == expected
    assert first["logprobs"][1] == [{"token_id": 8, "logprob": -2.0, "rank": 3}]
    assert [sample["text"] for sample in second["samples"]] == ["x", "y"] and second["prompt_logprobs"] == [None]


FIELDS = {"id": 2**63 - 1, "größe": 1.5, "tags": ["a", {"b": None}], "": True, "input_text": "x"}


def test_the_other_fields_of_the_input_come_along(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        content = json.dumps({**FIELDS, "prompt": "p"})
        (row,) = prompt_files.read_prompts(written(tmp_path, name, f"[{content}]" if name == "a.json" else content))
        assert row == PromptRow("p", FIELDS)
        line = result_rows.output_line(row, Completion((1,), [2], "t", "stop"))
        assert {name: line[name] for name in FIELDS} == FIELDS and line["prompt"] == "p" and line["text"] == "t"


def test_no_field_is_lost_to_a_result_of_the_same_name() -> None:
    fields = {
        **{name: f"given {name}" for name in RESULTS if name != "prompt"},
        "input_text": "given already",
        "input_input_text": "and this",
    }
    line = result_rows.output_line(PromptRow("p", fields), Completion((1,), [2], "t", "error", error="why"))
    assert line["text"] == "t" and line["error"] == "why"
    assert set(fields.values()) <= {value for value in line.values() if isinstance(value, str)}
    assert line["input_token_ids"] == "given token_ids"


def test_columns_of_every_type_come_along_as_json(tmp_path: Path) -> None:
    columns = {
        "day": pyarrow.array([datetime.date(2026, 1, 2)]),
        "price": pyarrow.array([decimal.Decimal("1.10")]),
        "raw": pyarrow.array([b"\x00\xff"]),
        "rate": pyarrow.array([float("nan")]),
        "nested": pyarrow.array([{"a": [1, None], "b": b"x"}]),
        "big": pyarrow.array([2**63 - 1]),
    }
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], **columns}), tmp_path / "a.parquet")
    (row,) = prompt_files.read_prompts(tmp_path / "a.parquet")
    nested = {"a": [1, None], "b": "eA=="}
    assert row.fields == {
        "day": "2026-01-02",
        "price": "1.10",
        "raw": "AP8=",
        "rate": None,
        "nested": nested,
        "big": 2**63 - 1,
    }
    json.dumps(row.fields, allow_nan=False)


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "out.jsonl", "old\n")
    with pytest.raises(KeyboardInterrupt), result_file.whole_file(path) as stream:
        stream.write("half a li")
        raise KeyboardInterrupt
    assert path.read_text() == "old\n" and [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


def test_what_a_killed_run_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    written(tmp_path, ".out.jsonl.12345.tmp", "half a li")
    with result_file.whole_file(tmp_path / "out.jsonl") as first:
        assert [entry.name for entry in tmp_path.iterdir()] == [Path(first.name).name]
        remove_leftovers(tmp_path / "out.jsonl")
        first.write("whole\n")
    assert (tmp_path / "out.jsonl").read_text() == "whole\n" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_to_is_found_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"none/out\.jsonl: cannot be written: No such file"),
        result_file.whole_file(tmp_path / "none" / "out.jsonl"),
    ):
        pass
