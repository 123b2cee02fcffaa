"""Answers as people read them: in order, several of one prompt apart, and the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO

from flexbatch.request import Completion, TokenLogprob

RULE = "-" * 70
MOST_OTHERS = 5
"""Other tokens that are shown beside the one that was drawn: what a line of a terminal holds."""


class OrderedOutput:
    """Writes streams of text in the order of their prompts: the first that is not done as it grows, the others when
    their turn comes."""

    def __init__(self, stream: IO[str], prompts: Sequence[str], *, titles: bool) -> None:
        self.stream, self.prompts, self.titles = stream, prompts, titles
        self.texts = [""] * len(prompts)
        self.endings: dict[int, str] = {}
        """Maps the number of a prompt that is done to what is written after its text."""
        self.current = 0
        self.written = 0
        self._begin()

    def _begin(self) -> None:
        self.written = 0
        if self.current < len(self.prompts) and self.titles:
            self._write(f"{RULE}\n{self.prompts[self.current]}" if self.current else self.prompts[0])

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def add(self, number: int, text: str) -> None:
        """Adds text to a prompt."""
        self.texts[number] += text
        self._advance()

    def finish(self, number: int, text: str, after: str = "") -> None:
        """Sets the whole text of a prompt, and what follows it; what has not been written of it is written now or at
        its turn."""
        self.texts[number] = text
        self.endings[number] = f"{after}\n"
        self._advance()

    def _advance(self) -> None:
        while self.current < len(self.prompts):
            text = self.texts[self.current]
            if len(text) > self.written:
                self._write(text[self.written :])
                self.written = len(text)
            if self.current not in self.endings:
                return
            self._write(self.endings[self.current])
            self.current += 1
            self._begin()

    def check(self) -> None:
        assert self.current == len(self.prompts), f"{self.current} of {len(self.prompts)} prompts are written"


def answer_texts(completion: Completion) -> str:
    """The text of the answer to a prompt. Of several each has a line of its own above it, and its tokens below it where
    log-probabilities were asked for."""
    samples = completion.samples
    if not samples:
        return completion.text
    return "\n".join(
        f"[answer {number} of {len(samples)}]\n{sample.text}{token_lines(sample)}"
        for number, sample in enumerate(samples, 1)
    )


def token_lines(sample: Completion) -> str:
    """A line for each generated token, behind a line break: its log-probability, its rank, itself, and the likeliest of
    the others."""
    return _table("token", sample.token_ids, sample.logprobs or [])


def prompt_lines(completion: Completion) -> str:
    """The same for the tokens of the prompt, where they were asked for."""
    return _table("token of the prompt", completion.prompt_token_ids, completion.prompt_logprobs or [])


def _table(title: str, token_ids: Sequence[int], positions: Sequence[dict[int, TokenLogprob] | None]) -> str:
    if not positions:
        return ""
    lines = [f" logprob    rank  {title}"]
    for token_id, entries in zip(token_ids, positions, strict=True):
        if entries is None:  # the first token follows nothing; some are not scored
            continue
        chosen = entries[token_id]
        others = sorted((e for e in entries.values() if e.token_id != token_id), key=lambda entry: entry.rank)
        lines.append(f"{chosen.logprob:8.3f}  {chosen.rank:6}  {_name(chosen)}{''.join(_others(others))}")
    return "\n\n" + "\n".join(lines)


def _others(others: list[TokenLogprob]) -> Iterator[str]:
    if others:
        yield "   others: "
        yield ", ".join(f"{_name(other)} {other.logprob:.3f}" for other in others[:MOST_OTHERS])
    if len(others) > MOST_OTHERS:
        yield f" and {len(others) - MOST_OTHERS:,} more"


def _name(entry: TokenLogprob) -> str:
    return f"{entry.token_id}" if entry.decoded_token is None else repr(entry.decoded_token)
