"""Log-probabilities as the OpenAI API shows them: for each token its bytes, which join to the text, its name, and its
offset in the text."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexbatch.request import Completion, TokenLogprob
from flexbatch.text.decoder import TextDecoder

CONTEXT = 256
"""Number of tokens before a token that can decide how it is written, special ones among them."""


def byte_of_letter() -> dict[str, int]:
    """Returns the letters by which byte-level BPE spells bytes (Radford et al. 2019): printable ones stand for
    themselves, the others for letters above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


@dataclass(frozen=True)
class ShownToken:
    """A token with its log-probability, its name, and its bytes in the text."""

    name: str
    text_bytes: bytes
    entry: TokenLogprob

    @property
    def logprob(self) -> float:
        """The log-probability as JSON can hold it, which has no infinity: -9999 for a token that cannot come, as
        with OpenAI and vLLM."""
        return max(self.entry.logprob, -9999.0)

    def as_dict(self) -> dict[str, Any]:
        return {"token": self.name, "logprob": self.logprob, "bytes": list(self.text_bytes)}


Shown = tuple[ShownToken, list[ShownToken]]
"""A token, and all whose log-probability is known in its place."""


@dataclass(frozen=True)
class Step:
    """One token of an output, or of a prompt: the character of the text where it begins, the token itself, and all
    tokens whose log-probability is known there, itself first."""

    offset: int
    chosen: ShownToken
    known: Sequence[ShownToken]


def chat_logprobs(step: Step, count: int) -> dict[str, Any]:
    """Returns the token and the ``count`` most likely ones (-1: all), whether it is among them or not."""
    ranked = sorted(step.known, key=lambda shown: (-shown.entry.logprob, shown.entry.rank))
    best = ranked if count < 0 else ranked[:count]
    return {**step.chosen.as_dict(), "top_logprobs": [shown.as_dict() for shown in best]}


def legacy_logprobs(steps: Sequence[Step]) -> dict[str, Any]:
    """Returns the form of completions. Nothing is known of the first token of a prompt."""
    return {
        "tokens": [step.chosen.name for step in steps],
        "token_logprobs": [step.chosen.logprob if step.known else None for step in steps],
        "top_logprobs": [{shown.name: shown.logprob for shown in step.known} if step.known else None for step in steps],
        "text_offset": [step.offset for step in steps],
    }


class TokenTexts:
    """Bytes and names of tokens, as their tokenizer gives them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoder = TextDecoder(tokenizer)
        self._byte_level = "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self._letters = byte_of_letter()

    def alternatives(self, before: Sequence[int], token_ids: Sequence[int]) -> list[bytes]:
        """Returns the bytes that each of the tokens would add to a text of the tokens ``before``; none for special
        tokens. They may be a part of a character."""
        spelled = {token_id: self._spelled(token_id) for token_id in token_ids}
        spaces = [token_id for token_id in spelled if self._decoder.byte_pieces.get(token_id) == ord(" ")]
        if spaces and not self._decoder.decode(before[-CONTEXT:]):
            # Decoders with byte fallback strip the space that a text begins with.
            spelled |= dict.fromkeys(spaces)
        open_ids = [token_id for token_id, found in spelled.items() if found is None]
        texts = self._decoder.alternatives(before[-CONTEXT:], open_ids) if open_ids else []
        spelled.update((token_id, text.encode()) for token_id, text in zip(open_ids, texts, strict=True))
        return [spelled[token_id] or b"" for token_id in token_ids]

    def steps(self, sample: Completion) -> list[Step]:
        """Returns the tokens of an output that has log-probabilities, each with its alternatives, as they are shown."""
        known = [*sample.prompt_token_ids, *sample.token_ids]
        return self._steps(known, len(sample.prompt_token_ids), sample.logprobs or [], sample.text)

    def prompt_steps(self, sample: Completion, text: str) -> list[Step]:
        """Returns the same of the prompt, whose text this is."""
        return self._steps(sample.prompt_token_ids, 0, sample.prompt_logprobs or [], text)

    def _steps(
        self, known: Sequence[int], start: int, positions: Sequence[dict[int, TokenLogprob] | None], text: str
    ) -> list[Step]:
        """positions: log-probabilities of the tokens from number ``start`` on, whose text this is."""
        return placed(self.shown(known, start, positions), text)

    def shown(
        self, known: Sequence[int], start: int, positions: Sequence[dict[int, TokenLogprob] | None]
    ) -> list[Shown]:
        """Tokens from number ``start`` on, each with what is known of its alternatives, wherever they are in a text."""
        shown = []
        for index, entries in enumerate(positions, start):
            scored = entries or {known[index]: TokenLogprob(known[index], 0.0, 1)}
            token_ids = list(scored)  # the chosen one first
            found = self.alternatives(known[max(0, index - CONTEXT) : index], token_ids)
            names = self.names(token_ids, found)
            tokens = [ShownToken(*each) for each in zip(names, found, scored.values(), strict=True)]
            shown.append((tokens[0], tokens if entries else []))
        return shown

    def text_of(self, prompt: Any) -> str:
        """Returns a prompt of text as it is, one of token ids as it is decoded."""
        return prompt if isinstance(prompt, str) else self._decoder.decode(prompt)

    def _spelled(self, token_id: int) -> bytes | None:
        """Returns the bytes of a token that is the same in every context; None for others."""
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
        """Returns names for tokens with these bytes: their text, ``bytes:\\xe6`` for a part of a character, the
        token's own name where it has no text. No two are equal: ``token_id:7`` where a name is taken."""
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


def placed(shown: Sequence[Shown], text: str, shift: int = 0) -> list[Step]:
    """Returns tokens at the offsets that they have in their text, which begins at offset ``shift``."""
    offsets = offsets_in(text, [chosen.text_bytes for chosen, _ in shown])
    return [
        Step(shift + offset, dataclasses.replace(chosen, text_bytes=kept), tokens)
        for (offset, kept), (chosen, tokens) in zip(offsets, shown, strict=True)
    ]


def offsets_in(text: str, pieces: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """Returns, for the bytes of every token, the character of the text where they begin, at most its end, and those of
    them that are in the text.

    A stop string cuts the text, so that tokens before the end of the output may lie past the end of the text, whole
    or in part.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets: list[tuple[int, bytes]] = []
    decoded = 0
    for piece in pieces:
        kept, offset = 0, decoded
        while kept < len(piece) and decoded < len(text):
            decoded += len(decoder.decode(piece[kept : kept + 1]))
            kept += 1
        offsets.append((min(offset, len(text)), piece[:kept]))
    return offsets
