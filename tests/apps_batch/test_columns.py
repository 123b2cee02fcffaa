"""Columns of text files: what goes out equals what came in."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexbatch.apps.jobs.columns import ROW_ERROR, holds_json, parse_types
from flexbatch.apps.jobs.text_source import chunks_of
from flexbatch.text.files import json_text, parse_json
from flexbatch.validation.errors import ConfigurationError
from tests.apps_batch.fake import FakeLLM, FakeTokenizer
from tests.apps_batch.helpers import read_output, run_here
from tests.apps_batch.test_sources import rows_in_parts, source_of

IN_TURN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def json_rows(
    path: Path, lines: list[str] | bytes, part_rows: int = 3, **settings: object
) -> tuple[pa.Schema, list[dict[str, Any]]]:
    path.write_bytes(lines if isinstance(lines, bytes) else "\n".join(lines).encode())
    source = source_of(path, **settings)
    rows = rows_in_parts(source, part_rows)
    for name in source.schema.names:
        if holds_json(source.schema.field(name)):
            for row in rows:
                row[name] = None if row[name] is None else parse_json(row[name], exact=True, constants=True)
    return source.schema, rows


@pytest.mark.parametrize(
    ("literals", "kind"),
    [
        (["1", "-2", "null"], pa.int64()),
        (["9007199254740993", "9007199254740992"], pa.int64()),
        (["9223372036854775807", "-9223372036854775808"], pa.int64()),
        (["9223372036854775808", "18446744073709551615", "0"], pa.uint64()),
        (["-1", "18446744073709551615"], pa.decimal128(38, 0)),
        (["340282366920938463463374607431768211456"], pa.decimal256(76, 0)),
        (["9" * 100], None),
        (["9" * 5000], None),
        (["1", "1.5"], pa.float64()),
        (["1.10", "1e5", "-0.0", "1e-300"], pa.float64()),
        (["0.10000000000000000555", "0.1"], pa.float64()),
        (["9007199254740993", "0.5"], pa.decimal128(38, 1)),
        (["12345678901234.567"], pa.decimal128(38, 3)),
        (["0.1234567890123456789012", "7"], pa.decimal128(38, 22)),
        (["1e400", "1"], None),
        (["1e-400", "1"], None),
        (["true", "false", "null"], pa.bool_()),
        (["true", "1"], None),
        (['"1"', "1"], None),
        (['"2024-01-01"', '"2024-01-01T00:00:00Z"'], pa.string()),
        (["null", "null"], pa.null()),
        (["[1, 2]", "[]", "null"], pa.list_(pa.int64())),
        (["[1, 9007199254740993]", "[0.5]"], pa.list_(pa.decimal128(38, 1))),
        (["[1]", '["a"]'], None),
        (['{"a": 18446744073709551615}', '{"a": 1}'], pa.struct([("a", pa.uint64())])),
        (['{"a": 1}', '{"a": "x"}'], None),
        (["{}", "{}"], None),
        (['[{"a": {"b": [1.5]}}]', "[]"], pa.list_(pa.struct([("a", pa.struct([("b", pa.list_(pa.float64()))]))]))),
        (["[" * 60 + "]" * 60], None),
    ],
)
def test_no_value_is_changed_to_fit_a_type(tmp_path: Path, literals: list[str], kind: pa.DataType | None) -> None:
    """The type is that of all lines, though they come in chunks; the values are those of the file."""
    schema, rows = json_rows(
        tmp_path / "x.jsonl", [f'{{"id": {number}, "x": {literal}}}' for number, literal in enumerate(literals)]
    )
    field = schema.field("x")
    assert (None if holds_json(field) else field.type) == kind
    for row, literal in zip(rows, literals, strict=True):
        wanted = parse_json(literal, exact=True)
        if kind in (pa.float64(),) and wanted is not None:
            wanted = float(wanted)
        assert row["x"] == wanted, f"{row['x']!r} came out of {literal}"


numbers = (
    st.integers()
    | st.integers(2**52, 2**66)
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.floats(allow_nan=False, allow_infinity=False)
)
cells = st.recursive(
    st.none() | st.booleans() | numbers | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)


def same(out: Any, value: Any) -> bool:
    """Equal as numbers are, to the last digit of a literal; an absent field is a null one."""
    if isinstance(value, dict):
        return isinstance(out, dict) and all(same(out.get(name), value.get(name)) for name in {*out, *value})
    if isinstance(value, list):
        return isinstance(out, list) and len(out) == len(value) and all(map(same, out, value))
    if isinstance(value, bool | str | None):
        return out == value and type(out) is type(value)
    literal = Decimal(json_text(value))
    return literal in (Decimal(out), Decimal(str(out)))


@IN_TURN
@given(st.lists(st.dictionaries(st.sampled_from(["x", "y", "z"]), cells, max_size=3), min_size=1, max_size=6))
def test_any_json_lines_come_out_as_they_went_in(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    rows = [{"id": number, **row} for number, row in enumerate(rows)]
    _, found = json_rows(tmp_path / "x.jsonl", [json_text(row) for row in rows], part_rows=2)
    for row, out in zip(rows, found, strict=True):
        assert all(same(out[name], row.get(name)) for name in out), (row, out)


def test_a_prompt_may_change_its_type_and_only_that_row_fails(tmp_path: Path) -> None:
    lines = [
        '{"id": 1, "prompt": "a", "note": 1}',
        '{"id": "two", "prompt": 5, "note": {"x": 1}}',
        '{"id": 3, "prompt": "ü \\"q\\"", "note": "n"}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    assert run_here(tmp_path / "in.jsonl", tmp_path / "out") == 3
    table = read_output(tmp_path / "out")
    assert table["error"].to_pylist() == ["", "'prompt' is 5, not text", ""]
    for name, values in (("id", [1, "two", 3]), ("prompt", ["a", 5, 'ü "q"']), ("note", [1, {"x": 1}, "n"])):
        assert [json.loads(cell) for cell in table[name].to_pylist()] == values
    assert (
        run_here(
            tmp_path / "in.jsonl", tmp_path / "typed", "--column-types", "id=string", "prompt=string", "note=string"
        )
        == 0
    )
    assert read_output(tmp_path / "typed").select(["id", "prompt", "note"]).to_pylist() == [
        {"id": "1", "prompt": "a", "note": "1"},
        {"id": "two", "prompt": "5", "note": '{"x": 1}'},
        {"id": "3", "prompt": 'ü "q"', "note": "n"},
    ]
    assert run_here(tmp_path / "in.jsonl", tmp_path / "int", "--column-types", "id=int64", "prompt=string") == 3
    table = read_output(tmp_path / "int")
    assert table["id"].to_pylist() == [1, None, 3] and table["error"].to_pylist() == [
        "",
        "column 'id': 'two' is no int64",
        "",
    ]


@pytest.mark.parametrize("kind", ["int64", "float64", "decimal(10,2)", "string", "bool", "date32"])
def test_a_number_with_a_huge_exponent_costs_nothing(tmp_path: Path, kind: str) -> None:
    lines = ['{"prompt": "a", "n": 1e999999999}', '{"prompt": "b", "n": 1e-999999999}', '{"prompt": "c", "n": null}']
    _, found = json_rows(tmp_path / "x.jsonl", lines, column_types=(f"n={kind}",))
    assert [row["prompt"] for row in found] == ["a", "b", "c"]


def test_templates_see_values_as_they_were_written(tmp_path: Path) -> None:
    lines = ['{"a": 1.10, "b": {"c": 18446744073709551616}, "d": "x"}', '{"a": "y", "b": {"c": 5}, "d": null}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    assert run_here(tmp_path / "in.jsonl", tmp_path / "out", "--prompt-template", "{a}|{b}|{b.c}") == 0
    sizes = [1 + len(text) for text in ('1.10|{"c": 18446744073709551616}|18446744073709551616', 'y|{"c": 5}|5')]
    assert read_output(tmp_path / "out")["num_input_tokens"].to_pylist() == sizes


SEPARATED = "a\u2028b\u2029c\x85d\x0be\x0cf\rg\x1ch"


def test_separators_that_are_no_ends_of_lines(tmp_path: Path) -> None:
    """In JSON lines, in CSV cells and in the answers of OpenAI batch files, which --retry-failed reads again."""
    rows = [{"id": i, "prompt": f"{i} {SEPARATED.replace(chr(13), '')}"} for i in range(5)]
    (tmp_path / "in.jsonl").write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), newline="")
    assert run_here(tmp_path / "in.jsonl", tmp_path / "lines") == 0
    assert read_output(tmp_path / "lines").select(["id", "prompt"]).to_pylist() == rows
    requests = [
        {"custom_id": f"{i}{SEPARATED}", "url": "/v1/completions", "body": {"prompt": "x" * (1 + 2000 * (i == 3))}}
        for i in range(5)
    ]
    (tmp_path / "openai.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in requests), newline=""
    )
    words = (tmp_path / "openai.jsonl", tmp_path / "answers", "--input-format", "openai")
    assert run_here(*words) == 3 and run_here(*words, "--retry-failed") == 3
    assert run_here(*words, "--retry-failed", max_positions=5000) == 0
    data = (tmp_path / "answers" / "part-00000.jsonl").read_bytes()
    assert [json.loads(line)["custom_id"] for line in data.split(b"\n")[:-1]] == [row["custom_id"] for row in requests]


@pytest.mark.parametrize("form", ["jsonl", "openai", "csv"])
def test_a_byte_order_mark_is_skipped_and_other_encodings_refused(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {
        "jsonl": '{"prompt": "a"}\n{"prompt": "b"}\n',
        "openai": '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}}\n',
        "csv": "prompt,n\na,1\n",
    }[form]
    path = tmp_path / f"in.{'csv' if form == 'csv' else 'jsonl'}"
    path.write_bytes(text.encode("utf-8-sig"))
    assert run_here(path, tmp_path / "out", "--input-format", form) == 0
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes(text.encode(encoding))
        assert run_here(path, tmp_path / encoding, "--input-format", form) == 2
        assert f"{path.name} is {encoding.upper()}" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@IN_TURN
@given(
    st.lists(
        st.lists(
            st.text(st.characters(codec="utf-8") | st.sampled_from('",\n\r\u2028 01.e'), max_size=8),
            min_size=3,
            max_size=3,
        ),
        max_size=5,
    )
)
def test_any_cells_of_csv_come_out_as_they_went_in(tmp_path: Path, end: str, rows: list[list[str]]) -> None:
    sink = io.StringIO(newline="")
    csv.writer(sink, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["a", "b", "c"], *rows])
    (tmp_path / "x.csv").write_bytes(sink.getvalue().encode())
    assert [list(row.values()) for row in rows_in_parts(source_of(tmp_path / "x.csv"), 2)] == rows


@pytest.mark.parametrize(
    "cell", ["02139", "1.10", "1e5", "True", "007", "NaN", "null", " x ", "1_000", "2024-01-01", "", "0x1F", "+1", "-0"]
)
def test_cells_are_what_was_written(tmp_path: Path, cell: str) -> None:
    (tmp_path / "in.csv").write_text(f"prompt,code\na,{cell}\nb,{cell}\n")
    assert run_here(tmp_path / "in.csv", tmp_path / "out") == 0
    assert read_output(tmp_path / "out")["code"].to_pylist() == [cell, cell]


def test_what_one_row_of_csv_holds_is_its_own_error(tmp_path: Path) -> None:
    lines = [
        b"id,prompt,n",
        b"1,a,1",
        b"2,b",
        b"3,c,3,4",
        b"4,\xff,4",
        b"5,e,five",
        b'6,"f\r\ng",',
        b"7,h\x00i,7",
        b"\xfe,j,8",
    ]
    (tmp_path / "in.csv").write_bytes(b"\n".join(lines))
    words = (tmp_path / "in.csv", tmp_path / "out", "--column-types", "n=int64", "--part-rows", 3)
    assert run_here(*words) == 3 and run_here(*words, "--retry-failed") == 3
    table = read_output(tmp_path / "out")
    assert table["error"].to_pylist() == [
        "", "in.csv: line 3 has 2 cells, the header has 3", "in.csv: line 4 has 4 cells, the header has 3",
        "'prompt' is not UTF-8: invalid start byte at byte 0", "column 'n': 'five' is no int64", "", "",
        "'id' is not UTF-8: invalid start byte at byte 0",
    ]  # fmt: skip
    assert table["n"].to_pylist() == [1, None, 3, 4, None, None, 7, 8]
    table.validate(full=True)  # text that is not UTF-8 would make the folder one that nobody can read
    assert table["id"].to_pylist() == ["1", "2", "3", "4", "5", "6", "7", None]
    assert table["prompt"].to_pylist()[3:7] == [None, "e", "f\r\ng", "h\x00i"]


def test_the_name_of_row_errors_is_no_column_of_the_input(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,{ROW_ERROR}\na,b\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "a", ROW_ERROR: "b"}) + "\nnot JSON\n")
    pq.write_table(pa.table({"prompt": ["a"], ROW_ERROR: ["b"]}), tmp_path / "c.parquet")
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        assert run_here(path, tmp_path / f"out{number}") == 2
        assert f"{path.name}: a column has the name" in capsys.readouterr().err


def test_numbers_in_messages_are_doubles(tmp_path: Path) -> None:
    """A template that writes a tool's arguments as JSON finds no Decimal."""
    seen: list[Any] = []

    class Template(FakeTokenizer):
        def apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
            seen.append(json.dumps(messages))
            return super().apply_chat_template(messages, **kwargs)

    calls = [{"function": {"name": "f", "arguments": {"x": 1.5, "y": [10**25]}}}]
    rows = [{"messages": [{"role": "assistant", "content": "", "made": each}]} for each in (calls, "text", calls)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fake = FakeLLM()
    fake.tokenizer = Template()
    assert run_here(tmp_path / "in.jsonl", tmp_path / "out", fake=fake) == 0
    assert '"arguments": {"x": 1.5, "y": [10000000000000000000000000]}' in next(
        text for text in seen if '"made"' in text
    )


def test_settings_may_come_from_cells_of_text(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("prompt,m,s\na,2,\nb,,x\nc,many,\nd,1e999999999,\n")
    assert (
        run_here(
            tmp_path / "in.csv", tmp_path / "out", "--max-tokens-column", "m", "--stop-column", "s", "--max-tokens", 4
        )
        == 3
    )
    table = read_output(tmp_path / "out")
    assert table["num_generated_tokens"].to_pylist()[0] <= 2 < table["num_generated_tokens"].to_pylist()[1] + 1
    assert [error[:20] for error in table["error"].to_pylist()] == [
        "",
        "",
        "setting max_tokens i",
        "setting max_tokens i",
    ]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("x.csv", b"a,b,a\n1,2,3\n", "column names repeat: a"),
        ("x.csv", b"a,,\n1,2,3\n", "column names repeat: "),
        ("x.csv", b"", "is empty: it needs a line"),
        ("x.csv", b"a\xff,b\n1,2\n", "the name of column 1 is not UTF-8"),
        ("x.csv", b'a,b\n1,2\n3,"4\n5,6\n7,8\n', "line 3 opens a quote that is never closed"),
        ("x.jsonl", b'[{"a": 1},\n{"a": 2}]\n', "is a JSON list, not JSON lines"),
        ("x.jsonl", b'[{"a": 1}, {"a": 2}]', "is a JSON list, not JSON lines"),
        ("x.jsonl", b"prompt\nhello\n", "no line of the input is a JSON object: x.jsonl: line 1: not JSON"),
    ],
)
def test_what_is_no_table_is_refused_before_the_job(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigurationError, match=told):
        source_of(tmp_path / name)


def test_lines_that_cannot_be_read_are_errors_of_their_rows(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": "a", "n": 1}',
        b'{"prompt": ',
        b"[1]",
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"n": 1, "n": 2}',
        b'{"prompt": "b", "n": "\\ud800"}',
        b'{"prompt": "\\ud800", "n": 7}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n\n".join(lines))
    words = (tmp_path / "in.jsonl", tmp_path / "out", "--part-rows", 3)
    assert run_here(*words) == 3 and run_here(*words, "--retry-failed") == 3
    table = read_output(tmp_path / "out")
    assert ROW_ERROR not in table.schema.names and table["n"].to_pylist() == [1, None, None, None, None, None, None, 7]
    reasons = [
        "",
        "not JSON",
        "not a JSON object",
        "not UTF-8",
        "more than 200 levels",
        "stands twice",
        "half of a surrogate",
        "half of a surrogate",
    ]
    for number, (error, reason) in enumerate(zip(table["error"].to_pylist(), reasons, strict=True)):
        assert reason in error and (not reason or error.startswith(f"in.jsonl: line {2 * number + 1}: ")), error


def test_a_line_that_is_too_long_is_skipped_and_its_row_has_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flexbatch.apps.jobs.text_source.chunks_of", lambda stream, path, max_line: chunks_of(stream, path, 100, 1000)
    )
    rows = [json.dumps({"id": i, "prompt": "x" * (5000 if i in (3, 9) else i)}) for i in range(10)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    source = source_of(tmp_path / "in.jsonl")
    found = rows_in_parts(source, 4)
    assert [row["id"] for row in found] == [0, 1, 2, None, 4, 5, 6, 7, 8, None]
    assert [row[ROW_ERROR] is None for row in found] == [i not in (3, 9) for i in range(10)] and "line 10 is" in found[
        9
    ][ROW_ERROR]
    assert rows_in_parts(source, 4, every=2) == found[:4] + found[8:]


def test_types_that_are_none_are_named(tmp_path: Path) -> None:
    assert parse_types(["a=b=int64", "c=decimal(50, 3)"]) == {"a=b": pa.int64(), "c": pa.decimal256(50, 3)}
    for word in ("id", "=int64", "id=integer", "id=list", "id=decimal(99,0)", "id="):
        with pytest.raises(ConfigurationError, match="column_types="):
            parse_types([word])
    with pytest.raises(ConfigurationError, match="'a' stands there twice"):
        parse_types(["a=int64", "a=string"])
    (tmp_path / "x.csv").write_text("a\n1\n")
    with pytest.raises(ConfigurationError, match="no column 'b'; its columns are: a"):
        source_of(tmp_path / "x.csv", column_types=("b=int64",))
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigurationError, match="parquet input brings types of its own"):
        source_of(tmp_path / "x.parquet", column_types=("a=int64",))
