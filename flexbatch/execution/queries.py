"""What a sequence brings to a pass: how many of its tokens, and these as plain data."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import chain

from flexbatch.execution.block import Block
from flexbatch.execution.pass_batch import UNREAD, MicroBatchTokens, PassBatch, QueryTokens
from flexbatch.execution.proposals import Proposer, Tree
from flexbatch.execution.sampler import SampledTokens
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.page_moves import keep_paths
from flexbatch.policy.admission import chunk_tokens, prompt_budget


@dataclass(frozen=True)
class PassLimits:
    """Query tokens of a micro-batch, prompt tokens of it, and prompt tokens of one sequence, at most; and the nodes of
    the largest tree."""

    micro_batch_tokens: int
    prefill_budget: int
    prefill_chunk: int
    tree_nodes: int


def token_counts(
    batch: Iterable[Sequence], cache: KVCache, limits: PassLimits, num_decoding: int = 0
) -> dict[Sequence, int]:
    """Tokens of its text that each sequence of a micro-batch brings, beside ``num_decoding`` others; those that wait
    for a prefix or for the budget of a later pass are left out."""
    uncached = {sequence: sequence.num_uncached for sequence in batch}
    num_single = num_decoding + sum(count == 1 for count in uncached.values())
    budget = prompt_budget(num_single, limits.micro_batch_tokens, limits.prefill_budget, limits.tree_nodes)
    counts = {}
    for sequence, uncached_tokens in uncached.items():
        if not cache.prefix_ready(sequence.pages):
            continue
        count = 1
        if uncached_tokens > 1:
            count = chunk_tokens(uncached_tokens, limits.prefill_chunk, budget)
            budget -= count
        if count > 0:
            counts[sequence] = count
    return counts


def proposed_trees(proposer: Proposer | None, counts: Iterable[Mapping[Sequence, int]]) -> dict[Sequence, Tree]:
    """The trees of those that decode in a pass to which sequences bring so many tokens of their text."""
    chosen = [pair for batch in counts for pair in batch.items()]
    if proposer is None or not chosen:
        return {}
    decoding = [
        sequence
        for sequence, _ in chosen
        if sequence.num_uncached == 1 and sequence.output.finish is None and sequence.drafted and sequence.fault is None
    ]
    depths = [sequence.output.max_tokens - sequence.num_output_tokens - 1 for sequence in decoding]
    num_prompt_tokens = sum(count for _, count in chosen if count > 1)
    return dict(zip(decoding, proposer.propose(decoding, depths, num_prompt_tokens), strict=True))


def without_prefix(running: Iterable[Sequence], cache: KVCache) -> list[Sequence]:
    """Those that have to begin anew: the prefix that they share has been read, and what they see of it is gone. The
    others hold it from now on."""
    waiting = [each for each in running if each.pages.waits and cache.prefix_ready(each.pages)]
    return [each for each in waiting if not cache.attach_prefix(each.pages)]


def hold_windows(cache: KVCache, counts: Iterable[Mapping[Sequence, int]], tree_nodes: int) -> None:
    """Take the pages of a pass in layers that keep only their window. Who brings one token may bring a tree below
    it."""
    if cache.windows is None:
        return
    for sequence, count in chain.from_iterable(batch.items() for batch in counts):
        cache.hold(sequence.pages, sequence.num_cached + count + (tree_nodes if count == 1 else 0))


def composed_pass(block: Block, limits: PassLimits, proposer: Proposer | None, micro_batches: Many[int]) -> PassBatch:
    """What the sequences of some micro-batches bring: those that decode what is in the block's arrays, the others
    chunks of their text, or trees."""
    if proposer is None:
        block.let_in()
    others, decoding = block.others_by_micro_batch(), [block.decoding.tokens(k) for k in micro_batches]
    counts = [
        token_counts(others[k], block.cache, limits, len(tokens))
        for k, tokens in zip(micro_batches, decoding, strict=True)
    ]
    hold_windows(block.cache, counts, limits.tree_nodes)
    trees = proposed_trees(proposer, counts)
    batches = list[MicroBatchTokens | tuple[QueryTokens, ...]]()
    for batch, tokens in zip(counts, decoding, strict=True):
        queries = tuple(
            tree_query(sequence, tree)
            if (tree := trees.get(sequence)) is not None and tree.token_ids
            else text_query(sequence, count)
            for sequence, count in batch.items()
        )
        batches.append(MicroBatchTokens(tokens, queries) if len(tokens) else queries)
    greedy = proposer is None and block.decoding.greedy and all(each.largest_only for batch in counts for each in batch)
    return PassBatch(tuple(queries for queries in batches if queries), greedy)


def left_over(batch: PassBatch, taken: Container[int]) -> Iterator[QueryTokens]:
    """The query tokens of all sequences but those whose ids are ``taken``."""
    for tokens in batch.decoding:
        for i, sequence_id in enumerate(tokens.sequence_ids.tolist()):
            if sequence_id not in taken:
                yield tokens[i]
    yield from (query for query in batch.others if query.sequence_id not in taken)


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
    """The next ``count`` tokens of the text, or the one that the host has not read yet."""
    table, text = sequence.pages, sequence.token_ids
    start = table.num_tokens
    last = start + count == len(text) + sequence.num_unread
    first_logit = count - 1 if last and sequence.output.finish is None else count
    if sequence.scores_prompt and sequence.next_scored < sequence.num_prompt_tokens:
        first_logit = min(first_logit, max(0, sequence.next_scored - 1 - start))
    return QueryTokens(
        sequence.sequence_id,
        tuple(text[start : start + count]) or (UNREAD,),
        start,
        first_logit,
        table.location,
        sequence.num_prompt_tokens,
        adapter=sequence.request.adapter,
    )


def keep_accepted(
    cache: KVCache,
    queries: Iterable[QueryTokens],
    sequences: Mapping[int, Sequence],
    sampled: Mapping[int, SampledTokens],
) -> None:
    """Of every tree, the rows of its accepted path move to the position of the first token below its root and behind
    it."""
    paths = [
        (sequences[id].pages, query.start + 1, [query.start + node for node in sampled[id].path])
        for query in queries
        if query.parents is not None and (id := query.sequence_id) in sequences
    ]
    keep_paths(cache, paths)
