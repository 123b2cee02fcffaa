"""The order in which the rows of the sort buffer go to the engine. Pure."""

from __future__ import annotations

from collections.abc import Sequence

SHARED_TOKENS = 32
"""Number of equal first tokens from which on prompts stay together."""


def order_rows(
    prompts: Sequence[Sequence[int]], max_tokens: Sequence[int], shared_tokens: int = SHARED_TOKENS
) -> list[int]:
    """Returns the indices of the rows in the order to issue them.

    Prompts with a long common beginning are neighbors, so that what an engine keeps of one serves the next. Among
    these groups the longest sequence (prompt and output tokens) goes first: what is left for the end of a job is
    short, so that its last passes are few (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969, longest
    processing time first).
    """
    groups: list[list[int]] = []
    previous: Sequence[int] | None = None
    for row in sorted(range(len(prompts)), key=lambda row: (tuple(prompts[row]), row)):
        prompt = prompts[row]
        if previous is not None and len(prompt) >= shared_tokens and previous[:shared_tokens] == prompt[:shared_tokens]:
            groups[-1].append(row)
        else:
            groups.append([row])
        previous = prompt
    longest = {group[0]: max(len(prompts[row]) + max_tokens[row] for row in group) for group in groups}
    return [row for group in sorted(groups, key=lambda group: (-longest[group[0]], group[0])) for row in group]
