"""What the planner is told of a job's lengths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexbatch.execution.job import Job


def rows(prompt: int, most: int, answer: int, max_positions: int) -> int:
    """Of one request: a prompt that is only scored is not read to its end; the last token needs no row."""
    if most == 0 and prompt > 1:
        return prompt - 1
    return prompt + max(0, min(answer, max_positions - prompt) - 1)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0, 0, 1, 2, 9, 40]))),
    st.integers(1, 24),
    st.lists(st.integers(0, 12), max_size=8),
)
def test_the_rows_of_every_request(lengths, max_positions, answers):
    job = Job.of(iter(lengths), max_positions, iter(answers))
    pairs = lengths or [(1, 0)]
    assert job.cache_tokens == tuple(rows(prompt, most, most, max_positions) for prompt, most in pairs)
    assert job.prompt_tokens == tuple(max(1, prompt - (most == 0)) for prompt, most in pairs)
    enough = len(answers) >= len(pairs)
    drawn = [rows(*pair, answer, max_positions) for pair, answer in zip(pairs, answers, strict=False)]
    assert job.likely_tokens == (tuple(drawn) if enough else ())
