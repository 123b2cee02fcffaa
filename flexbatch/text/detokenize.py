"""The output of a request as text: stop strings, stop tokens and length limits, and what can be shown while it
grows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from flexbatch.request import SamplingParams
from flexbatch.text.decoder import REPLACEMENT, Detokenizer, TextDecoder
from flexbatch.text.stops import begun_stop, first_stop


@dataclass(frozen=True)
class Finish:
    """Why an output ended: ``reason`` and ``stop_reason`` as in `Completion`."""

    reason: str
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class FoundStop:
    """A stop string that was completed: it lies between ``cut`` and ``end`` in the text that is shown."""

    cut: int
    stop: str
    end: int


class StopSearch:
    """The text of an answer as its tokens come, searched for stop strings. ``special``: it shows special tokens.

    A stop string may be, or hold, a special token, which the text does not show. Where one may, the text with special
    tokens is decoded and searched as well; `_marks` maps its offsets to the text without them.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        prompt_token_ids: Sequence[int],
        stops: Sequence[str],
        min_tokens: int = 0,
        special: bool = False,
    ) -> None:
        self._decoder, self._stops, self._min_tokens = decoder, tuple(stops), min_tokens
        self._passed, self._passed_spelled = 0, 0
        """Lengths of the text, and of that with special tokens, after ``min_tokens``: what ends there is no stop."""
        self._reach = max(map(len, self._stops), default=1) - 1
        self._num_tokens = 0
        self.visible = Detokenizer(decoder, prompt_token_ids, special=special)
        hidden = not special and decoder.may_meet_special(self._stops)
        self._spelled = Detokenizer(decoder, prompt_token_ids, special=True) if hidden else None
        self._marks: list[tuple[int, int, int]] = []
        """For every special token, where it, or the space that the tokenizer writes before it, begins in the text with
        special tokens, and where it ends, and the length of the visible text there."""

    def append(self, token_id: int) -> FoundStop | None:
        """Read one token; returns the stop string that it completes, the earliest and of these the longest."""
        special = self._decoder.is_special(token_id)
        self._num_tokens += 1
        searched, searched_spelled = self.visible.length, self._spelled.length if self._spelled is not None else 0
        self.visible.append(token_id)
        if not self._stops:
            return None
        start, text = self._unsearched(self.visible, searched)
        early = self._num_tokens <= self._min_tokens
        if early:
            self._passed = start + len(text)
        offset, stop = first_stop(text, self._stops, self._passed - start)
        found = [] if stop is None else [FoundStop(start + offset, stop, start + offset + len(stop))]
        if self._spelled is not None:
            before = self._spelled.total
            self._spelled.append(token_id)
            if special:
                # a special token has a character at least, so that no stop string reaches back over more of them
                mark = (self._begin(token_id, before), self._spelled.total, self.visible.total)
                self._marks = [*self._marks[-self._reach - 1 :], mark]
            start, text = self._unsearched(self._spelled, searched_spelled)
            if early:
                self._passed_spelled = start + len(text)
            found += self._across_special(start, text)
        return min(found, key=lambda each: (each.cut, -len(each.stop)), default=None)

    def _begin(self, token_id: int, before: int) -> int:
        """Where the special token that was read last begins, of which ``before`` characters were there before it.
        Counted from its end: clean-up of spaces makes "<s>'</s>" of "<s> '" and "</s>", so that neither the space
        nor the quote is a part of the token."""
        assert self._spelled is not None
        written = self._decoder.written_length(token_id)
        begin = self._spelled.total - written
        near = self._spelled.recent(written + 1) + self._spelled.pending
        return begin - (before < begin and near[-written - 1 : -written] == " ")

    def _unsearched(self, text: Detokenizer, searched: int) -> tuple[int, str]:
        """Where it begins, and what may hold a stop string that the first ``searched`` characters do not; also
        characters that may still change."""
        settled = text.recent(text.length - searched + self._reach)
        return text.length - len(settled), settled + text.pending.rstrip(REPLACEMENT)

    def _across_special(self, start: int, text: str) -> Iterator[FoundStop]:
        """Stop strings in the text with special tokens that hold the beginning or the end of one: an answer does not
        end because of the letter d in <|im_end|>. The others are for the visible text to tell."""
        for stop in self._stops:
            offset = text.find(stop)
            while offset >= 0:
                begin, end = start + offset, start + offset + len(stop)
                touched = [(before, after) for before, after, _ in self._marks if before < end and begin < after]
                inside = any(before < begin and end < after for before, after in touched)
                if end > self._passed_spelled and touched and not inside:
                    yield FoundStop(self._visible_length(begin), stop, self._visible_length(end))
                    break
                offset = text.find(stop, offset + 1)

    def _visible_length(self, offset: int) -> int:
        """The length of the visible text at an offset of the text with special tokens."""
        if not self._marks:
            # The two may differ at their beginnings: by the space of a first piece.
            assert self._spelled is not None
            return max(0, self.visible.total - (self._spelled.total - offset))
        for before, after, visible in self._marks:
            if offset < after:
                return max(0, visible - max(0, before - offset))
        _, after, visible = self._marks[-1]
        return visible + offset - after

    def showable(self) -> int:
        """Characters of the visible text that no later token takes back: those that are settled, and not the
        beginning of a stop string."""
        shown = self.visible.length - begun_stop(self.visible.recent(self._reach), self._stops)
        if self._spelled is not None:
            # What is pending there may turn out to be the beginning of one as well: clean-up of spaces settles "a" in
            # "a" but not in " a", which is the same token after a special one.
            certain = self._spelled.length - begun_stop(self._spelled.recent(self._reach), self._stops)
            if certain < self._spelled.total:
                shown = min(shown, self._visible_length(certain))
        return max(shown, 0)

    def check(self) -> None:
        """Invariants of the texts and of the marks between them."""
        for text in (self.visible, self._spelled):
            if text is not None:
                text.check()
        assert self._marks == sorted(self._marks) and all(before <= after for before, after, _ in self._marks), (
            self._marks
        )


class OutputText:
    """The output of one request: its kept tokens, its text, and whether it has ended.

    The text is what prompt and output decode to, less what the prompt decodes to alone, without special tokens unless
    ``skip_special_tokens`` is false. Ends at EOS and at stop tokens (kept in `token_ids`, not in the text), at a stop
    string that a token after min_tokens completes (tokens up to that one are kept, the text is cut before the string),
    at max_tokens, or when prompt and output fill the model's context. ``include_stop_str_in_output`` keeps in the text
    what ended it. Tokens offered after the end are not kept, so that a whole
    path of drafted tokens can be offered at once.
    """

    def __init__(
        self,
        decoder: TextDecoder | None,
        params: SamplingParams,
        *,
        eos_token_ids: Collection[int] = (),
        prompt_token_ids: Sequence[int] = (),
        max_context: int | None = None,
    ) -> None:
        self._decoder, self._prompt_token_ids = decoder if params.detokenize else None, prompt_token_ids
        self._special, self._with_stop = not params.skip_special_tokens, params.include_stop_str_in_output
        self._eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self.end_token_ids = self._eos_token_ids | self._stop_token_ids
        """Those that end the output, whatever comes before."""
        if max_context is None and params.max_tokens is None:
            raise ValueError("max_tokens=None is the rest of the context: it needs max_context")
        context_left = (params.max_tokens or 0) if max_context is None else max_context - len(prompt_token_ids)
        self.max_tokens = params.tokens_within(context_left)
        self._stops, self._min_tokens = tuple(params.stop), params.min_tokens
        self.searches = bool(self._stops)  # whether its text may end it
        if self._stops and decoder is None:
            raise ValueError("stop strings need a tokenizer, and the model has none; use stop_token_ids")
        # Decoding as tokens come costs tens of microseconds a token: only where text decides the end, or is shown as
        # it grows.
        self._search = self._open_search() if self._stops else None
        self._read = 0
        """Tokens that `_search` has read."""
        self._shown = 0
        self._cut: int | None = None
        """Where a stop string begins, or ends, if it is a part of the text."""
        self._final: str | None = None
        self._ended_by_token = False
        """Whether the last token is an EOS or stop token, which is no text."""
        self.text_token_ids = list(prompt_token_ids)
        """Prompt and kept tokens."""
        self.finish: Finish | None = None if self.max_tokens else Finish("length")

    @property
    def token_ids(self) -> list[int]:
        """The kept tokens."""
        return self.text_token_ids[len(self._prompt_token_ids) :]

    @property
    def num_tokens(self) -> int:
        """How many tokens are kept."""
        return len(self.text_token_ids) - len(self._prompt_token_ids)

    def _open_search(self) -> StopSearch:
        assert self._decoder is not None
        return StopSearch(self._decoder, self._prompt_token_ids, self._stops, self._min_tokens, self._special)

    def extend(self, token_ids: Iterable[int]) -> int:
        """Offer tokens in order; returns how many were kept. Stops keeping once the output has ended."""
        before = self.num_tokens
        for token_id in token_ids:
            if self.finish is not None:
                break
            self.append(token_id)
        return self.num_tokens - before

    def append(self, token_id: int) -> Finish | None:
        """Keep one token; returns why the output ends with it, or None. Raises RuntimeError after the end."""
        if self.finish is not None:
            raise RuntimeError(f"a token after the end of an output ({self.finish.reason})")
        self.text_token_ids.append(token_id)
        if token_id in self._eos_token_ids:
            self.finish = Finish("stop")
        elif token_id in self._stop_token_ids:
            self.finish = Finish("stop", token_id)
        elif self.num_tokens >= self.max_tokens:
            self.finish = Finish("length")
        self._ended_by_token = self.finish is not None and self.finish.reason == "stop"
        found, length = self._completed_stop(token_id)
        # An EOS or stop token is no text; a stop string that it completes counts where it takes text before it away.
        if found is not None and (self.finish is None or self.finish.reason == "length" or found.cut < length):
            self.finish, self._cut = Finish("stop", found.stop), found.end if self._with_stop else found.cut
            self._ended_by_token = False
        return self.finish

    def complete(self) -> None:
        """End behind the last token, after which nothing can follow: an answer that max_tokens would cut there is
        whole."""
        if self.finish is None or self.finish.reason == "length":
            self.finish = Finish("stop")

    def _completed_stop(self, token_id: int) -> tuple[FoundStop | None, int]:
        """The stop string that this token completes, and the length of the text before the token."""
        if not self._stops:
            return None, 0
        assert self._search is not None
        length = self._search.visible.total
        self._read += 1
        return self._search.append(token_id), length

    @property
    def text(self) -> str:
        """The final text, less an EOS or stop token, cut at a stop string; or of it what no later token can change.
        Empty without a tokenizer, or where no text is wanted."""
        if self._decoder is None:
            return ""
        if self.finish is None:
            search = self._caught_up()
            return search.visible.text[: search.showable()]
        if self._final is None:
            token_ids = self.token_ids
            if self._ended_by_token and not self._with_stop:
                token_ids = token_ids[:-1]
            whole = self._decoder.continuation(self._prompt_token_ids, token_ids, special=self._special)
            self._final = whole[: self._cut]
        return self._final

    def take(self) -> str:
        """The text that has become certain since the last call; at the end the rest of it."""
        if self._decoder is None:
            return ""
        if self.finish is not None:
            new = self.text[self._shown :]
        else:
            search = self._caught_up()
            new = search.visible.recent(search.visible.length - self._shown)[: max(0, search.showable() - self._shown)]
        self._shown += len(new)
        return new

    def _caught_up(self) -> StopSearch:
        """The text as far as there are tokens."""
        if self._search is None:
            self._search = self._open_search()
        for token_id in self.text_token_ids[len(self._prompt_token_ids) + self._read :]:
            self._search.append(token_id)
        self._read = self.num_tokens
        return self._search

    def check(self) -> None:
        """Invariants of the tokens, and of the text that was read."""
        assert self.num_tokens <= self.max_tokens, f"{self.num_tokens} tokens of {self.max_tokens}"
        assert self._read <= self.num_tokens
        assert self._cut is None or (self.finish is not None and isinstance(self.finish.stop_reason, str))
        if self._search is not None:
            self._search.check()
