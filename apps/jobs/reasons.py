"""Why rows failed, counted at the end of a job, each reason with what helps against it.

A reason is known by the text of the error, which is all that the output and the journal hold of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

ANOTHER_JOB = "(a setting of the job: into another folder, or with --overwrite)"
SHOWN_REASONS, SHOWN_CHARACTERS = 10, 100


@dataclass(frozen=True)
class Reason:
    """``title`` completes "12 rows are ..."; ``remedy`` is what the user can do, if anything; ``retry`` says whether
    --retry-failed can end otherwise."""

    title: str
    remedy: str = ""
    retry: bool = False


TOO_LONG = Reason("too long for the model", f"--truncate left cuts such prompts {ANOTHER_JOB}")
MEMORY = Reason("too long for the memory budgets", "raise --gpu-memory or --cpu-memory", retry=True)
PASSING = Reason("ended by the machine", retry=True)
"""By what another attempt need not meet: a full disk, a network, a lack of memory."""
REASONS = (
    (r"\b[Cc]ontext of \d+ allows|\bmodel's context\b", TOO_LONG),
    (r"tokens need .*(cache pages| tier)", MEMORY),
    (r"\bparsed_json: ", Reason("of answers that do not parse, whose texts are there")),
    (r"\bis (missing or )?null$|\bis missing or null|\bis empty\b|^holds no prompt", Reason("empty")),
    (r"UTF-8|surrogate pair", Reason("not Unicode text", "convert the input to UTF-8")),
    (r"\bschema\b|\bgrammar\b|\bregex", Reason("of an invalid schema")),
    (r"duplicate|that an earlier line has|custom_id", Reason("without a custom_id of their own")),
    (r"\bis not supported|which FlexBatch does not have", Reason("asking for what FlexBatch does not have")),
    (r"sampling parameter|^setting |out of range|, wanted |must be ", Reason("of an invalid setting")),
    (r"chat template|\"role\"|list of messages", Reason("of messages that make no prompt")),
    (r"\bJSON\b|levels|twice|\bline \d+", Reason("unreadable as JSON")),
    (r"\bcells?\b|column '", Reason("unlike the other rows of their file")),
    (r"not finite", Reason("of logits that are no finite numbers", f"--dtype float32 {ANOTHER_JOB}")),
    (r"bar every token", Reason("without a token left to draw")),
    (r"^(OSError|ConnectionError|TimeoutError|MemoryError|OutOfMemoryError|RuntimeError|torch\.)\b", PASSING),
)


def reason_of(error: str) -> Reason:
    """Returns the reason behind the error of a row. One that is not known is its own, without its numbers."""
    for pattern, reason in REASONS:
        if re.search(pattern, error):
            return reason
    first = re.sub(r"^prompt \d+(, sample \d+)?: ", "", error.partition("\n")[0]) or "without a message"
    text = re.sub(r"\d+", "N", first)
    return Reason(f"of this error: {text[:SHOWN_CHARACTERS]}")


def described_errors(errors: Iterable[str], rows: int) -> str:
    """Returns how many of ``rows`` rows failed and why, the most frequent reason first, with the remedies."""
    counts = Counter(map(reason_of, errors))
    failed = sum(counts.values())
    width = len(f"{max(counts.values(), default=0):,}")
    lines = [f"{failed:,} of {rows:,} rows have an error (the column error has it):"]
    for reason, count in counts.most_common(SHOWN_REASONS):
        lines.append(f"  {count:>{width},} {reason.title}{f': {reason.remedy}' if reason.remedy else ''}")
    if len(counts) > SHOWN_REASONS:
        rest = sum(count for _, count in counts.most_common()[SHOWN_REASONS:])
        lines.append(f"  {rest:>{width},} of {len(counts) - SHOWN_REASONS} other reasons")
    again = sum(count for reason, count in counts.items() if reason.retry)
    if again:
        lines.append(f"--retry-failed can help {again:,} of them")
    return "\n".join(lines)
