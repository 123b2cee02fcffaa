"""--parse-json: types of schemas, values of answers, and the column of a job."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexbatch.apps.batch import main
from flexbatch.apps.jobs.columns import UnfitValue, holds_json
from flexbatch.apps.jobs.json_types import SchemaTypes, json_field, nested, told_types
from flexbatch.apps.jobs.json_values import converter
from flexbatch.apps.jobs.reasons import reason_of
from flexbatch.kernels.threads import one_thread
from flexbatch.text.files import parse_json
from tests.apps_batch.helpers import (
    benchmark_prompts,
    journal_bytes,
    kill_at,
    parts_of,
    read_output,
    start,
    write_input,
)
from tests.apps_batch.test_real_engine import DEMO, SMALL_BLOCK, finished
from tests.public_schemas import PUBLIC
from tests.schemas import SHORT, WHOLE, fields, items

TEXT, NULL = {"type": "string"}, {"type": "null"}
JSON = json_field("x")
ITEM = pa.field("item", pa.string(), metadata=JSON.metadata)


def struct(**kinds: pa.DataType) -> pa.DataType:
    return pa.struct(list(kinds.items()))


def typed(schema: Any) -> tuple[pa.Field, SchemaTypes]:
    types = SchemaTypes(parse_json(json.dumps(schema), exact=True))
    return types.field("x"), types


KINDS: dict[str, tuple[Any, Any, list[Any]]] = {
    "text": (TEXT, pa.string(), ["größe", "", None]),
    "whole": (WHOLE, pa.int64(), [2**63 - 1, -(2**63), 0]),
    "unsigned": ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, pa.uint64(), [2**64 - 1]),
    "large": ({"type": "integer", "maximum": 10**20}, pa.decimal128(38, 0), [10**20, -(10**37)]),
    "larger": ({"type": "integer", "maximum": 10**50}, JSON, [10**50]),
    "number": ({"type": "number"}, pa.float64(), [1, 2.5, -1e300]),
    "flag": ({"type": "boolean"}, pa.bool_(), [True, False]),
    "null": (NULL, pa.null(), [None]),
    "or null": ({"type": ["integer", "null"]}, pa.int64(), [None, 3]),
    "any of null": ({"anyOf": [{"type": "boolean"}, NULL]}, pa.bool_(), [None, True]),
    "whole or number": ({"anyOf": [WHOLE, {"type": "number"}]}, pa.float64(), [1, 0.5]),
    "types": ({"type": ["integer", "number"]}, pa.float64(), [0.5]),
    "texts": ({"enum": ["a", "größer", None]}, pa.string(), ["größer", None]),
    "wholes": ({"enum": [1, 2]}, pa.int64(), [2]),
    "numbers": ({"enum": [1, 2.5]}, pa.float64(), [2.5]),
    "mixed": ({"enum": [1, "a"]}, JSON, [1, "a"]),
    "constant": ({"const": {"a": [1]}}, struct(a=pa.list_(pa.int64())), [{"a": [1]}]),
    "object": (fields(a=WHOLE, b=SHORT), struct(a=pa.int64(), b=pa.string()), [{"a": 1, "b": "x"}]),
    "optional": ({"type": "object", "properties": {"a": WHOLE}}, struct(a=pa.int64()), [{"a": 1}, {}]),
    "nested": (fields(a=fields(b=items(WHOLE))), struct(a=struct(b=pa.list_(pa.int64()))), [{"a": {"b": [1]}}]),
    "map": ({"type": "object", "additionalProperties": WHOLE}, pa.map_(pa.string(), pa.int64()), [{"a": 1, "ü": 2}]),
    "names": ({"type": "object", "patternProperties": {"^x": WHOLE, "^y": {"type": "number"}},
               "additionalProperties": False}, pa.map_(pa.string(), pa.float64()), [{"x": 1, "y": 0.5}]),
    "any object": ({"type": "object"}, JSON, [{"a": [1, "x"]}]),
    "no field": ({"type": "object", "additionalProperties": False}, JSON, [{}]),
    "anything": (True, JSON, [1, "a", {"b": None}]),
    "anything within": (fields(a={}), pa.struct([pa.field("a", pa.string(), metadata=JSON.metadata)]), [{"a": [1]}]),
    "no type": ({"properties": {"a": WHOLE}}, JSON, [3]),
    "text or whole": ({"type": ["string", "integer"]}, JSON, ["a", 1]),
    "list": (items(WHOLE), pa.list_(pa.int64()), [[1, 2], []]),
    "list of any": ({"type": "array"}, pa.list_(ITEM), [[1, "a", None]]),
    "empty list": (items(WHOLE, maxItems=0), pa.list_(pa.int64()), [[]]),
    "no items": ({"type": "array", "items": False}, pa.list_(pa.null()), [[]]),
    "pair": ({"type": "array", "prefixItems": [WHOLE, {"type": "number"}], "items": False}, pa.list_(pa.float64()),
             [[1, 2.5]]),
    "open pair": ({"type": "array", "prefixItems": [WHOLE, WHOLE]}, pa.list_(ITEM), [[1, 2, "x"]]),
    "old pair": ({"type": "array", "items": [WHOLE], "additionalItems": False}, pa.list_(pa.int64()), [[1]]),
    "mixed pair": ({"type": "array", "prefixItems": [WHOLE, TEXT], "items": False}, pa.list_(ITEM), [[1, "a"]]),
    "variants": ({"anyOf": [fields(k={"const": "a"}, v=WHOLE), fields(k={"const": "b"}, w=TEXT)]},
                 struct(k=pa.string(), v=pa.int64(), w=pa.string()), [{"k": "a", "v": 1}, {"k": "b", "w": "x"}]),
    "variants that differ": ({"anyOf": [fields(v=WHOLE), fields(v=TEXT)]}, pa.struct([pa.field("v", pa.string(),
                             metadata=JSON.metadata)]), [{"v": 1}, {"v": "x"}]),
    "base and variants": ({**fields(a=WHOLE), "anyOf": [{"required": ["a"]}]}, struct(a=pa.int64()), [{"a": 1}]),
    "all of": ({"allOf": [fields(a=WHOLE), {"properties": {"a": {"minimum": 0}, "b": TEXT}}]},
               struct(a=pa.int64(), b=pa.string()), [{"a": 1, "b": "x"}]),
    "definition": ({"$defs": {"p": fields(x=WHOLE)}, **fields(p={"$ref": "#/$defs/p"}, q={"$ref": "#/$defs/p"})},
                   struct(p=struct(x=pa.int64()), q=struct(x=pa.int64())), [{"p": {"x": 1}, "q": {"x": 2}}]),
    "escaped name": ({"$defs": {"a/b ": WHOLE}, "$ref": "#/$defs/a~1b%20"}, pa.int64(), [1]),
    "nowhere": (fields(a={"$ref": "#/$defs/none"}), pa.struct([pa.field("a", pa.string(), metadata=JSON.metadata)]),
                [{"a": 1}]),
    "within itself": (fields(v=WHOLE, next={"anyOf": [{"$ref": "#"}, NULL]}), pa.struct([pa.field("v", pa.int64()),
                      pa.field("next", pa.string(), metadata=JSON.metadata)]), [{"v": 1, "next": {"v": 2}}]),
    "impossible field": (fields(a=WHOLE) | {"properties": {"a": WHOLE, "b": False}}, struct(a=pa.int64()), [{"a": 1}]),
}  # fmt: skip


def without_absent(value: Any) -> Any:
    """As Arrow has it: what is absent is null, and keys of maps are pairs."""
    if isinstance(value, dict):
        return {name: found for name, item in value.items() if (found := without_absent(item)) is not None}
    if isinstance(value, list) and value and all(isinstance(each, tuple) for each in value):
        return without_absent(dict(value))
    return [without_absent(item) for item in value] if isinstance(value, list) else value


def read_back(value: Any, field: pa.Field) -> Any:
    """A value of a column as plain JSON values."""
    if value is None:
        return None
    if holds_json(field):
        return json.loads(value)
    if pa.types.is_struct(field.type):
        return {each.name: read_back(value[each.name], each) for each in field.type}
    if pa.types.is_map(field.type):
        return {key: read_back(item, field.type.item_field) for key, item in value}
    if pa.types.is_list(field.type):
        return [read_back(item, field.type.value_field) for item in value]
    return int(value) if pa.types.is_decimal(field.type) else value


def through_parquet(field: pa.Field, values: list[Any], path: Path) -> list[Any]:
    pq.write_table(pa.table([pa.array(values, field.type)], schema=pa.schema([field])), path)
    table = pq.read_table(path)
    assert table.schema.field("x").type == field.type
    return [read_back(value, field) for value in table["x"].to_pylist()]


@pytest.mark.parametrize("name", KINDS)
def test_types_hold_what_the_schema_allows(name: str, tmp_path: Path) -> None:
    schema, kind, values = KINDS[name]
    field, types = typed(schema)
    wanted = kind if isinstance(kind, pa.Field) else pa.field("x", kind)
    assert field.equals(wanted, check_metadata=True) and field.nullable, (field, wanted)
    make = converter(field)
    converted = [make(parse_json(json.dumps(value), exact=True)) for value in values]
    found = through_parquet(field, converted, tmp_path / "x.parquet")
    assert [without_absent(each) for each in found] == [without_absent(each) for each in values]
    told = "\n".join(told_types(types, field))
    assert ("no one Arrow type" in told) == any(holds_json(each) for _, each in nested(field))


@pytest.mark.parametrize(
    ("schema", "text", "told"),
    [
        (WHOLE, "9223372036854775808", "is no int64"),
        (WHOLE, "1.5", "is no int64"),
        (WHOLE, "true", "is no int64"),
        (WHOLE, "1e99999999", "is no int64"),
        ({"type": "number"}, "1e999", "is no double"),
        ({"type": "number"}, "9" * 400, "is no double"),
        ({"type": "number"}, '"1"', "is no double"),
        (TEXT, r'"\ud83d"', "half of a surrogate pair"),
        (fields(a=TEXT), r'{"a": "\udc00"}', "'a' holds half of a surrogate pair"),
        ({"type": "object", "additionalProperties": WHOLE}, r'{"\ud83d": 1}', "surrogate"),
        (fields(a=items(WHOLE)), '{"a": [1, "x"]}', "a: 'x' is no int64"),
        (fields(a=WHOLE), "[1]", "is no struct"),
        (items(WHOLE), "{}", "is no list"),
        ({"type": "boolean"}, "1", "is no bool"),
        (NULL, "0", "is no null"),
        ({"enum": ["a"]}, "1", "is no string"),
        ({"type": "integer", "maximum": 10**20}, "9" * 39, "is no decimal"),
    ],
)
def test_what_a_type_does_not_hold_is_told(schema: Any, text: str, told: str) -> None:
    with pytest.raises(UnfitValue, match=told):
        converter(typed(schema)[0])(parse_json(text, exact=True))
    assert converter(JSON)(parse_json(text, exact=True)), "JSON text holds everything"


def test_schemas_that_double_or_nest_without_end_are_json(tmp_path: Path) -> None:
    nexts = [{"$ref": f"#/$defs/d{i + 1}"} for i in range(40)]
    doubling: dict[str, Any] = {"$defs": {f"d{i}": fields(a=next_, b=next_) for i, next_ in enumerate(nexts)}}
    doubling["$defs"]["d40"] = WHOLE
    assert pa.types.is_struct(typed({**doubling, "$ref": "#/$defs/d0"})[0].type)
    deep: Any = WHOLE
    for _ in range(40):
        deep = fields(a=deep)
    field, types = typed(deep)
    assert any("deep" in reason for reason in types.reasons.values())
    assert through_parquet(field, [None], tmp_path / "x.parquet") == [None]


def test_the_log_says_what_is_json_text_and_what_is_left_out() -> None:
    schema = {"type": "object", "properties": {"a": {"anyOf": [WHOLE, items({})]}, "b": fields(c={"type": "array"})}}
    field, types = typed(schema)
    told = "\n".join(told_types(types, field))
    assert "column x: struct<a: string, b: struct<c: list<item: string>>>" in told
    assert "$.a (" in told and "$.b.c[] (any value)" in told and "$.a[]" not in told
    assert "properties that it does not declare, which are in the text of an answer alone: in $ " in told
    assert len(list(told_types(typed(WHOLE)[1], typed(WHOLE)[0]))) == 1


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if index % 20 == 5 else pytest.mark.slow)
                                  for index, name in enumerate(PUBLIC)])  # fmt: skip
def test_every_random_answer_has_a_value_that_says_the_same(name: str, tmp_path: Path) -> None:
    """Of public-style schemas: back from Parquet, it is what a reader of the text has. Whole numbers that no int64
    holds are refused, and nothing else is."""
    pytest.importorskip("llguidance")
    from flexbatch.text.grammars import Grammars
    from flexbatch.validation.structured_fields import StructuredOutputsParams
    from tests.text.kinds import KINDS as TOKENIZERS
    from tests.text.test_grammars import random_answer

    tokenizer = TOKENIZERS["byte-level"]()
    grammars = Grammars(tokenizer, len(tokenizer))
    grammar = grammars.compile(StructuredOutputsParams(json=PUBLIC[name], disable_any_whitespace=True))
    field, types = typed(PUBLIC[name])
    texts = []
    for seed in range(8):
        tokens, ended = random_answer(grammar, {tokenizer.eos_token_id}, seed, 200)
        texts += [grammars.decoder.decode(tokens)] if ended else []
    values, large = [], [text for text in texts if re.search(r"\d{19}", text)]
    for text in texts:
        try:
            values.append(converter(field)(parse_json(text, exact=True)))
        except UnfitValue as error:
            assert text in large and "is no int64" in str(error), text
            texts = [each for each in texts if each != text]
    found = through_parquet(field, values, tmp_path / "x.parquet")
    if not types.open:
        for text, value in zip(texts, found, strict=True):
            wanted = json.loads(text, parse_float=lambda digits: float(digits))
            assert without_absent(value) == without_absent(wanted) or math.inf in (wanted,)


PERSON = fields(who={"enum": ["a", "b"]}, age={"type": "integer", "minimum": 0, "maximum": 99}, on={"type": "boolean"})


def schema_file(folder: Path, schema: Any = PERSON) -> Path:
    path = folder / "schema.json"
    path.write_text(json.dumps(schema), encoding="utf-8")
    return path


def run(*words: object) -> int:
    return main([*map(str, words), *DEMO, "--disable-any-whitespace", *map(str, SMALL_BLOCK)])


def test_a_job_writes_structs_and_null_for_answers_that_are_cut(tmp_path: Path, capsys) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "in.csv").write_text("prompt,max\na,60\nb,60\nc,3\nd,x\n", encoding="utf-8")
    flags = ("--json-schema", schema_file(tmp_path), "--parse-json", "--max-tokens-column", "max")
    assert run(tmp_path / "in.csv", tmp_path / "out", *flags, "--output-prefix", "my_") == 3
    table = read_output(tmp_path / "out")
    assert table.schema.field("my_parsed_json").type == struct(who=pa.string(), age=pa.int64(), on=pa.bool_())
    rows = table.to_pylist()
    assert [row["my_finish_reason"] for row in rows] == ["stop", "stop", "length", "error"]
    for row in rows[:2]:
        assert row["my_parsed_json"] == json.loads(row["my_generated_text"]) and row["my_error"] == ""
    assert rows[2]["my_parsed_json"] is None and rows[2]["my_error"] == "" and rows[2]["my_generated_text"]
    assert rows[3]["my_parsed_json"] is None and "setting max_tokens" in rows[3]["my_error"]


def test_answers_that_do_not_parse_are_errors_with_their_texts(tmp_path: Path, capsys) -> None:
    """A stop text cuts them; several answers to a prompt are a list."""
    pytest.importorskip("llguidance")
    lines = [{"prompt": "x", "stop": None}, {"prompt": "y", "stop": ['"on"']}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    flags = ("--json-schema", schema_file(tmp_path), "--parse-json", "--stop-column", "stop", "--n", 2)
    assert run(tmp_path / "in.jsonl", tmp_path / "out", *flags, "--temperature", 1, "--max-tokens", 70) == 3
    log = capsys.readouterr().err
    assert log.index("column parsed_json: struct<who: string, age: int64, on: bool>") < log.index("loading demo")
    good, cut = read_output(tmp_path / "out").to_pylist()
    assert good["parsed_json"] == [json.loads(text) for text in good["generated_text"]]
    assert cut["parsed_json"] == [None, None] and all(text.endswith(",") for text in cut["generated_text"])
    assert cut["error"].startswith("answer 1 of 2: parsed_json: not JSON: ") and "answer 2 of 2" in cut["error"]
    assert "1 of answers that do not parse" in log
    assert reason_of(cut["error"]).title.startswith("of answers that do not parse")
    before = [path.read_bytes() for path in parts_of(tmp_path / "out")]
    again = (*flags, "--temperature", 1, "--max-tokens", 70, "--retry-failed")
    assert run(tmp_path / "in.jsonl", tmp_path / "out", *again) == 3
    assert [path.read_bytes() for path in parts_of(tmp_path / "out")] == before, "read back and written anew"


def test_a_schema_per_row_gives_json_texts(tmp_path: Path, capsys) -> None:
    pytest.importorskip("llguidance")
    forms = [json.dumps({"const": [1, "größe"]}), json.dumps({"enum": [2.50]}), None]
    source = write_input(tmp_path / "in.parquet", ["a", "b", "c"], form=forms)
    assert run(source, tmp_path / "out", "--json-schema-column", "form", "--parse-json", "--max-tokens", 24) == 0
    assert "column parsed_json: JSON text, as every row may have a schema of its own" in capsys.readouterr().err
    table = read_output(tmp_path / "out")
    assert holds_json(table.schema.field("parsed_json"))
    first, second, third = table["parsed_json"].to_pylist()
    assert (first, second, third) == ('[1, "größe"]', "2.5", None), "a row without a schema need not parse"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "--parse-json needs a schema: give --json-schema or --json-schema-column"),
        (("--choice", "a", "b"), "--parse-json needs a schema"),
        (("--input-format", "openai", "--json-schema", "SCHEMA"), "--parse-json is for columns"),
        (("--json-schema-column", "form"), "already has the column parsed_json: give the new ones other names"),
    ],
)
def test_what_cannot_be_parsed_is_refused_first(flags: Any, told: str, tmp_path: Path, capsys) -> None:
    path = schema_file(tmp_path)
    source = write_input(tmp_path / "in.parquet", ["a"], form=["{}"], parsed_json=["x"])
    words = [path if word == "SCHEMA" else word for word in flags]
    assert run(source, tmp_path / "out", "--parse-json", *words) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_job_that_was_killed_writes_the_same_bytes(tmp_path: Path) -> None:
    """Sampled answers to a schema, of which any steps aside at any pass, with the process killed twice, against a
    job that nobody disturbs."""
    pytest.importorskip("llguidance")
    source = write_input(tmp_path / "in.parquet", benchmark_prompts(40, 60))
    flags = ("--json-schema", schema_file(tmp_path), "--parse-json", "--temperature", 1, "--max-tokens", 40)
    flags += ("--part-rows", 8, "--window-rows", 16, "--repetition-penalty", 1.1, "--n", 2)
    out, chance = tmp_path / "out", random.Random(5)
    with one_thread():
        assert run(source, tmp_path / "whole", *flags) == 0
    count = {"count_file": str(tmp_path / "tokens"), "put_aside": str(tmp_path / "aside")}

    def begin() -> Any:
        return start(source, out, *flags, *DEMO, *SMALL_BLOCK, "--disable-any-whitespace", real=True, **count)

    def moments() -> Iterator[Callable[[], bool]]:
        for kill in range(2):
            size = journal_bytes(out)
            yield (
                lambda size=size, kill=kill: (
                    len(parts_of(out)) > kill and journal_bytes(out) != size and chance.random() < 0.3
                )
            )

    kill_at(moments(), begin, 300)
    finished(begin())
    assert (tmp_path / "aside").stat().st_size > 5, "some stepped aside"
    found, wanted = parts_of(out), parts_of(tmp_path / "whole")
    assert [path.name for path in found] == [path.name for path in wanted]
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in wanted]
    assert sum(each is not None for row in read_output(out)["parsed_json"].to_pylist() for each in row) > 60
