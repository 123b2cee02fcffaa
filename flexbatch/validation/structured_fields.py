"""What an answer has to look like: the fields of `StructuredOutputsParams`, with vLLM's names."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from flexbatch.validation.checks import Unfit, check_keywords, checked, several, short, text, truth
from flexbatch.validation.errors import ConfigurationError

LONGEST_GRAMMAR = 2**24
"""Characters of a schema, a grammar, an expression or a choice. The library has limits of its own on what it builds."""
MOST_CHOICES = 2**16
KINDS = ("json", "regex", "choice", "grammar", "json_object")
JSON_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
OTHER_NAMES = {"json_schema": "json", "schema": "json", "choices": "choice", "lark": "grammar", "ebnf": "grammar"}
UNAVAILABLE = {
    "structural_tag": "text and structure by turns are not supported; a grammar can write both",
    "backend": "there is one backend, llguidance; leave it out",
    "disable_fallback": "there is one backend, llguidance; leave it out",
}


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form of an answer: exactly one of the five kinds, the first four fields and ``json_object``.

    It is compiled when a request comes; one that does not compile is that request's error. Raises ConfigurationError
    that names the field.
    """

    json: Any = None
    """A JSON schema as dict, bool or text, or a pydantic class (or TypeAdapter); kept as text."""
    regex: str | None = None
    """The whole answer matches it, in the syntax of Rust's regex crate."""
    choice: Any = ()
    """The answer is one of these texts."""
    grammar: str | None = None
    """A context-free grammar in llguidance's form of Lark, or in GBNF (``root ::= ...``)."""
    json_object: bool = False
    """The answer is any JSON object."""
    disable_any_whitespace: bool = False
    """JSON has no whitespace between its tokens."""
    disable_additional_properties: bool = False
    """JSON objects whose schema names properties, and says nothing of others, have no others."""
    whitespace_pattern: str | None = None
    """A regex for the whitespace between the tokens of JSON."""

    def __new__(cls, *args: Any, **keywords: Any) -> StructuredOutputsParams:
        names = [field.name for field in fields(cls)]
        check_keywords("StructuredOutputsParams", keywords, names, OTHER_NAMES, UNAVAILABLE)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            value = getattr(self, name)
            if name in ("json_object", *JSON_OPTIONS[:2]) and value is None:
                value = False  # as vLLM's defaults are
            if value is not None:
                object.__setattr__(self, name, checked("structured_outputs field", name, value, check))
        given = [name for name in KINDS if getattr(self, name) not in (None, (), False)]
        if len(given) != 1:
            has = f"has {' and '.join(given)}" if given else "has none of them"
            raise ConfigurationError(f"structured_outputs takes exactly one of {', '.join(KINDS)}, and {has}")
        options = [name for name in JSON_OPTIONS if getattr(self, name)]
        if options and not self.is_json:
            raise ConfigurationError(f"structured_outputs: {options[0]} is for JSON, and the answer is a {given[0]}")

    @property
    def kind(self) -> str:
        """Which of the kinds it is."""
        return next(name for name in KINDS if getattr(self, name) not in (None, (), False))

    @property
    def is_json(self) -> bool:
        return self.json is not None or self.json_object


def as_structured_outputs(value: Any) -> StructuredOutputsParams:
    """The check of `SamplingParams.structured_outputs`, which may be a dict of the fields."""
    if isinstance(value, StructuredOutputsParams):
        return value
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        try:
            return StructuredOutputsParams(**value)
        except ConfigurationError as error:
            raise Unfit(f"one form of answers: {error}") from None
    raise Unfit("StructuredOutputsParams(json=..., or another kind), or a dict of its fields")


def schema_text(value: Any) -> str:
    """A schema as JSON text with its keys in their order, from a dict, a bool, text, or a pydantic class."""
    for name in ("model_json_schema", "json_schema"):
        if callable(make := getattr(value, name, None)):
            value = make()
            break
    try:
        if isinstance(value, str | bytes):
            value = json_module.loads(value)
        if not isinstance(value, Mapping | bool):
            raise Unfit(f"a JSON schema: an object, or its text; it is {short(value)}")
        return json_module.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise error if isinstance(error, Unfit) else Unfit(f"a JSON schema: {error}") from None


def _choices(value: Any) -> tuple[str, ...]:
    found = several(text(LONGEST_GRAMMAR), MOST_CHOICES, "texts")(value)
    if not found and value != ():
        raise Unfit("a list of at least one text")
    return tuple(dict.fromkeys(found))


CHECKS = {
    "json": schema_text,
    "regex": text(LONGEST_GRAMMAR),
    "choice": _choices,
    "grammar": text(LONGEST_GRAMMAR),
    "json_object": truth,
    "disable_any_whitespace": truth,
    "disable_additional_properties": truth,
    "whitespace_pattern": text(LONGEST_GRAMMAR),
}
