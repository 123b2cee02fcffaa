"""Token ids to text as they come, in the context of what stands before them: what the tokenizer writes for the
whole, less what it writes for the prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
WINDOW = 16
"""Tokens before the newest that are decoded along with it. Decoders look back by one token (the space of a first
piece), three bytes (a character), or eight characters (clean-up of spaces)."""
OVERLAP = 4
"""Characters of known text that must come out alike before a window moves on."""
TIDY_REACH = 8
"""Clean-up of spaces deletes a space for what stands up to six characters after it, `` ' ve``; transformers has the
rules."""


def common_length(first: str, second: str) -> int:
    """Characters at the beginning that both have."""
    if second.startswith(first):
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def overlaps(first: str, second: str) -> bool:
    """Whether ``first`` ends with what ``second`` begins with."""
    return any(first.endswith(second[:length]) for length in range(1, min(len(first), len(second)) + 1))


def run_text(run: bytes | bytearray) -> str:
    """What byte fallback makes of a run of byte pieces: its characters, or a replacement character for every byte
    when any is wrong."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        return REPLACEMENT * len(run)


class TextDecoder:
    """What there is to know about a tokenizer to decode by parts. Made once for many outputs.

    ``byte_pieces``: token id -> byte, of a vocabulary with byte fallback (``<0x41>``). These are decoded by runs:
    one wrong byte turns every character of its run into replacement characters, so the text of a run is not known
    before it ends.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added: Collection[int] = {
            *getattr(tokenizer, "added_tokens_decoder", ()),
            *getattr(tokenizer, "all_special_ids", ()),
        }
        self._size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
        self._hidden: dict[int, bool] = {}
        self._lengths: dict[int, int] = {}
        self._written: list[str] | None = None
        """Special tokens as they are written, once somebody asks."""
        self._meets: dict[tuple[str, ...], bool] = {}
        self._alone: dict[int, str] = {}
        self.tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self.byte_pieces = self._find_byte_pieces()

    def _find_byte_pieces(self) -> dict[int, int]:
        if not hasattr(self._tokenizer, "convert_tokens_to_ids"):
            return {}
        ids = self._tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        found = {token: byte for byte, token in enumerate(ids) if token is not None and token != unknown}
        # a vocabulary may have such entries as plain text
        letter = next((token for token, byte in found.items() if byte == ord("A")), None)
        return found if letter is not None and self.decode([letter]) == "A" else {}

    def hides(self, token_id: int) -> bool:
        """Whether the token is no part of the text: it is special, or the tokenizer does not have it (models round
        their vocabularies up)."""
        return self.is_special(token_id) or self.is_unknown(token_id)

    def is_unknown(self, token_id: int) -> bool:
        return self._size is not None and token_id >= self._size and token_id not in self._added

    def is_added(self, token_id: int) -> bool:
        """Whether the token was added to the vocabulary as it is written."""
        return token_id in self._added

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out with ``skip_special_tokens``. Asked of the tokenizer itself, once for every
        added token that comes up."""
        if token_id not in self._added:
            return False
        if token_id not in self._hidden:
            self._hidden[token_id] = self.decode([token_id]) == "" != self.decode([token_id], special=True)
        return self._hidden[token_id]

    def written_length(self, token_id: int) -> int:
        """Characters of a special token as it is written."""
        if token_id not in self._lengths:
            self._lengths[token_id] = len(self.decode([token_id], special=True))
        return self._lengths[token_id]

    def may_meet_special(self, stops: tuple[str, ...]) -> bool:
        """Whether a stop string may hold the beginning, the end or the whole of a special token as it is written,
        with a space around it."""
        if stops not in self._meets:
            if self._written is None:
                special = filter(self.is_special, self._added)
                texts = [self.decode([token_id], special=True).strip() for token_id in special]
                self._written = [*texts, *(f" {text} " for text in texts)]
            self._meets[stops] = any(
                text in stop or overlaps(text, stop) or overlaps(stop, text) for stop in stops for text in self._written
            )
        return self._meets[stops]

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """With ``special``, special tokens are written out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=not special)

    def alone(self, token_id: int) -> str:
        """The text of a token by itself, special or not; each is decoded once."""
        if token_id not in self._alone:
            self._alone[token_id] = "" if self.is_unknown(token_id) else self.decode([token_id], special=True)
        return self._alone[token_id]

    def tail(self, token_ids: Sequence[int], *, special: bool = False) -> list[int]:
        """The last tokens, as many as the decoding of what follows can depend on: `WINDOW` that are not left out,
        and no part of a run of bytes."""
        tail: list[int] = []
        for token_id in reversed(token_ids):
            if self.is_unknown(token_id) or (not special and self.is_special(token_id)):
                continue
            if len(tail) >= WINDOW and not (token_id in self.byte_pieces and tail[-1] in self.byte_pieces):
                break
            tail.append(token_id)
        return tail[::-1]

    def continuation(self, context: Sequence[int], token_ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ``token_ids`` after ``context``: what the two decode to, less what the context decodes to alone.
        With ``special``, special tokens are written out.

        A character that begins in the context and ends in the tokens belongs to the tokens.
        """
        head = self.tail(context, special=special)
        hides = self.is_unknown if special else self.hides
        whole = self.decode([*head, *(token_id for token_id in token_ids if not hides(token_id))], special=special)
        return whole[common_length(self.decode(head, special=special), whole) :] if head else whole

    def alternatives(self, context: Sequence[int], token_ids: Sequence[int]) -> list[str]:
        """The text of each of the tokens, as the only one after ``context``."""
        head = self.tail(context)
        before = self.decode(head) if head else ""
        wholes = [self.decode([*head, token_id]) for token_id in token_ids]
        return [whole[common_length(before, whole) :] for whole in wholes]

    def unsettled(self, text: str) -> int:
        """Characters at the end of a decoded text that more tokens may change: the bytes of a character that is not
        whole, and spaces to be tidied up."""
        count = min(len(text) - len(text.rstrip(REPLACEMENT)), 3)
        if self.tidies:
            end = text[-TIDY_REACH:]
            count = max(count, *(len(end) - index for index, letter in enumerate(end) if letter in " '"), 0)
        return count


class Detokenizer:
    """Appends tokens, hands out text that later tokens cannot change.

    Every token costs the decoding of a window of 16 to 32 tokens, however long the text. Special tokens are left
    out, or written with ``special``.
    """

    def __init__(self, decoder: TextDecoder, context: Sequence[int] = (), *, special: bool = False) -> None:
        self._decoder, self._special = decoder, special
        self._window = decoder.tail(context, special=special)
        self._run = bytearray()
        """The bytes at the end of the window that are one run."""
        for token_id in reversed(self._window):
            if token_id not in decoder.byte_pieces:
                break
            self._run.insert(0, decoder.byte_pieces[token_id])
        self._before_run = self._decode(self._window[: len(self._window) - len(self._run)])
        self._whole = self._before_run + run_text(self._run) if self._run else self._before_run
        self._known = self._whole
        """The part of the window's text that is not to be handed out, or has been."""
        self.pieces: list[str] = []
        """Text that is settled, in the order it came."""
        self.length = 0
        """Characters of the settled text."""
        self.pending = ""
        """Decoded, but more tokens may change it."""

    @property
    def text(self) -> str:
        """All that is settled; only ever grows."""
        return "".join(self.pieces)

    @property
    def total(self) -> int:
        """Characters that the tokens decode to so far."""
        return self.length + len(self.pending)

    def recent(self, count: int) -> str:
        """The last ``count`` settled characters."""
        parts: list[str] = []
        for piece in reversed(self.pieces):
            if count <= 0:
                break
            parts.append(piece[-count:])
            count -= len(piece)
        return "".join(reversed(parts))

    def append(self, token_id: int) -> None:
        decoder = self._decoder
        if decoder.is_unknown(token_id) or (not self._special and decoder.is_special(token_id)):
            return
        self._window.append(token_id)
        byte = decoder.byte_pieces.get(token_id)
        if byte is not None:
            if not self._run:
                self._before_run = self._whole
            self._run.append(byte)
            self._hand_out(self._before_run + run_text(self._run), None)
            return
        self._run.clear()
        whole = self._decode(self._window)
        self._hand_out(whole, decoder.unsettled(whole))
        if len(self._window) > 2 * WINDOW:
            self._move()

    def _hand_out(self, whole: str, unsettled: int | None) -> None:
        """Hand out what is new in the window's text, but for its last characters; nothing with None."""
        known = common_length(self._known, whole)
        settled = known if unsettled is None else max(known, len(whole) - unsettled)
        if settled > known:
            self.pieces.append(whole[known:settled])
            self.length += settled - known
            self._known = whole[:settled]
        self._whole, self.pending = whole, whole[settled:]

    def _move(self) -> None:
        """Let go of the first tokens of the window, if the rest decodes to the same text without them."""
        window = self._decoder.tail(self._window, special=self._special)
        whole = self._decode(window)
        rest = len(self.pending)
        if len(whole) >= rest + OVERLAP and self._whole.endswith(whole[-rest - OVERLAP :]):
            self._window, self._whole, self._known = window, whole, whole[: len(whole) - rest]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, special=self._special) if token_ids else ""

    def check(self) -> None:
        """Invariants of the window and of what was handed out."""
        assert self.length == sum(map(len, self.pieces)), (self.length, self.pieces)
        assert self._whole.endswith(self.pending), (self._whole, self.pending)
        assert [
            self._decoder.byte_pieces[token_id] for token_id in self._window[len(self._window) - len(self._run) :]
        ] == list(self._run)
