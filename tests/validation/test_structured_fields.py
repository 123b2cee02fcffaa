"""The fields of StructuredOutputsParams: what may be given for each, and how it is kept."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest

from flexbatch import SamplingParams, StructuredOutputsParams
from flexbatch.validation.checks import UnknownKeywordError
from flexbatch.validation.errors import ConfigurationError

SCHEMA = {"type": "object", "properties": {"z": {"enum": ["größer"]}, "a": True}}


class Pydantic:
    """What is used of a pydantic class."""

    @classmethod
    def model_json_schema(cls) -> dict:
        return SCHEMA


@pytest.mark.parametrize(
    "given", [SCHEMA, json.dumps(SCHEMA), json.dumps(SCHEMA, indent=2).encode(), Pydantic], ids=str
)
def test_a_schema_is_kept_as_text_with_its_keys_in_their_order(given) -> None:
    form = StructuredOutputsParams(json=given)
    assert json.loads(form.json) == SCHEMA and form.json.index('"z"') < form.json.index('"a"')
    assert form == StructuredOutputsParams(json=SCHEMA) and hash(form) == hash(StructuredOutputsParams(json=SCHEMA))
    assert form.kind == "json" and form.is_json


def test_a_real_pydantic_class() -> None:
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Person", name=(str, ...), age=(int, pydantic.Field(ge=0)))
    assert json.loads(StructuredOutputsParams(json=model).json)["properties"]["age"]["minimum"] == 0
    assert json.loads(StructuredOutputsParams(json=pydantic.TypeAdapter(list[int])).json)["type"] == "array"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of json, .* and has none"),
        ({"json": {}, "regex": "a"}, "and has json and regex"),
        ({"choice": ["a"], "json_object": True}, "choice and json_object"),
        ({"json": "{"}, "json='{' must be a JSON schema"),
        ({"json": "[1]"}, "a JSON schema: an object"),
        ({"json": 5}, "json=5 must be a JSON schema"),
        ({"json": {"a": {1, 2}}}, "must be a JSON schema: .*not JSON serializable"),
        ({"choice": []}, "choice=.* at least one text"),
        ({"choice": ["a", 5]}, "element 1 is 5"),
        ({"choice": "yes"}, "choice='yes' must be a list"),
        ({"choice": [""]}, "element 0"),
        ({"regex": 5}, "regex=5 must be text"),
        ({"regex": ""}, "regex='' must be text"),
        ({"grammar": b"x"}, "grammar=b'x' must be text"),
        ({"json_object": 1}, "json_object=1 must be True or False"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace is for JSON"),
        ({"choice": ["a"], "whitespace_pattern": "x"}, "whitespace_pattern is for JSON"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(given, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StructuredOutputsParams(**given)
    with pytest.raises(ConfigurationError):
        SamplingParams(structured_outputs=given)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("structural_tag", "a grammar can write both"), ("choices", "'choice'"), ("jsn", "'json'"), ("backend", "leave")],
)
def test_other_names_are_answered(name: str, hint: str) -> None:
    with pytest.raises(UnknownKeywordError, match=hint):
        StructuredOutputsParams(**{name: "x"})


@pytest.mark.parametrize("name", ["guided_json", "guided_decoding", "response_format"])
def test_names_that_were_before_are_told_the_present_one(name: str) -> None:
    with pytest.raises(UnknownKeywordError, match="did you mean 'structured_outputs'"):
        SamplingParams(**{name: {}})


def test_it_travels_with_the_sampling_parameters() -> None:
    params = SamplingParams(structured_outputs={"choice": ["b", "a", "b"], "json": None, "json_object": None})
    assert params.structured_outputs == StructuredOutputsParams(choice=("b", "a"))
    for other in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), params.snapshot(), params.within(9)):
        assert other.structured_outputs == params.structured_outputs
    assert json.loads(json.dumps(dataclasses.asdict(params)))["structured_outputs"]["choice"] == ["b", "a"]
    assert dataclasses.replace(params, max_tokens=2).structured_outputs == params.structured_outputs
