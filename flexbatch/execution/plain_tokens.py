"""Tokens that come as plain numbers: given to their sequences without a call of each for all that one could need."""

from __future__ import annotations

from collections.abc import Mapping

from flexbatch.execution.decoding import Decoding
from flexbatch.execution.pass_batch import DecodedTokens, PassBatch
from flexbatch.execution.sampler import SampledTokens
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.kvcache import KVCache


def take_decoded(
    decoding: Decoding,
    decoded: DecodedTokens,
    batch: PassBatch,
    sequences: Mapping[int, Sequence],
    cache: KVCache | None,
    observed: bool,
) -> tuple[set[int], dict[int, SampledTokens]]:
    """The ids of those that have taken theirs, and what is left by id. cache: that counts the rows of a pass; None
    where they are counted already. observed: whether somebody wants to see the tokens of all that are in no array."""
    taken, others = decoding.append(decoded, counted=cache is None)
    if not observed:
        taken |= take_plain(batch, sequences, dict(others), cache)
    return taken, {id: SampledTokens([token], [None]) for id, token in others if id not in taken}


def take_plain(
    batch: PassBatch, sequences: Mapping[int, Sequence], drawn: Mapping[int, int], cache: KVCache | None
) -> set[int]:
    """Of those in no array: who keeps the token that was ``drawn`` for it, by its id, and just goes on.

    Stop strings, penalties, log-probabilities and ends of 2,477 sequences on the lower tiers took the host 10 ms a
    pass, where none had any; this takes 5.
    """
    taken = set[int]()
    for query in batch.others if drawn else ():
        token, sequence = drawn.get(query.sequence_id), sequences.get(query.sequence_id)
        if token is not None and sequence is not None and sequence.take_plain(token):
            if cache is not None:
                cache.commit(sequence.pages, query.start + query.num_tokens)
            taken.add(query.sequence_id)
    return taken
