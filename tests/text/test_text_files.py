from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.text.files import decode_text, lone_surrogate, parse_json, read_text, split_lines
from flexbatch.validation.errors import ConfigurationError

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"


parts_of_lines = st.characters(exclude_characters="\r\n", codec="utf-8") | st.sampled_from(SEPARATORS[:-1])


@given(st.lists(st.text(parts_of_lines), max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_lines_end_with_line_feeds_and_nothing_else(lines: list[str], end: str) -> None:
    assert split_lines("".join(line + end for line in lines)) == lines
    assert split_lines(end.join([*lines, "last"])) == [*lines, "last"]


def test_a_lone_carriage_return_is_part_of_its_line() -> None:
    assert split_lines("a\rb\r\nc\r\r\n\n\r\nd") == ["a\rb", "c\r", "", "", "d"]
    assert split_lines("") == []


@pytest.mark.parametrize("text", ["", "a", "größer\n", "\ufeff", "x\ufeffy"])
def test_a_byte_order_mark_is_no_text(text: str, tmp_path: Path) -> None:
    for form in ("utf-8", "utf-8-sig"):
        (tmp_path / "x.txt").write_bytes(text.encode(form))
        assert read_text(tmp_path / "x.txt") == (text.removeprefix("\ufeff") if form == "utf-8" else text)


@pytest.mark.parametrize("form", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_refused_by_name_with_the_remedy(form: str) -> None:
    text = "a" if form in ("utf-16", "utf-32") else "\ufeffa"
    with pytest.raises(
        ConfigurationError, match=rf"x\.txt is {form[:6].upper()}, .* iconv -f {form[:6].upper()} -t UTF-8"
    ):
        decode_text(text.encode(form), "x.txt")


def test_a_byte_that_is_not_utf8_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"x\.txt: is not UTF-8 text: invalid start byte at byte 4, in line 3"):
        decode_text(b"a\n\nb\xff\n", "x.txt")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(json_values)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), json.dumps(value, indent=1).encode()):
        assert parse_json(text) == value


@given(st.text(st.sampled_from('[]{}",:\\u0d8eE+-.59nutrlfaseNI \n\x00'), max_size=20) | st.binary(max_size=12))
def test_any_text_is_json_or_a_value_error(text: str | bytes) -> None:
    try:
        parse_json(text)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "more than 200 levels"),
        ("[" * 300 + "]" * 300, "more than 200 levels"),
        ('{"a":' * 201 + "1" + "}" * 201, "more than 200 levels"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice"),
        ('[{"x": {"a": 1, "a": 1}}]', "the key 'a' stands twice"),
        ("NaN", "it has no NaN"),
        ('{"a": -Infinity}', "it has no -Infinity"),
        ("1e99999999999999999999", "exponent"),
        (b'"\xff"', "not UTF-8: invalid start byte at byte 1"),
        ("{} {}", "not JSON: Extra data at character 3"),
        ("\ufeff{}", "not JSON"),
    ],
)
def test_what_is_no_json_says_why(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text, exact=True)


def test_depth_and_digits_within_reason_are_kept() -> None:
    assert parse_json("[" * 200 + "]" * 200) and parse_json('["' + "[" * 1000 + '"]')
    assert parse_json("1.10", exact=True) == Decimal("1.10") and str(parse_json("1.10", exact=True)) == "1.10"
    assert parse_json("9" * 4000) == 10**4000 - 1 and parse_json("9" * 5000) == Decimal("9" * 5000)
    assert parse_json("[NaN, Infinity]", constants=True)[1] == float("inf")


def test_half_of_a_surrogate_pair_is_found() -> None:
    assert lone_surrogate("a\ud83d") == 1 and lone_surrogate("a\U0001f600") == -1
