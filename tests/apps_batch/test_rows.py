from __future__ import annotations

import pyarrow as pa
import pytest

from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.prompts import Template, messages_prompt
from flexbatch.apps.jobs.rows import RowReader, row_seed
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.request import SamplingParams
from flexbatch.validation.errors import ConfigurationError

GREEDY = SamplingParams(temperature=0)


def rows_of(
    table: pa.Table, params: SamplingParams = GREEDY, folder: str = "", partitions: tuple[str, ...] = (), **how: object
) -> list:
    reader = RowReader(JobConfig(**how), table.schema, partitions, params, 5)  # type: ignore[arg-type]
    part = Part(3, folder, 100, len(table))
    return list(reader.rows(table, part, lambda row: False))


def test_a_template_takes_columns_nested_fields_and_partitions() -> None:
    table = pa.table({"text": ["a", None], "meta": [{"lang": "de"}, {"lang": "en"}], "n": [1, 2]})
    rows = rows_of(table, folder="year=2024", partitions=("year",), prompt_template="{{{text}}} {meta.lang} {n} {year}")
    assert rows[0].prompt == "{a} de 1 2024"
    assert (rows[1].error, rows[1].prompt) == ("template field 'text' is missing or null", None)
    assert [(row.part, row.offset, row.index) for row in rows] == [(3, 0, 100), (3, 1, 101)]


@pytest.mark.parametrize("text", ["{", "{}", "{0:>{x}}", "{a!r}", "{a[0]}", "{a:5}", "}"])
def test_a_template_is_names_of_columns_and_nothing_else(text: str) -> None:
    with pytest.raises(ConfigurationError, match="template"):
        Template(text)


def test_a_template_without_fields_is_the_same_prompt_for_every_row() -> None:
    assert [row.prompt for row in rows_of(pa.table({"x": [1, 2, 3]}), prompt_template="Tell a joke")] == [
        "Tell a joke"
    ] * 3


def test_attributes_of_values_cannot_be_reached() -> None:
    assert (
        rows_of(pa.table({"a": ["x"]}), prompt_template="{a.__class__}")[0].error
        == "template field 'a.__class__' is missing or null"
    )


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
)
def test_a_prompt_column_is_any_kind_of_text(kind: pa.DataType) -> None:
    values = [b"a\xc3\xa4", None] if kind == pa.binary() else ["aä", None]
    rows = rows_of(pa.table({"p": pa.array(values).cast(kind)}), prompt_column="p")
    assert [row.prompt for row in rows] == ["aä", None] and rows[1].error == "'p' is null"


def test_bytes_that_are_no_text_are_an_error_of_their_row() -> None:
    rows = rows_of(pa.table({"p": [b"ok", b"\xff\xfe"]}), prompt_column="p")
    assert rows[0].prompt == "ok" and rows[1].error == "'p' is not UTF-8: invalid start byte at byte 0"


def torn_text(*values: bytes) -> pa.Array:
    """A text column of bytes that nobody has checked, as a careless writer leaves them."""
    return pa.array(values, pa.binary()).view(pa.string())


def test_text_that_is_not_utf8_is_an_error_of_its_row() -> None:
    rows = rows_of(pa.table({"p": torn_text(b"a", b"\xff\xfe", b"", b"b\x80")}), prompt_column="p")
    assert [row.prompt for row in rows] == ["a", None, "", None]
    assert [row.error for row in rows] == [
        "",
        "'p' is not UTF-8: invalid start byte at byte 0",
        "",
        "'p' is not UTF-8: invalid start byte at byte 1",
    ]


def test_a_time_that_python_cannot_hold_is_an_error_of_its_row() -> None:
    at = pa.array([0, 10**18], pa.int64())
    first, second = rows_of(pa.table({"at": at.view(pa.timestamp("us"))}), prompt_template="{at}")
    assert first.prompt == "1970-01-01 00:00:00" and second.error == "'at' cannot be read: date value out of range"
    assert rows_of(pa.table({"at": at.view(pa.timestamp("s", "No/Where"))}), prompt_template="{at}")[
        0
    ].error.startswith("'at' cannot be read: ")


def test_a_prompt_column_of_numbers_or_an_unknown_one_is_refused_with_the_columns() -> None:
    with pytest.raises(ConfigurationError, match="int64, not text"):
        rows_of(pa.table({"p": [1]}), prompt_column="p")
    with pytest.raises(ConfigurationError, match="no column 'q'; its columns are: p, year"):
        rows_of(pa.table({"p": ["a"]}), prompt_column="q", partitions=("year",))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "null"),
        ("[", "not JSON"),
        ([], "no list"),
        ([{"role": "user"}], 'message 0 needs "role"'),
        ([{"role": "user", "content": "x"}, 3], "message 1"),
    ],
)
def test_messages_that_are_none_are_named(value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        messages_prompt(value, "m")


def test_messages_come_as_lists_or_as_json() -> None:
    message = {"role": "user", "content": "x"}
    assert (
        messages_prompt([{**message, "name": None}], "m")
        == messages_prompt('[{"role": "user", "content": "x"}]', "m")
        == [message]
    )


def test_settings_come_from_columns_and_null_means_the_flag() -> None:
    table = pa.table(
        {
            "p": ["a"] * 5,
            "m": [4.0, None, 1.5, -1.0, 3.0],
            "t": [0.5, None, 0.0, 0.0, float("nan")],
            "s": [["x"], None, None, None, None],
        }
    )
    rows = rows_of(table, prompt_column="p", max_tokens_column="m", temperature_column="t", stop_column="s")
    assert (rows[0].params.max_tokens, rows[0].params.temperature, rows[0].params.stop) == (4, 0.5, ("x",))
    assert rows[1].params == GREEDY
    assert rows[2].error == "setting max_tokens is 1.5, wanted a whole number"
    assert "max_tokens=-1 must be >= 0" in rows[3].error
    assert "temperature is nan" in rows[4].error


def test_streams_of_rows_depend_on_seed_and_place_alone() -> None:
    table = pa.table({"p": ["a"] * 3, "s": [None, 7, None]})
    rows = rows_of(table, SamplingParams(), prompt_column="p", seed_column="s")
    assert [row.params.seed for row in rows] == [row_seed(5, 100), 7, row_seed(5, 102)]
    assert (
        len({row_seed(5, 100), row_seed(6, 100), row_seed(5, 101), row_seed(51, 0)}) == 4
        and 0 <= row_seed(5, 100) < 2**63
    )
    assert rows_of(table, prompt_column="p")[0].params.seed is None
