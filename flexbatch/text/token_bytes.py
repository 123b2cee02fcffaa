"""What every token of a vocabulary adds to a text, in bytes: what a grammar has to know of a tokenizer.

Three kinds of vocabularies spell their tokens: byte-level BPE (GPT-2, Llama 3, Qwen) by letters that stand for bytes,
SentencePiece (Llama 2, Gemma, T5) by text with U+2581 for spaces and with tokens for single bytes, and others as they
are. Where tokens do not simply stand one after the other in the text, as WordPiece's, which get spaces between them, no
grammar can follow, and the tokenizer is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from flexbatch.text.decoder import TextDecoder
from flexbatch.validation.checks import short
from flexbatch.validation.errors import ConfigurationError

SPACE = "\u2581"
TRIED = 64
"""Tokens whose spelling is compared with what the tokenizer makes of them."""
KEPT_TEXTS = 4096
"""Texts whose tokens are kept: what has to come, such as the names of fields, is the same in all answers to a schema,
and the tokenizer takes 50 us for it."""


def byte_letters() -> dict[str, int]:
    """The letters by which byte-level BPE spells bytes: printable ones stand for themselves, the others are those from
    U+0100 on, in their order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + offset): byte for offset, byte in enumerate(others)}


class Escapes:
    """Escapes by number of JSON (\\u0061 for a) in tokens. ``barred``: the tokens that have one or begin one, a bit
    for each, lowest first: behind any text, and behind one that ends in a backslash that escapes."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._ends: dict[int, tuple[bool, bool]] = {}
        found = np.zeros((2, len(tokens)), dtype=bool)
        for token, text in enumerate(tokens):
            if b"\\" in text or text[:1] == b"u":
                before, behind = _escaped(text, False), _escaped(text, True)
                found[:, token] = before[0], behind[0]
                self._ends[token] = before[1], behind[1]
        self.barred = np.packbits(found, axis=1, bitorder="little")

    def ends_within(self, token: int, escaping: bool) -> bool:
        """Whether a text ends in a backslash that escapes, after one more token."""
        return self._ends.get(token, (False, False))[escaping]


def _escaped(text: bytes, escaping: bool) -> tuple[bool, bool]:
    """Whether a part of a text has an escape by number, and whether it ends in a backslash that escapes."""
    by_number = False
    for byte in text:
        by_number |= escaping and byte == ord("u")
        escaping = byte == ord("\\") and not escaping
    return by_number, escaping


class Vocabulary:
    """The bytes of every token, b"" of those without a place in a text: special ones, and those that only the model
    has. Raises ConfigurationError for a tokenizer whose tokens do not add up to the text."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        """size: of the model's vocabulary."""
        self._tokenizer, self._decoder = tokenizer, TextDecoder(tokenizer)
        self._kept_tokens = lru_cache(KEPT_TEXTS)(self._tokens_of)
        known = min(size, len(tokenizer))
        pieces = tokenizer.convert_ids_to_tokens(list(range(known)))
        unknown = getattr(tokenizer, "unk_token_id", None)
        hidden = {token for token in range(known) if self._decoder.hides(token)} | {unknown}
        self.special = {token: pieces[token] or "" for token in hidden if token is not None and token < known}
        self._pieces: Mapping[int, str] = {
            token: piece for token, piece in enumerate(pieces) if piece is not None and token not in hidden
        }
        letters = self._letters()
        self.bytes: list[bytes] = [b""] * size
        for token, piece in self._pieces.items():
            self.bytes[token] = self._spelled(token, piece, letters)
        self._longest = max(map(len, self.bytes), default=0)
        self._by_bytes = {found: token for token, found in reversed([*enumerate(self.bytes)]) if found}
        self._compare()

    @cached_property
    def escapes(self) -> Escapes:
        """Of JSON, in its tokens."""
        return Escapes(self.bytes)

    def _letters(self) -> Mapping[str, int]:
        """The letters of byte-level BPE; empty for other vocabularies. Told by any letter that stands for another
        byte: the decoder makes that of it."""
        letters = byte_letters()
        ids = {piece: token for token, piece in self._pieces.items() if len(piece) == 1}
        moved = [(letter, byte) for letter, byte in letters.items() if ord(letter) >= 256 and byte < 128]
        found = next(((ids[letter], byte) for letter, byte in moved if letter in ids), None)
        return letters if found is not None and self._decode([found[0]]) == chr(found[1]) else {}

    def _spelled(self, token: int, piece: str, letters: Mapping[str, int]) -> bytes:
        if token in self._decoder.byte_pieces:
            return bytes([self._decoder.byte_pieces[token]])
        if self._decoder.is_added(token):
            return piece.encode(errors="replace")
        if letters:
            # What is not spelled by them has no place in the text that the decoder writes.
            return bytes(letters[letter] for letter in piece) if all(letter in letters for letter in piece) else b""
        return piece.replace(SPACE, " ").encode(errors="replace")

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _compare(self) -> None:
        """Some of all tokens, and the longest, after a token of letters, by what the tokenizer makes of them."""
        added = self._decoder.is_added
        texts = {}
        for token, found in enumerate(self.bytes):
            if found and not added(token) and token not in self._decoder.byte_pieces:
                try:
                    texts[token] = found.decode()
                except UnicodeDecodeError:  # a part of a character shows only with the rest of it
                    continue
        anchor = next((token for token, text in texts.items() if text.isalpha()), None)
        if anchor is None:
            return
        tried = [*list(texts)[:: max(1, len(texts) // TRIED)], max(texts, key=lambda token: len(texts[token]))]
        before = self._decode([anchor])
        for token in tried:
            whole = self._decode([anchor, token])
            if whole != before + texts[token]:
                raise ConfigurationError(
                    f"structured_outputs cannot follow this tokenizer ({type(self._tokenizer).__name__}): its token "
                    f"{token}, {short(self._pieces[token])}, after {short(before)} makes the text {short(whole)}, so "
                    "that tokens do not simply add up. allowed_token_ids and bad_words work with any tokenizer"
                )

    def tokenize(self, text: str | bytes) -> list[int]:
        """The tokens of a text in the middle of another, by the tokenizer itself where that can be told, else by the
        longest tokens that fit. For the library, which asks how a text that must come is best written."""
        return list(self._kept_tokens(text.encode() if isinstance(text, str) else text))

    def _tokens_of(self, wanted: bytes) -> list[int]:
        try:
            start = self._tokenizer("\n", add_special_tokens=False, verbose=False)["input_ids"]
            whole = self._tokenizer("\n" + wanted.decode(), add_special_tokens=False, verbose=False)["input_ids"]
        except UnicodeDecodeError:
            return self.longest_first(wanted)
        rest = list(whole[len(start) :])
        if list(whole[: len(start)]) == list(start) and self.join(rest) == wanted:
            return rest
        return self.longest_first(wanted)

    def longest_first(self, wanted: bytes) -> list[int]:
        tokens: list[int] = []
        offset = 0
        while offset < len(wanted):
            ends = range(min(len(wanted), offset + self._longest), offset, -1)
            found = next((end for end in ends if wanted[offset:end] in self._by_bytes), None)
            if found is None:
                return tokens  # the vocabulary has no token for the next byte
            tokens.append(self._by_bytes[wanted[offset:found]])
            offset = found
        return tokens

    def join(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self.bytes[token] for token in tokens if token < len(self.bytes))


class ByteDecoder(TextDecoder):
    """Decodes by what tokens add to a text, so that the text is what the grammar saw: no spaces are tidied up, and the
    first piece keeps its own."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        super().__init__(tokenizer)
        self.tidies = False
        self.byte_pieces = {}

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        names = self._vocabulary.special
        parts = (names[token].encode() if special and token in names else self._part(token) for token in token_ids)
        return b"".join(parts).decode(errors="replace")

    def _part(self, token: int) -> bytes:
        return self._vocabulary.bytes[token] if token < len(self._vocabulary.bytes) else b""

    def is_special(self, token_id: int) -> bool:
        return token_id in self._vocabulary.special
