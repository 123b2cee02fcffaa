"""What may come next in one request, by the tokens that came before: the processors of transformers'
generation_config.json, kept up to date token by token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flexbatch.request import SamplingParams


@dataclass(frozen=True)
class Effect:
    """What holds for the next token. ``bias`` is added to the model's logits, before penalties; then ``forced`` tokens
    have all of the probability, if there are any, and ``barred`` ones none. ``allowed``: tokens besides which all are
    barred, as int64; None: any may come."""

    bias: dict[int, float]
    forced: tuple[int, ...]
    barred: list[int]
    allowed: np.ndarray | None = None

    def unforced(self, mask: np.ndarray) -> Effect:
        """The same without forced tokens that a mask bars, a bit for every token."""
        return replace(self, forced=tuple(token for token in self.forced if mask[token // 8] >> token % 8 & 1))


class Following:
    """Things by the tokens that they follow: asked with a text, gives all that follow its end. () is the end of every
    text."""

    def __init__(self, pairs: Iterable[tuple[Sequence[int], float]]) -> None:
        self._found: dict[tuple[int, ...], list[tuple[int, float]]] = defaultdict(list)
        for tokens, value in pairs:
            self._found[tuple(tokens[:-1])].append((tokens[-1], value))
        self._lengths = sorted({len(tokens) for tokens in self._found})

    def at_end(self, tail: Sequence[int]) -> list[tuple[int, float]]:
        """(token, value) of every sequence that one more token completes."""
        ends = (tuple(tail[len(tail) - length :]) for length in self._lengths if length <= len(tail))
        return [pair for end in ends for pair in self._found.get(end, ())]

    @property
    def longest(self) -> int:
        """Tokens of a text's end that are looked at, at most."""
        return max(self._lengths, default=0)


class TokenConstraints:
    """The constraints of one request with any of `request.CONSTRAINTS`. A drafted path counts like text: every node of
    a token tree has what plain decoding would have there."""

    def __init__(self, params: SamplingParams, token_ids: list[int], eos_token_ids: Collection[int]) -> None:
        """token_ids: the text, which holds the prompt now; `catch_up` takes in what is appended to this very list."""
        self._params, self._tokens, self._num_prompt, self._seen = params, token_ids, len(token_ids), 0
        self._eos = tuple(eos_token_ids)
        self._ends = tuple(dict.fromkeys((*eos_token_ids, *params.stop_token_ids)))
        # The bias of a sequence that is named twice is the last one, as in transformers. Nothing can keep an output
        # from ending: a bad word that is EOS is none.
        self._biases = Following({tuple(tokens): bias for tokens, bias in params.sequence_bias}.items())
        self._bad_words = Following(
            (tokens, 0.0) for tokens in params.bad_words_ids if len(tokens) > 1 or tokens[0] not in self._eos
        )
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else np.array(allowed, dtype=np.int64)
        self._ngrams: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self.catch_up()

    def catch_up(self) -> None:
        """Take in the tokens that were appended to the text since the last call."""
        size = self._params.no_repeat_ngram_size
        if size:
            for end in range(max(size, self._seen + 1), len(self._tokens) + 1):
                self._ngrams[tuple(self._tokens[end - size : end - 1])].append(self._tokens[end - 1])
        self._seen = len(self._tokens)

    def effect(self, path: tuple[int, ...] = ()) -> Effect:
        """On the token that follows the text and ``path``."""
        params, length = self._params, len(self._tokens) + len(path)
        position = length - self._num_prompt
        reach = max(self._biases.longest, self._bad_words.longest)
        tail = (*self._tokens[len(self._tokens) - min(reach, len(self._tokens)) :], *path)
        bias: dict[int, float] = defaultdict(float)
        for token, value in self._biases.at_end(tail):
            bias[token] += value
        forced: tuple[int, ...] = ()
        if length == 1 and params.forced_bos_token_id is not None:
            forced = (params.forced_bos_token_id,)
        if params.max_tokens is not None and position == params.max_tokens - 1 and params.forced_eos_token_id:
            forced = tuple(params.forced_eos_token_id)  # type: ignore[arg-type]
        barred = [*params.suppress_tokens]
        # After a prompt of one token whose next one is forced, the text begins a token later.
        if position == int(self._num_prompt == 1 and params.forced_bos_token_id is not None):
            barred += params.begin_suppress_tokens
        if not forced:
            barred += [token for token, _ in self._bad_words.at_end(tail)]
            barred += self._repeated(path)
            barred += self._ends if position < params.min_tokens else self._eos if length < params.min_length else ()
        return Effect(dict(bias), forced, barred, self._allowed)

    def _repeated(self, path: tuple[int, ...]) -> list[int]:
        """Tokens that would complete a sequence which is there already, in the text or along the path."""
        size = self._params.no_repeat_ngram_size
        if not size:
            return []
        text = (*self._tokens[max(0, len(self._tokens) - size + 1) :], *path)
        end = text[len(text) - size + 1 :]
        along = [text[i + size - 1] for i in range(len(text) - size + 1) if text[i : i + size - 1] == end]
        return [*self._ngrams.get(end, ()), *along]

    def check(self) -> None:
        """Invariant: every token of the text was taken in."""
        assert self._seen == len(self._tokens), "constraints do not follow the text"
