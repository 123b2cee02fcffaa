"""Where a model stops giving finite numbers: sequences that failed are read once more, by themselves, and the hidden
states looked at after every layer.

Looked for afterward alone, as a look at the hidden states of every layer would cost each good pass a launch and a read
of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.execution.executor import Executor
from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.execution.pass_batch import PassBatch, QueryTokens
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.pages import PageTable

EMBEDDING = -1


@dataclass
class Reread:
    """A failed sequence with pages of its own: nothing that others share is written again."""

    failed: Sequence
    table: PageTable
    token_ids: list[int]
    layer: int | None = None
    """The first one after which hidden states are not finite; None: none so far."""


def explain_faults(finished: Iterable[Sequence], scheduler: Scheduler, executor: Executor) -> None:
    """Name the layer of doubt in the errors of those whose logits are not finite. The scheduler has given back their
    pages."""
    faulty = [sequence for sequence in finished if sequence.fault is not None and sequence.fault.in_model]
    layers: dict[Sequence, int | None] = dict.fromkeys(faulty)
    # Passes of a pipeline are in flight, and nobody looks at the layers of other stages.
    while faulty and executor.stages is None:
        readings = opened(faulty, scheduler)
        if not readings:
            break
        try:
            read(readings, scheduler, executor)
        finally:
            for reading in readings:
                scheduler.cache.free(reading.table)
        layers |= {
            reading.failed: executor.arch.num_layers if reading.layer is None else reading.layer for reading in readings
        }
        faulty = [sequence for sequence in faulty if layers[sequence] is None]
    for sequence, layer in layers.items():
        sequence.error += f"; {described(layer, executor)}"


def described(layer: int | None, executor: Executor) -> str:
    """What was found, and what to do."""
    count, dtype = executor.arch.num_layers, str(executor.dtype).removeprefix("torch.")
    remedy = "the weights there hold NaN or infinity, or lead to numbers that float32 cannot hold"
    if executor.dtype != torch.float32:
        most = "65504" if executor.dtype == torch.float16 else "3.4e38"
        remedy = f"the weights there hold NaN or infinity, or their products exceed the {most} of {dtype}: "
        remedy += f"try --dtype {wider(executor.dtype)}"
    if executor.stages is not None:
        return (
            "a run without --pipeline-parallel-size tells which layer it is. Weights hold NaN or infinity, or "
            f"{dtype} overflows"
        )
    if layer is None:
        return f"no cache pages were free to find the layer. Weights hold NaN or infinity, or {dtype} overflows"
    if layer == EMBEDDING:
        return f"the embedding of its tokens is not finite already, before layer 0: {remedy}"
    if layer == count:
        where = "the final norm or the output head"
        return f"hidden states are finite after each of the {count} layers, so it is {where}: {remedy}"
    return f"hidden states stop being finite in layer {layer} (the first is 0, the last {count - 1}): {remedy}"


def wider(dtype: torch.dtype) -> str:
    return "bfloat16 or float32" if dtype == torch.float16 else "float32"


def opened(sequences: list[Sequence], scheduler: Scheduler) -> list[Reread]:
    """Readings of as many sequences as have pages in the cache together, in a micro-batch."""
    cache, readings, staged = scheduler.cache, [], 0
    for sequence in sequences[: scheduler.policy.gpu_batch_size]:
        token_ids = sequence.token_ids[: len(sequence.token_ids) - sequence.num_uncomputed]
        tier, pages = sequence.pages.tier, cache.layout.num_pages(len(token_ids))
        staged += pages if tier != "gpu" else 0
        if staged > cache.sizes.staging_pages or not cache.can_open(tier, len(token_ids)):
            break
        readings.append(Reread(sequence, cache.open(tier, len(token_ids)), token_ids))
    return readings


def read(readings: list[Reread], scheduler: Scheduler, executor: Executor) -> None:
    """Read their tokens from the first on, a chunk of each in a pass, until the layer of every one is known or its text
    at its end."""
    by_id = dict(enumerate(readings))

    def watch(layer: int, inputs: MicroBatchInputs, hidden: Tensor) -> None:
        finite = hidden.isfinite().all(-1).tolist()
        for query, rows in rows_of(inputs):
            reading = by_id[query.sequence_id]
            if not all(finite[rows]) and (reading.layer is None or layer < reading.layer):
                reading.layer = layer

    chunk = max(
        1,
        min(
            scheduler.policy.prefill_chunk,
            scheduler.prefill_budget // len(readings),
            scheduler.micro_batch_tokens // len(readings),
        ),
    )
    while unfinished := {
        i: item for i, item in by_id.items() if item.layer is None and item.table.num_tokens < len(item.token_ids)
    }:
        queries = []
        for i, item in unfinished.items():
            start = item.table.num_tokens
            tokens = tuple(item.token_ids[start : start + chunk])
            scheduler.cache.hold(item.table, start + len(tokens))
            location, adapter = item.table.location, item.failed.request.adapter
            queries.append(QueryTokens(i, tokens, start, len(tokens), location, len(item.token_ids), adapter=adapter))
        for _ in executor.run(PassBatch((tuple(queries),)), watch=watch):
            pass
        for query in queries:
            scheduler.cache.commit(by_id[query.sequence_id].table, query.start + query.num_tokens)


def rows_of(inputs: MicroBatchInputs) -> Iterator[tuple[QueryTokens, slice]]:
    """The rows of every query in a micro-batch's hidden states."""
    start = 0
    for query in inputs.queries:
        yield query, slice(start, start + query.num_tokens)
        start += query.num_tokens
