"""Forms of answers over tokenizers of every kind: what the library is told of them, and what it makes of it."""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.execution.masks import GrammarFollower
from flexbatch.text import grammars as module
from flexbatch.text.grammars import Grammars
from flexbatch.text.token_bytes import ByteDecoder, Vocabulary
from flexbatch.validation.errors import ConfigurationError
from flexbatch.validation.structured_fields import MOST_CHOICES, StructuredOutputsParams
from tests.public_schemas import PUBLIC
from tests.schemas import REFUSED, SCHEMAS
from tests.text.kinds import KINDS
from tests.tiny_models import train_tokenizer

pytest.importorskip("llguidance")
FOLLOWED = [kind for kind in KINDS if not kind.startswith("word-piece")]
SPARE = 5
byte_level = cache(KINDS["byte-level"])
"""Tokens that the model has and the tokenizer lacks."""


def tokens_of(mask: np.ndarray) -> list[int]:
    return np.unpackbits(mask, bitorder="little").nonzero()[0].tolist()


def answers(tokenizer, form: StructuredOutputsParams, ends: set[int], limit: int = 2000) -> dict[str, int]:
    """Every answer that the grammar allows, by walking all masks, with how many ways there are to write it."""
    grammars = Grammars(tokenizer, len(tokenizer) + SPARE)
    grammar, found, paths = grammars.compile(form), {}, [()]
    while paths and limit:
        path = paths.pop()
        limit -= 1
        follower = GrammarFollower(grammar, ends)
        for token in path:
            follower.advance(token)
        for token in tokens_of(follower.mask()):
            if token in ends:
                text = grammars.decoder.decode(path)
                found[text] = found.get(text, 0) + 1
            else:
                assert token not in grammar.vocabulary.special, "a special token inside of an answer"
                assert token < len(tokenizer), "a token that only the model has"
                paths.append((*path, token))
    grammars.check()
    return found


@pytest.mark.parametrize("kind", FOLLOWED)
def test_every_way_to_write_a_choice_is_one_that_the_tokenizer_reads(kind: str) -> None:
    """All token sequences that the masks allow make one of the choices, and each of them can be made."""
    tokenizer = KINDS[kind]()
    choices = [" at", "sat a", "t at"] if kind != "tidy-words" else [" ta", "a. ' t", "n't"]
    found = answers(tokenizer, StructuredOutputsParams(choice=choices), {tokenizer.eos_token_id})
    assert found.keys() == set(choices)


@pytest.mark.parametrize("kind", FOLLOWED)
def test_what_tokens_add_to_a_text_is_what_the_tokenizer_writes(kind: str) -> None:
    """For runs of random tokens behind a word, but for the spaces that it tidies up and bytes that are no text."""
    tokenizer = KINDS[kind]()
    vocabulary = Vocabulary(tokenizer, len(tokenizer) + SPARE)
    usable = [token for token, found in enumerate(vocabulary.bytes) if found]
    assert all(vocabulary.bytes[token] == b"" for token in vocabulary.special), "special tokens are no text"
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id} <= vocabulary.special.keys()
    assert vocabulary.bytes[len(tokenizer) :] == [b""] * SPARE
    anchor = next(token for token in usable if vocabulary.bytes[token] in (b"t", b"a"))
    random = np.random.default_rng(4)
    decoder, checked = ByteDecoder(tokenizer, vocabulary), 0
    for _ in range(300):
        tokens = [anchor, *random.choice(usable, 4).tolist()]
        try:
            text = vocabulary.join(tokens).decode()
        except UnicodeDecodeError:
            continue
        checked += 1
        assert decoder.decode(tokens) == text
        assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text
    assert checked > 20


@pytest.mark.parametrize("kind", FOLLOWED)
def test_a_text_is_tokenized_as_it_stands_in_the_middle_of_another(kind: str) -> None:
    vocabulary = Vocabulary(tokenizer := KINDS[kind](), len(tokenizer))
    for text in ("at", " at", "a t", "</s>", "t", "<tool>", ""):
        tokens = vocabulary.tokenize(text)
        assert not vocabulary.special.keys() & set(tokens)
        assert text.encode().startswith(vocabulary.join(tokens)), "other letters, or letters are missing in the middle"
    assert vocabulary.join(vocabulary.tokenize(b" at")) == b" at"


def test_word_piece_is_refused_with_a_token_that_shows_why() -> None:
    tokenizer = KINDS["word-piece"]()
    with pytest.raises(ConfigurationError, match=r"cannot follow this tokenizer .*'the', after .* makes the text 'the"):
        Grammars(tokenizer, len(tokenizer)).compile(StructuredOutputsParams(choice=["the"]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def add(x, y):", '{"a": [1, 2], "größe": "漢字"}'] * 3, 330, ["<s>", "</s>"], bos=False)


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer, 400)


def random_answer(grammar, ends, seed: int, most: int = 120) -> tuple[list[int], bool]:
    """Random tokens that the masks allow, and whether they came to an end; ends come as soon as one may."""
    random, follower, tokens = np.random.default_rng(seed), GrammarFollower(grammar, ends), []
    while len(tokens) < most and not follower.complete:
        allowed = tokens_of(follower.mask())
        assert allowed, f"nothing may follow {tokens}"
        if ends & set(allowed):
            return tokens, True
        tokens.append(int(random.choice(allowed)))
        follower.advance(tokens[-1])
    follower.check(len(tokens))
    return tokens, follower.complete


@pytest.mark.parametrize("name", SCHEMAS)
def test_whole_random_answers_fit_their_schema(name: str, grammars: Grammars, tokenizer) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    form = StructuredOutputsParams(json=SCHEMAS[name], disable_any_whitespace=True)
    grammar, whole = grammars.compile(form), 0
    for seed in range(4):
        tokens, ended = random_answer(grammar, {tokenizer.eos_token_id}, seed)
        if ended:
            whole += 1
            jsonschema.validate(json.loads(grammars.decoder.decode(tokens)), SCHEMAS[name])
    assert whole or name in ("format email", "format duration", "format hostname", "bounds"), "none ended"


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_random_answers_to_public_schemas_fit(name: str, grammars: Grammars, tokenizer) -> None:
    """As they are, and with properties that nobody declared wherever the schema may allow them."""
    jsonschema = pytest.importorskip("jsonschema")
    for schema in (PUBLIC[name], {key: part for key, part in PUBLIC[name].items() if key != "additionalProperties"}):
        for tight in (True, False):
            grammar = grammars.compile(StructuredOutputsParams(json=schema, disable_any_whitespace=tight))
            for seed in range(6):
                tokens, ended = random_answer(grammar, {tokenizer.eos_token_id}, seed)
                if ended:
                    jsonschema.validate(json.loads(grammars.decoder.decode(tokens)), schema)


ANY, TEXT = {"type": "object", "properties": {"a": {"type": "integer"}}}, {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        (ANY, '{"a":1,"b":"x"}', True),
        (ANY, r'{"a":1,"\u0061":"x"}', False),
        (ANY, r'{"\u0061":"x"}', False),
        (ANY, r'{"\\u0061":"x"}', True),
        (ANY, r'{"b\nu0061":"x"}', True),
        ({**ANY, "additionalProperties": TEXT}, r'{"b\u0061":"x"}', False),
        ({"type": "object", "properties": {"é": {"type": "null"}}}, r'{"\u00e9":1}', False),
        ({"type": "object", "patternProperties": {"^x": {"type": "null"}}}, r'{"\u0078":1}', False),
        ({"allOf": [ANY, {"type": "object", "additionalProperties": TEXT}]}, r'{"\u0061":"x"}', False),
        ({"type": "array", "items": {"anyOf": [TEXT, ANY]}}, r'[{"\u0061":"x"}]', False),
        ({"type": "object", "properties": {"a": {"const": "\x01"}}}, r'{"a":"\u0001"}', True),
        ({**ANY, "additionalProperties": False}, '{"a":1}', True),
        ({"type": "string"}, r'"\u0001"', True),
    ],
    ids=str,
)
def test_a_declared_name_is_not_written_otherwise(schema, text: str, fits: bool, grammars: Grammars, tokenizer) -> None:
    r"""\u0061 is a: an additional property of that name would have a value that the schema has not for it."""
    grammar, eos = grammars.compile(StructuredOutputsParams(json=schema)), tokenizer.eos_token_id
    for pieces in (grammar.vocabulary.longest_first(text.encode()), tokenizer(text)["input_ids"]):
        follower, drafted = GrammarFollower(grammar, {eos}), GrammarFollower(grammar, {eos})
        for position, token in enumerate([*pieces, eos]):
            allowed = tokens_of(follower.mask())
            assert allowed == tokens_of(drafted.mask(tuple(pieces[:position]))), "a drafted path has the same masks"
            if token not in allowed:
                break
            follower.advance(token)
        assert (token == eos and token in allowed) == fits
    if fits:
        jsonschema = pytest.importorskip("jsonschema")
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_exactly_is_refused_with_the_librarys_message(name: str, grammars: Grammars) -> None:
    schema, word = REFUSED[name]
    for _ in range(2):  # the second time from what is kept
        with pytest.raises(ConfigurationError, match=rf"structured_outputs: the json does not compile: .*{word}"):
            grammars.compile(StructuredOutputsParams(json=schema))
    grammars.check()


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"regex": "[a-c]{2}x?"}, "[a-c]{2}x?"),
        ({"choice": ["yes", "no", "yes and no"]}, "yes|no|yes and no"),
        ({"grammar": 'start: "a" b\nb: /[0-9]{2}/'}, "a[0-9]{2}"),
        ({"grammar": 'root ::= "x" [0-9] "y" | "z"'}, "x[0-9]y|z"),
    ],
    ids=str,
)
def test_the_other_kinds(form, fits: str, grammars: Grammars, tokenizer) -> None:
    grammar, found = grammars.compile(StructuredOutputsParams(**form)), set()
    for seed in range(12):
        tokens, ended = random_answer(grammar, {tokenizer.eos_token_id}, seed)
        assert ended
        found.add(grammars.decoder.decode(tokens))
        assert re.fullmatch(fits, grammars.decoder.decode(tokens))
    assert len(found) > 1


@given(choices=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3))
def test_any_texts_may_be_choices(choices: list[str]) -> None:
    """Quotes, backslashes, line ends and every letter mean themselves."""
    tokenizer = byte_level()
    choices = [text for text in choices if text.isprintable() or text == "\n"] or ['"\\n\n']
    grammars = Grammars(tokenizer, len(tokenizer))
    grammar = grammars.compile(StructuredOutputsParams(choice=choices))
    tokens, ended = random_answer(grammar, {tokenizer.eos_token_id}, len(choices[0]))
    assert ended and grammars.decoder.decode(tokens) in choices


def test_as_many_choices_may_be_given_as_are_taken() -> None:
    """The library's limit of 2,000 items is one of rules, and met at the first token of the answer."""
    tokenizer = byte_level()
    choices = [f"x{number}" for number in range(MOST_CHOICES)]
    grammars = Grammars(tokenizer, len(tokenizer))
    grammar = grammars.compile(StructuredOutputsParams(choice=choices))
    tokens, ended = random_answer(grammar, {tokenizer.eos_token_id}, 7)
    assert ended and grammars.decoder.decode(tokens) in set(choices)


def test_special_tokens_end_an_answer_and_come_nowhere_else(grammars: Grammars, tokenizer) -> None:
    grammar = grammars.compile(StructuredOutputsParams(regex="[0-9]{1,3}"))
    eos, special = tokenizer.eos_token_id, set(grammar.vocabulary.special)
    follower = GrammarFollower(grammar, {eos, 399})
    assert not special & set(tokens_of(follower.mask())) and 399 not in tokens_of(follower.mask())
    (seven,) = tokenizer("7", add_special_tokens=False)["input_ids"]
    assert special & set(tokens_of(follower.mask((seven,)))) == {eos}
    assert 399 in tokens_of(follower.mask((seven,))), "every token that ends the answer may"
    assert all(follower.mask(path).all() for path in ((eos,), (seven, eos), (seven,) * 4)), "rows that nobody follows"
    assert tokens_of(follower.mask((seven,) * 3)) == [eos, 399]
    digits = tokens_of(GrammarFollower(grammar, set()).mask())
    as_text = GrammarFollower(grammar, {seven})
    assert tokens_of(as_text.mask()) == [token for token in digits if token != seven], "an end that is text, too"


def test_compiled_grammars_and_their_states_are_kept_within_bounds(grammars: Grammars, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(module, "KEPT_GRAMMARS", 3)
    monkeypatch.setattr(module, "KEPT_STATES", 4)
    own = Grammars(tokenizer, 400)
    first = own.compile(StructuredOutputsParams(regex="[a-z]{30}"))
    assert own.compile(StructuredOutputsParams(regex="[a-z]{30}")) is first
    for seed in range(3):
        random_answer(first, set(), seed)
    assert first.num_kept == 4
    for number in range(5):
        own.compile(StructuredOutputsParams(choice=[str(number)]))
        with pytest.raises(ConfigurationError):
            own.compile(StructuredOutputsParams(regex="(" * (number + 1)))
        assert len(own._compiled) <= 3 and len(own._failed) <= 3
    assert own.compile(StructuredOutputsParams(regex="[a-z]{30}")) is not first
    own.check()


def test_without_library_or_tokenizer_it_is_said(tokenizer, monkeypatch) -> None:
    form = StructuredOutputsParams(regex="a")
    with pytest.raises(ConfigurationError, match="needs a tokenizer"):
        Grammars(None, 9).compile(form)
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ConfigurationError, match=r"needs llguidance .*pip install 'flexbatch\[structured\]'"):
        Grammars(tokenizer, 400).compile(form)


def test_additional_properties_are_closed_where_nothing_is_said_of_them() -> None:
    inner = {"properties": {"a": True}, "additionalProperties": True}
    found = module.closed({"properties": {"x": inner}, "anyOf": [{"properties": {"properties": {"type": "null"}}}]})
    assert found["additionalProperties"] is False and found["properties"]["x"] == inner
    assert module.closed({"const": {"properties": {}}}) == {"const": {"properties": {}}}
    assert found["anyOf"][0] == {"properties": {"properties": {"type": "null"}}, "additionalProperties": False}
