"""Single tokens as OpenAI's log-probabilities show them: their bytes, which join to the text, a name for each, and
where in the text they lie."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from flexbatch.text.decoder import TextDecoder

CONTEXT = 256
"""Tokens before a token that can decide how it is written, special ones among them."""


def byte_of_letter() -> dict[str, int]:
    """The letters by which byte-level BPE spells bytes (Radford et al. 2019): printable ones stand for themselves,
    the others for letters above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


class TokenTexts:
    """Bytes and names of tokens, from what their tokenizer says of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoder = TextDecoder(tokenizer)
        self._byte_level = "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self._letters = byte_of_letter()

    def alternatives(self, before: Sequence[int], token_ids: Sequence[int]) -> list[bytes]:
        """The bytes that each of the tokens would add to a text of the tokens ``before``; none for special tokens.
        They may be a part of a character."""
        spelled = {token_id: self._spelled(token_id) for token_id in token_ids}
        spaces = [token_id for token_id in spelled if self._decoder.byte_pieces.get(token_id) == ord(" ")]
        if spaces and not self._decoder.decode(before[-CONTEXT:]):
            # Decoders with byte fallback strip the space that a text begins with.
            spelled |= dict.fromkeys(spaces)
        open_ids = [token_id for token_id, found in spelled.items() if found is None]
        texts = self._decoder.alternatives(before[-CONTEXT:], open_ids) if open_ids else []
        spelled.update((token_id, text.encode()) for token_id, text in zip(open_ids, texts, strict=True))
        return [spelled[token_id] or b"" for token_id in token_ids]

    def _spelled(self, token_id: int) -> bytes | None:
        """The bytes of a token that is the same in every context; None for others."""
        if self._decoder.hides(token_id):
            return b""
        if token_id in self._decoder.byte_pieces:
            return bytes([self._decoder.byte_pieces[token_id]])
        if not self._byte_level:
            return None
        letters = self._tokenizer.convert_ids_to_tokens(token_id)
        if any(letter not in self._letters for letter in letters) or self._decoder.is_added(token_id):
            return letters.encode()
        return bytes(self._letters[letter] for letter in letters)

    def names(self, token_ids: Sequence[int], pieces: Sequence[bytes]) -> list[str]:
        """What to call tokens with these bytes: their text, ``bytes:\\xe6`` for a part of a character, the token's
        own name where it has no text. No two are equal: ``token_id:7`` where a name is taken."""
        names: list[str] = []
        for token_id, piece in zip(token_ids, pieces, strict=True):
            name = self._name(token_id, piece)
            names.append(f"token_id:{token_id}" if name in names else name)
        return names

    def _name(self, token_id: int, piece: bytes) -> str:
        if not piece and self._decoder.is_special(token_id):
            return str(self._tokenizer.convert_ids_to_tokens(token_id))
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def places_in(text: str, pieces: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """Of every token's bytes: the character of the text where they begin, at most its end, and those of them that
    are in the text.

    A stop string cuts the text, so that tokens before the end of the output may lie past the end of the text, whole
    or in part.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    places: list[tuple[int, bytes]] = []
    begun = 0
    for piece in pieces:
        kept, place = 0, begun
        while kept < len(piece) and begun < len(text):
            begun += len(decoder.decode(piece[kept : kept + 1]))
            kept += 1
        places.append((min(place, len(text)), piece[:kept]))
    return places
