"""Forms of answers, compiled by llguidance: which tokens may come next, by the tokens that came before."""

from __future__ import annotations

import importlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flexbatch.text.token_bytes import ByteDecoder, Vocabulary
from flexbatch.validation.errors import ConfigurationError
from flexbatch.validation.structured_fields import StructuredOutputsParams

KEPT_GRAMMARS = 256
"""Grammars that stay compiled when no sequence follows them any more."""
KEPT_STATES = 32
"""Beginnings of answers whose masks a grammar keeps for all sequences: 16 kB each for 128 k tokens, so 128 MB for
`KEPT_GRAMMARS` at most. Answers to one schema begin alike, and n samples of a prompt all begin at the first."""
LONGEST_MESSAGE = 600
MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Keywords of a JSON schema that hold schemas by names of the user's."""
VALUES = ("const", "enum", "default", "examples")
"""Keywords that hold values, which may look like schemas."""


class State:
    """What may follow one beginning of an answer. ``mask``: a bit for every token of the model's vocabulary, lowest
    first; None until somebody asks. ``accepting``: whether the answer may end here. ``escaping``: whether it ends in
    the first half of an escape."""

    __slots__ = ("accepting", "escaping", "following", "mask")

    def __init__(self, escaping: bool = False) -> None:
        self.mask: np.ndarray | None = None
        self.accepting, self.escaping = False, escaping
        self.following: dict[int, State] = {}


class Grammar:
    """A compiled form of answers. Immutable but for the states that it keeps, which any thread may add.
    ``plain_names``: no escape by number, such as \\u0061 for a, where anything else can be written. The library keeps
    the names of additional properties from being declared ones, and takes those that are written so for others."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary, plain_names: bool = False) -> None:
        self._matcher, self.vocabulary = matcher, vocabulary
        self._escapes = vocabulary.escapes if plain_names else None
        self.num_kept = 0
        self.root = State()
        self.fill(self.root, matcher)

    def matcher(self) -> Any:
        """The library's matcher at the beginning of an answer, for one sequence."""
        return self._matcher.deep_copy()

    def fill(self, state: State, matcher: Any) -> None:
        """Set what may follow where a matcher stands. The library's own end of the text is the token behind the
        model's last one: no text can hold it, and its bit tells whether the answer may end."""
        size = len(self.vocabulary.bytes)
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        state.accepting = bool(bits[size // 8] >> size % 8 & 1)
        mask = bits[: (size + 7) // 8].copy()
        if size % 8:
            mask[-1] &= (1 << size % 8) - 1
        if self._escapes is not None:
            plain = mask & ~self._escapes.barred[int(state.escaping)]
            mask = plain if state.accepting or plain.any() else mask
        state.mask = mask

    def child(self, state: State, token: int) -> State:
        """The state after one more token; kept while there are few."""
        found = state.following.get(token)
        if found is None:
            found = State(self._escapes is not None and self._escapes.ends_within(token, state.escaping))
            if self.num_kept < KEPT_STATES:
                self.num_kept += 1
                found = state.following.setdefault(token, found)
        return found


class _Wrapped:
    """A tokenizer as `llguidance.TokenizerWrapper` takes it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = len(vocabulary.bytes)
        names = {token: name.encode() for token, name in vocabulary.special.items()}
        self.tokens = [names.get(token, found) for token, found in enumerate([*vocabulary.bytes, b"<end>"])]
        self.special_token_ids = [*vocabulary.special, self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._vocabulary.tokenize(text)


class Grammars:
    """The grammars of one tokenizer and model, compiled when they are first asked for. Any thread may ask."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._compiled: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        self._failed: OrderedDict[StructuredOutputsParams, str] = OrderedDict()
        self._library: Any = None
        self._made: tuple[Vocabulary, ByteDecoder, Any] | None = None

    @property
    def decoder(self) -> ByteDecoder:
        """What decodes answers that follow a grammar."""
        return self._opened()[1]

    def compile(self, form: StructuredOutputsParams) -> Grammar:
        """Raises ConfigurationError with the library's message for a form that does not compile, and where there is no
        library or no tokenizer."""
        with self._lock:
            if (grammar := self._compiled.get(form)) is not None:
                self._compiled.move_to_end(form)
                return grammar
            if form not in self._failed:
                vocabulary, _, tokenizer = self._opened()
                problem = ""
                try:
                    matcher = self._library.LLMatcher(tokenizer, source(form), log_level=0)
                    problem = matcher.get_error()
                except (ValueError, RecursionError) as error:
                    problem = str(error)
                if not problem:
                    grammar = self._compiled[form] = Grammar(matcher, vocabulary, has_open_names(form))
                    if len(self._compiled) > KEPT_GRAMMARS:
                        self._compiled.popitem(last=False)
                    if grammar.root.accepting or bool(grammar.root.mask.any()):  # type: ignore[union-attr]
                        return grammar
                    del self._compiled[form]
                    problem = "no token of this model's vocabulary can begin such an answer"
                self._failed[form] = one_line(problem)
                if len(self._failed) > KEPT_GRAMMARS:
                    self._failed.popitem(last=False)
            raise ConfigurationError(f"structured_outputs: the {form.kind} does not compile: {self._failed[form]}")

    def _opened(self) -> tuple[Vocabulary, ByteDecoder, Any]:
        """The vocabulary, what decodes by it, and the library's tokenizer."""
        if self._made is None:
            if self._tokenizer is None:
                raise ConfigurationError("structured_outputs needs a tokenizer, and the model has none")
            self._library = _library()
            vocabulary = Vocabulary(self._tokenizer, self._vocab_size)
            wrapped = self._library.LLTokenizer(self._library.TokenizerWrapper(_Wrapped(vocabulary)))
            self._made = vocabulary, ByteDecoder(self._tokenizer, vocabulary), wrapped
        return self._made

    def check(self) -> None:
        """Invariants: what compiled has a first token or is whole, and nothing both compiled and failed."""
        assert not self._compiled.keys() & self._failed.keys()
        for grammar in self._compiled.values():
            assert grammar.root.mask is not None and (grammar.root.accepting or grammar.root.mask.any())
            assert grammar.num_kept <= KEPT_STATES + 64, "states are kept without end"


def problem_of(form: StructuredOutputsParams) -> str:
    """What the library has against a form, whatever the tokenizer is; empty where it has nothing. Raises
    ConfigurationError where there is no library."""
    matcher = _library().LLMatcher
    try:
        return one_line(matcher.validate_grammar(source(form)))
    except (ValueError, RecursionError) as error:
        return one_line(str(error))


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise ConfigurationError(
            f"structured_outputs needs llguidance ({error}): pip install 'flexbatch[structured]'"
        ) from None


def one_line(problem: str) -> str:
    """A message of the library without its state and the grammar, which may follow in full."""
    return " ".join(problem.partition("<state>")[0].split())[:LONGEST_MESSAGE]


def source(form: StructuredOutputsParams) -> str:
    """What the library compiles. Raises ValueError for a grammar of which no Lark can be made."""
    from llguidance import LLMatcher, grammar_from

    if form.is_json:
        schema = schema_of(form)
        refuse_repeated_names(schema)
        if isinstance(schema, bool):  # the library takes objects alone
            schema = {} if schema else {"not": {}}
        options: dict[str, Any] = {"whitespace_flexible": not form.disable_any_whitespace}
        if form.whitespace_pattern is not None:
            options["whitespace_pattern"] = form.whitespace_pattern
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)  # type: ignore[arg-type]
    if form.regex is not None:
        return LLMatcher.grammar_from_regex(form.regex)
    if form.choice:
        # A terminal: as alternatives of a rule, more than 2,000 fail at the first token, and 60,000 take 6 s, not 0.3.
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, form.choice)))
    try:
        return grammar_from("grammar", form.grammar or "")
    except Exception as error:  # its own parser of GBNF raises what it likes
        raise ValueError(str(error)) from error


def schemas_in(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A JSON schema and all the schemas in it, those that are objects."""
    if isinstance(schema, list):
        for part in schema:
            yield from schemas_in(part)
    elif isinstance(schema, dict):
        yield schema
        for name, part in schema.items():
            if name in MAPS and isinstance(part, dict):
                yield from schemas_in(list(part.values()))
            elif name not in VALUES:
                yield from schemas_in(part)


def schema_of(form: StructuredOutputsParams) -> Any:
    """What is compiled of a form that is JSON."""
    schema = json.loads(form.json or '{"type": "object"}')
    return closed(schema) if form.disable_additional_properties else schema


def has_open_names(form: StructuredOutputsParams) -> bool:
    """Whether objects may have properties besides those that the schema names."""
    return form.is_json and any(
        (each.get("properties") or each.get("patternProperties")) and each.get("additionalProperties") is not False
        for each in schemas_in(schema_of(form))
    )


def refuse_repeated_names(schema: Any) -> None:
    """Raises ValueError where several properties have to come whose names are not given: the library does not see
    that they differ, and a name that is repeated is one property."""
    for each in schemas_in(schema):
        least, required = each.get("minProperties"), each.get("required")
        given = len(required) if isinstance(required, list) else 0
        if isinstance(least, int | float) and least > given + 1:
            raise ValueError(
                f"minProperties: {least} with {given} required properties leaves {least - given} names open, which have"
                " to differ, and nothing sees to that: at most one may be open"
            )


def closed(schema: Any) -> Any:
    """The schema, in which objects that name properties, and say nothing of others, have no others."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for name, part in schema.items():
        if name in MAPS and isinstance(part, dict):
            found[name] = {key: closed(inner) for key, inner in part.items()}
        else:
            found[name] = part if name in VALUES else closed(part)
    if isinstance(found.get("properties"), dict) and "additionalProperties" not in found:
        found["additionalProperties"] = False
    return found
