"""Token ids to text as they come: partial characters, stop strings, stop tokens and length limits."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from flexbatch.request import SamplingParams

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Finish:
    """Why an output ended: ``reason`` and ``stop_reason`` as in `Completion`."""

    reason: str
    stop_reason: str | int | None = None


class Detokenizer:
    """Appends tokens, hands out text that later tokens cannot change.

    A token may hold half a character, and a token's text may depend on the one before it (a leading space in SentencePiece). So text is decoded
    over a window that starts one piece before the new tokens, and what ends in a replacement character is held back until the character is whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._window = 0
        self._read = 0
        self._context = ""
        self.text = ""
        """Whole characters so far; only ever grows."""
        self.pending = ""
        """Decoded but held back: begins with whole characters, ends in a replacement character, or is empty."""

    def append(self, token_id: int) -> None:
        self._token_ids.append(token_id)
        decoded = self._decode(self._window)[len(self._context) :]
        if decoded.endswith(REPLACEMENT):
            self.pending = decoded
            return
        if decoded:
            self.text += decoded
            self._window, self._read = self._read, len(self._token_ids)
            self._context = self._decode(self._window)
        self.pending = ""

    def _decode(self, start: int) -> str:
        return self._tokenizer.decode(self._token_ids[start:], skip_special_tokens=True)


class OutputText:
    """The output of one request: its kept tokens, its text, and whether it has ended.

    Ends at EOS and at stop tokens (kept in `token_ids`, not in the text), at a stop string (tokens up to the one that completes it are kept, the text
    is cut before it), at max_tokens, or when prompt and output fill the model's context. Tokens offered after the end are not kept, so that a whole
    path of drafted tokens can be offered at once.
    """

    def __init__(
        self, tokenizer: Any, params: SamplingParams, *, eos_token_ids: Collection[int] = (), prompt_tokens: int = 0, max_context: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        if max_context is None and params.max_tokens is None:
            raise ValueError("max_tokens=None is the rest of the context: it needs max_context")
        room = (params.max_tokens or 0) if max_context is None else max_context - prompt_tokens
        self.max_tokens = params.tokens_within(room)
        self._stops = tuple(params.stop)
        # Decoding as tokens come costs ten microseconds a token: only where text decides the end.
        self._detokenizer = Detokenizer(tokenizer) if self._stops else None
        if self._stops and tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and the model has none; use stop_token_ids")
        self.token_ids: list[int] = []
        self.finish: Finish | None = None if self.max_tokens else Finish("length")

    def extend(self, token_ids: Iterable[int]) -> int:
        """Offer tokens in order; returns how many were kept. Stops keeping once the output has ended."""
        before = len(self.token_ids)
        for token_id in token_ids:
            if self.finish is not None:
                break
            self.append(token_id)
        return len(self.token_ids) - before

    def append(self, token_id: int) -> Finish | None:
        """Keep one token; returns why the output ends with it, or None. Raises RuntimeError after the end."""
        if self.finish is not None:
            raise RuntimeError(f"a token after the end of an output ({self.finish.reason})")
        self.token_ids.append(token_id)
        if token_id in self._eos_token_ids:
            self.finish = Finish("stop")
        elif token_id in self._stop_token_ids:
            self.finish = Finish("stop", token_id)
        elif (stop := self._completed_stop(token_id)) is not None:
            self.finish = Finish("stop", stop)
        elif len(self.token_ids) >= self.max_tokens:
            self.finish = Finish("length")
        return self.finish

    def _completed_stop(self, token_id: int) -> str | None:
        """The stop string that this token completes, searched also in characters that wait for the rest of the next one."""
        if self._detokenizer is None:
            return None
        searched = len(self._detokenizer.text)
        self._detokenizer.append(token_id)
        return first_stop(self._visible(), self._stops, searched)[1]

    def _visible(self) -> str:
        assert self._detokenizer is not None
        return self._detokenizer.text + self._detokenizer.pending.rstrip(REPLACEMENT)

    @property
    def text(self) -> str:
        """The final text, or of it what no later token can change; empty where the model has no tokenizer.

        The final text is ``tokenizer.decode(token_ids, skip_special_tokens=True)``, less an EOS or stop token, cut at a stop string.
        """
        if self._tokenizer is None:
            return ""
        token_ids = self.token_ids
        if self.finish is not None and self.finish.reason == "stop" and not isinstance(self.finish.stop_reason, str):
            token_ids = token_ids[:-1]
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        if self.finish is None:
            text = text.rstrip(REPLACEMENT)
            return text[: len(text) - begun_stop(text, self._stops)]
        if isinstance(self.finish.stop_reason, str):
            # Where a tokenizer tidies up spaces over the whole text, the stop string may only be there as it was seen.
            text = text if self.finish.stop_reason in text else self._visible()
            return text[: first_stop(text, self._stops)[0]]
        return text


def begun_stop(text: str, stops: Iterable[str]) -> int:
    """Characters at the end of `text` that may turn out to be the beginning of a stop string."""
    return max((length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])), default=0)


def first_stop(text: str, stops: Iterable[str], known: int = 0) -> tuple[int, str | None]:
    """(position, stop string) of the earliest stop string in `text`, the longer at equal positions, or (len(text), None).

    The first `known` characters are known to hold none, so that only occurrences that reach beyond them are looked for.
    """
    best: tuple[int, int, str] | None = None
    for stop in stops:
        position = text.find(stop, max(0, known - len(stop) + 1))
        if position >= 0 and (best is None or (position, -len(stop)) < best[:2]):
            best = (position, -len(stop), stop)
    return (len(text), None) if best is None else (best[0], best[2])
