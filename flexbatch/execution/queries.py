"""What a sequence brings to a pass, as plain data."""

from __future__ import annotations

from flexbatch.execution.pass_batch import QueryTokens
from flexbatch.execution.proposals import Tree
from flexbatch.execution.sampler import SampledTokens
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.pages import PageTable


def tree_query(sequence: Sequence, tree: Tree) -> QueryTokens:
    """The newest token, whose keys and values are still missing, and the nodes below it."""
    parents = (-1, *(parent + 1 for parent in tree.parents))
    token_ids = (sequence.token_ids[-1], *tree.token_ids)
    return QueryTokens(
        sequence.sequence_id,
        token_ids,
        sequence.num_cached,
        0,
        sequence.pages.location,
        sequence.num_prompt_tokens,
        parents,
        sequence.request.adapter,
    )


def text_query(sequence: Sequence, count: int) -> QueryTokens:
    """The next ``count`` tokens of the text."""
    start = sequence.num_cached
    last = start + count == len(sequence.token_ids)
    first_logit = count - 1 if last and sequence.output.finish is None else count
    if sequence.params.prompt_logprobs is not None and sequence.next_scored < sequence.num_prompt_tokens:
        first_logit = min(first_logit, max(0, sequence.next_scored - 1 - start))
    token_ids = tuple(sequence.token_ids[start : start + count])
    return QueryTokens(
        sequence.sequence_id,
        token_ids,
        start,
        first_logit,
        sequence.pages.location,
        sequence.num_prompt_tokens,
        adapter=sequence.request.adapter,
    )


def accepted_path(query: QueryTokens, sequence: Sequence, sampled: SampledTokens) -> tuple[PageTable, int, list[int]]:
    """Of a tree: the sequence's pages, the position of the first token below the root, and the rows that move there and
    behind it."""
    return sequence.pages, query.start + 1, [query.start + node for node in sampled.path]
