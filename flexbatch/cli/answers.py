"""Answers as people read them: several of one prompt apart, and the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Iterator

from flexbatch.request import Completion, TokenLogprob

MOST_OTHERS = 5
"""Other tokens that are shown beside the one that was drawn: what a line of a terminal holds."""


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
    if sample.logprobs is None or not sample.logprobs:
        return ""
    lines = [" logprob    rank  token"]
    for token_id, entries in zip(sample.token_ids, sample.logprobs, strict=True):
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
