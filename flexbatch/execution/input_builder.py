"""From the query tokens of a micro-batch to tensors on the compute device."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from flexbatch.execution.adapter_groups import group_tokens
from flexbatch.execution.inputs import (
    AttentionGroup,
    CacheGroups,
    MicroBatchInputs,
    StagedGroup,
    ancestor_masks,
    attention_memory,
)
from flexbatch.execution.pass_batch import UNREAD, DecodeTokens, NewestTokens, QueryTokens, parts_of
from flexbatch.memory.pages import Gather, SequencePages
from flexbatch.memory.uploads import Uploads
from flexbatch.models.lora.applied import AdapterTables, PassAdapters


class InputBuilder:
    """Builds the inputs of a pass on one compute device. logit_rows: of a chunk of logits."""

    def __init__(
        self, page_tokens: int, uploads: Uploads, adapters: AdapterTables | None = None, logit_rows: int = 1
    ) -> None:
        self.page_tokens, self.uploads, self.device = page_tokens, uploads, uploads.device
        self.adapters, self.logit_rows = adapters, logit_rows

    def build(self, queries: Many[QueryTokens], newest: NewestTokens | None = None) -> MicroBatchInputs:
        """newest: what the pass before drew, where queries have tokens that are `UNREAD`."""
        decoding, others = parts_of(queries)
        # Groups are consecutive: resident sequences, those that decode first, staged ones (cpu before disk), then those
        # attended on the CPU.
        groups: dict[str, list[QueryTokens]] = {"gpu": [], "staged": [], "cpu": []}
        for query in others:
            groups[attention_memory(query)].append(query)
        groups["staged"].sort(key=lambda query: query.pages.tier == "disk")
        ordered = [query for group in groups.values() for query in group]
        # Flat, not array by array: of 512 decode tokens each array of one takes longer to make than to fill.
        token_ids = np.fromiter(chain.from_iterable([query.token_ids for query in ordered]), dtype=np.int64)
        lengths = np.array([len(query.token_ids) for query in ordered], dtype=np.int64)
        positions = positions_of(ordered, lengths)
        adapter_ids = np.repeat(np.array([query.adapter for query in ordered], dtype=np.int32), lengths)
        rows = tuple([(query, i) for query in ordered for i in range(query.first_logit, len(query.token_ids))])
        firsts = np.array([query.first_logit for query in ordered], dtype=np.int64)
        index = np.flatnonzero(np.arange(len(token_ids)) >= np.repeat(np.cumsum(lengths) - lengths + firsts, lengths))
        if decoding is not None:
            token_ids = np.concatenate([decoding.token_ids, token_ids])
            positions = np.concatenate([decoding.starts.astype(np.int64), positions])
            adapter_ids = np.concatenate([decoding.adapters, adapter_ids])
            index = np.concatenate([np.arange(len(decoding)), index + len(decoding)])
        whole = self.cache_groups(groups, windowed=False, decoding=decoding)
        kept = any(query.pages.windows is not None for query in ordered)
        inputs = MicroBatchInputs(
            queries=tuple(ordered),
            token_ids=self.upload(token_ids),
            host_token_ids=torch.from_numpy(token_ids),
            positions=self.upload(positions),
            host_positions=torch.from_numpy(positions),
            gpu=whole.gpu,
            staged=whole.staged,
            cpu=whole.cpu,
            windows=self.cache_groups(groups, windowed=True) if kept else None,
            logit_rows=rows,
            logit_index=self.upload(index),
            adapter_ids=adapter_ids,
            adapters=self.group_adapters(adapter_ids),
            head_adapters=self.head_adapters(adapter_ids[index]),
            decoding=decoding,
        )
        self.fill_in_newest(inputs, newest)
        return inputs

    def group_adapters(self, adapter_ids: np.ndarray) -> PassAdapters | None:
        """None where no token has an adapter."""
        if self.adapters is None or not adapter_ids.any():
            return None
        order, tiles = group_tokens(adapter_ids)
        numbers = adapter_ids.astype(np.int64)
        return PassAdapters(self.adapters, self.upload(order), self.upload(tiles), self.upload(numbers))

    def adapters_at_once(self, adapter_ids: np.ndarray) -> PassAdapters | None:
        """The same of a graph, whose tokens are more than those of the pass: on their way when this returns."""
        groups = self.group_adapters(adapter_ids)
        self.uploads.flush()
        return groups

    def head_adapters(self, adapter_ids: np.ndarray) -> tuple[PassAdapters | None, ...]:
        if self.adapters is None or not self.adapters.in_head:
            return ()
        starts = range(0, len(adapter_ids), self.logit_rows)
        return tuple(self.group_adapters(adapter_ids[start : start + self.logit_rows]) for start in starts)

    def fill_in_newest(self, inputs: MicroBatchInputs, newest: NewestTokens | None) -> None:
        """Send what is to be sent, and fill in the tokens that the host does not know; on the CPU they are then in its
        array, too. Where none could be drawn the sequence has ended, and any token will do."""
        unread = np.flatnonzero(inputs.host_token_ids.numpy() == UNREAD)
        if not len(unread):
            self.uploads.flush()
            return
        assert newest is not None, "tokens of a pass that nobody ran"
        ids = [query.sequence_id for query in inputs.queries if query.token_ids[-1] == UNREAD]
        if (decoding := inputs.decoding) is not None:
            ids = decoding.sequence_ids[decoding.token_ids == UNREAD].tolist() + ids
        rows = self.upload(np.array([newest.rows[id] for id in ids], dtype=np.int64))
        where = self.upload(unread)
        self.uploads.flush()
        drawn = newest.token_ids.index_select(0, rows)
        inputs.token_ids.index_copy_(0, where, drawn.clamp_(min=0))

    def upload(self, array: np.ndarray, device: torch.device | None = None) -> Tensor:
        return torch.from_numpy(array) if device is not None and device.type == "cpu" else self.uploads.send(array)

    def cache_groups(
        self, groups: Mapping[str, list[QueryTokens]], windowed: bool, decoding: DecodeTokens | None = None
    ) -> CacheGroups:
        """windowed: of layers that keep only their window. decoding: the first of those on the gpu tier."""
        gpu, staged, cpu = groups["gpu"], groups["staged"], groups["cpu"]
        staged_start = sum(query.num_tokens for query in gpu) + (0 if decoding is None else len(decoding))
        cpu_start = staged_start + sum(query.num_tokens for query in staged)
        host = torch.device("cpu")
        return CacheGroups(
            gpu=self.pool_group(gpu, 0, self.device, windowed, decoding) if gpu or decoding is not None else None,
            staged=self.staged_group(staged, staged_start, windowed) if staged else None,
            cpu=self.pool_group(cpu, cpu_start, host, windowed) if cpu else None,
        )

    def pool_group(
        self,
        queries: list[QueryTokens],
        start: int,
        device: torch.device,
        windowed: bool,
        decoding: DecodeTokens | None = None,
    ) -> AttentionGroup:
        """Sequences attended in their own pool."""
        located = [query.pages.of(windowed) for query in queries]
        return self.group(queries, [pages.page_ids for pages in located], located, start, device, decoding)

    def group(
        self,
        queries: list[QueryTokens],
        tables: list[np.ndarray],
        located: list[SequencePages],
        start: int,
        device: torch.device,
        decoding: DecodeTokens | None = None,
    ) -> AttentionGroup:
        """Of sequences whose pages are ``tables``, the first of them those of ``located``: attention counts positions
        from there. decoding: of sequences before these."""
        count = 0 if decoding is None else len(decoding)
        lengths = np.array([1] * count + [len(query.token_ids) for query in queries], dtype=np.int32)
        passed = self.page_tokens * np.array([0] * count + [pages.first for pages in located], dtype=np.int32)
        before = np.array([query.start for query in queries], dtype=np.int32) - passed[count:]
        if decoding is not None:
            before = np.concatenate([decoding.starts, before])
        contexts = before + lengths
        used = -(-contexts // self.page_tokens)
        table = np.zeros((len(lengths), used.max()), dtype=np.int32)
        if decoding is not None:
            width = min(table.shape[1], decoding.page_table.shape[1])
            table[:count, :width] = decoding.page_table[:, :width]
        if queries:
            table[count:][np.arange(table.shape[1]) < used[count:, None]] = np.concatenate(
                [pages[:most] for pages, most in zip(tables, used[count:].tolist(), strict=True)]
            )
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        where = np.arange(starts[-1]) + (before - starts[:-1])[owner]
        slots = table[owner, where // self.page_tokens].astype(np.int64) * self.page_tokens + where % self.page_tokens
        masks = self.masks(queries, device)
        in_pages = None if masks is None else positions_of(queries, lengths).astype(np.int32) - passed[owner]
        return AttentionGroup(
            start=start,
            end=start + int(starts[-1]),
            page_table=self.upload(table, device),
            query_starts=self.upload(starts, device),
            context_lens=self.upload(contexts, device),
            slots=self.upload(slots, device),
            tree_masks=masks,
            max_query_len=int(lengths.max()),
            max_context_len=int(contexts.max()),
            positions=None if in_pages is None else self.upload(in_pages, device),
            num_decoding=count,
        )

    def masks(self, queries: list[QueryTokens], device: torch.device) -> Tensor | None:
        if all(query.parents is None for query in queries):
            return None
        masks = [ancestor_masks(query.parents or range(-1, query.num_tokens - 1)) for query in queries]
        words = max(mask.shape[1] for mask in masks)
        return self.upload(
            np.concatenate([np.pad(mask, ((0, 0), (0, words - mask.shape[1]))) for mask in masks]), device
        )

    def staged_group(self, queries: list[QueryTokens], start: int, windowed: bool = False) -> StagedGroup:
        """Staging holds the existing pages first, one sequence after another, then the pages that only this pass's
        tokens fill."""
        page_tokens = self.page_tokens
        located = [query.pages.of(windowed) for query in queries]
        pairs = list(zip(queries, located, strict=True))
        existing = [-(-query.start // page_tokens) - pages.first for query, pages in pairs]
        total = [-(-(query.start + query.num_tokens) // page_tokens) - pages.first for query, pages in pairs]
        starts = np.concatenate([[0], np.cumsum(existing)])
        cursor, tables = int(starts[-1]), []
        for first, old, count in zip(starts.tolist(), existing, total, strict=False):
            there, new = np.arange(first, first + old, dtype=np.int32), count - old
            added = np.arange(cursor, cursor + new, dtype=np.int32)
            tables.append(np.concatenate([there, added]) if new else there)
            cursor += new
        on_cpu = [(query, pages) for query, pages in pairs if pages.tier == "cpu"]
        on_disk = pairs[len(on_cpu) :]
        cpu_pages = [pages.page_ids[:old] for (_, pages), old in zip(on_cpu, existing, strict=False)]
        cpu_slots = [pages.slots(query.start, query.start + query.num_tokens, page_tokens) for query, pages in on_cpu]
        gather = Gather(
            cpu_pages=self.upload(np.concatenate([np.zeros(0, dtype=np.int32), *cpu_pages])),
            disk_pages=tuple((pages, query.start) for query, pages in on_disk),
            num_disk_pages=sum(existing[len(on_cpu) :]),
        )
        return StagedGroup(
            attention=self.group(queries, tables, located, start, self.device),
            gather=gather,
            num_cpu_tokens=sum(len(slots) for slots in cpu_slots),
            cpu_slots=self.upload(np.asarray([slot for slots in cpu_slots for slot in slots], dtype=np.int64)),
            disk_pages=tuple((pages, query.start, query.num_tokens, query.num_tentative) for query, pages in on_disk),
            num_pages=cursor,
        )


def positions_of(queries: list[QueryTokens], lengths: np.ndarray) -> np.ndarray:
    """Of all query tokens, so many of each: [num_tokens] int64."""
    starts, ends = np.array([query.start for query in queries], dtype=np.int64), np.cumsum(lengths)
    positions = np.arange(lengths.sum()) + np.repeat(starts - ends + lengths, lengths)
    for i in [i for i, query in enumerate(queries) if query.parents is not None]:
        positions[ends[i] - lengths[i] : ends[i]] = queries[i].positions
    return positions
