"""The query tokens of a micro-batch as tensors: positions, page tables, slots, masks, grouped by where the cache is
attended."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from flexbatch.execution.adapter_groups import group_tokens
from flexbatch.execution.pass_batch import UNREAD, NewestTokens, QueryTokens
from flexbatch.memory.pages import Gather, SequencePages
from flexbatch.memory.uploads import Uploads
from flexbatch.models.lora.applied import AdapterTables, PassAdapters
from flexbatch.policy.limits import CPU_ATTENTION_MAX_TREE_TOKENS


@dataclass(frozen=True)
class AttentionGroup:
    """Consecutive query tokens whose cache is attended from the same memory: arguments of `ops.paged_attention`."""

    start: int
    end: int
    page_table: Tensor
    query_starts: Tensor
    context_lens: Tensor
    slots: Tensor
    """[num_tokens] int64: where the new token rows go (pool slots, or staging slots for the staged group)."""
    tree_masks: Tensor | None
    max_query_len: int
    max_context_len: int
    positions: Tensor | None = None
    """With ``tree_masks``: [num_tokens] int32, the places of query tokens in their sequences, counted from the first
    token of their pages."""


@dataclass(frozen=True)
class StagedGroup:
    """A group in staging, with what to copy there and where the new rows are stored."""

    attention: AttentionGroup
    gather: Gather
    num_cpu_tokens: int
    """The group's tokens of cpu sequences come first, then those of disk sequences."""
    cpu_slots: Tensor
    disk_pages: tuple[tuple[SequencePages, int, int, int], ...]
    num_pages: int


@dataclass(frozen=True)
class CacheGroups:
    """The groups of a micro-batch, as the pages of some of the layers have them."""

    gpu: AttentionGroup | None
    staged: StagedGroup | None
    cpu: AttentionGroup | None


@dataclass(frozen=True)
class MicroBatchInputs:
    """Everything the ticks of one micro-batch need, built once per pass."""

    queries: tuple[QueryTokens, ...]
    token_ids: Tensor
    host_token_ids: Tensor
    """[num_tokens] int64; embedding rows are gathered where the table lives, so both sides may need them."""
    positions: Tensor
    host_positions: Tensor
    gpu: AttentionGroup | None
    staged: StagedGroup | None
    cpu: AttentionGroup | None
    logit_rows: tuple[tuple[QueryTokens, int], ...]
    logit_index: Tensor
    adapter_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    """[num_tokens] of the tokens' adapters, 0 for none."""
    adapters: PassAdapters | None = None
    head_adapters: tuple[PassAdapters | None, ...] = ()
    """Of every chunk of logits; empty where no adapter changes the head."""
    windows: CacheGroups | None = None
    """Of layers that keep only their window; None where these have the same pages as the others."""

    def groups(self, windowed: bool) -> MicroBatchInputs | CacheGroups:
        """The groups of a layer. windowed: which keeps only its window."""
        return self.windows if windowed and self.windows is not None else self

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def attention_memory(query: QueryTokens) -> str:
    """Where the cache of a query is attended: "gpu", "staged" or "cpu"."""
    pages = query.pages
    if pages.tier == "gpu":
        return "gpu"
    most = 1 if query.parents is None else CPU_ATTENTION_MAX_TREE_TOKENS
    return "cpu" if pages.cpu_attention and query.num_tokens <= most else "staged"


def ancestor_masks(parents: Many[int]) -> np.ndarray:
    """Bit masks [n, ceil(n / 32)] int32: bit b of word w is set when token i continues token 32 * w + b (itself
    included)."""
    count = len(parents)
    masks = np.zeros((count, -(-count // 32)), dtype=np.uint32)
    for i, parent in enumerate(parents):
        if parent >= 0:
            masks[i] = masks[parent]
        masks[i, i // 32] |= np.uint32(1 << (i % 32))
    return masks.view(np.int32)


class InputBuilder:
    """Builds the inputs of a pass on one compute device. logit_rows: of a chunk of logits."""

    def __init__(
        self, page_tokens: int, uploads: Uploads, adapters: AdapterTables | None = None, logit_rows: int = 1
    ) -> None:
        self.page_tokens, self.uploads, self.device = page_tokens, uploads, uploads.device
        self.adapters, self.logit_rows = adapters, logit_rows

    def build(self, queries: Many[QueryTokens], newest: NewestTokens | None = None) -> MicroBatchInputs:
        """newest: what the pass before drew, where queries have tokens that are `UNREAD`."""
        # Groups are consecutive: resident sequences, staged ones (cpu before disk), then those attended on the CPU.
        groups: dict[str, list[QueryTokens]] = {"gpu": [], "staged": [], "cpu": []}
        for query in queries:
            groups[attention_memory(query)].append(query)
        groups["staged"].sort(key=lambda query: query.pages.tier == "disk")
        ordered = [query for group in groups.values() for query in group]
        # Flat, not array by array: of 512 decode tokens each array of one takes longer to make than to fill.
        token_ids = np.fromiter(chain.from_iterable(query.token_ids for query in ordered), dtype=np.int64)
        positions = np.fromiter(chain.from_iterable(query.positions for query in ordered), dtype=np.int64)
        whole = self.cache_groups(groups, windowed=False)
        kept = any(query.pages.windows is not None for query in queries)
        rows: list[tuple[QueryTokens, int]] = []
        index: list[int] = []
        first = 0
        for query in ordered:
            rows += [(query, i) for i in range(query.first_logit, query.num_tokens)]
            index += range(first + query.first_logit, first + query.num_tokens)
            first += query.num_tokens
        adapter_ids = np.repeat(
            np.array([query.adapter for query in ordered], dtype=np.int32), [query.num_tokens for query in ordered]
        )
        return MicroBatchInputs(
            queries=tuple(ordered),
            token_ids=self.with_newest(self.upload(token_ids), token_ids, ordered, newest),
            host_token_ids=torch.from_numpy(token_ids),
            positions=self.upload(positions),
            host_positions=torch.from_numpy(positions),
            gpu=whole.gpu,
            staged=whole.staged,
            cpu=whole.cpu,
            windows=self.cache_groups(groups, windowed=True) if kept else None,
            logit_rows=tuple(rows),
            logit_index=self.upload(np.asarray(index, dtype=np.int64)),
            adapter_ids=adapter_ids,
            adapters=self.group_adapters(adapter_ids),
            head_adapters=self.head_adapters(adapter_ids[index]),
        )

    def group_adapters(self, adapter_ids: np.ndarray) -> PassAdapters | None:
        """None where no token has an adapter."""
        if self.adapters is None or not adapter_ids.any():
            return None
        order, tiles = group_tokens(adapter_ids)
        numbers = adapter_ids.astype(np.int64)
        return PassAdapters(self.adapters, self.upload(order), self.upload(tiles), self.upload(numbers))

    def head_adapters(self, adapter_ids: np.ndarray) -> tuple[PassAdapters | None, ...]:
        if self.adapters is None or not self.adapters.in_head:
            return ()
        starts = range(0, len(adapter_ids), self.logit_rows)
        return tuple(self.group_adapters(adapter_ids[start : start + self.logit_rows]) for start in starts)

    def with_newest(
        self, token_ids: Tensor, host: np.ndarray, queries: list[QueryTokens], newest: NewestTokens | None
    ) -> Tensor:
        """Fill in the tokens that the host does not know; on the CPU they are then in its array, too. Where none could
        be drawn the sequence has ended, and any token will do."""
        unread = np.flatnonzero(host == UNREAD)
        if not len(unread):
            return token_ids
        assert newest is not None, "tokens of a pass that nobody ran"
        rows = [newest.rows[query.sequence_id] for query in queries if query.token_ids[-1] == UNREAD]
        drawn = newest.token_ids.index_select(0, self.upload(np.asarray(rows, dtype=np.int64)))
        return token_ids.index_copy_(0, self.upload(unread), drawn.clamp_(min=0))

    def upload(self, array: np.ndarray, device: torch.device | None = None) -> Tensor:
        return torch.from_numpy(array) if device is not None and device.type == "cpu" else self.uploads.send(array)

    def cache_groups(self, groups: Mapping[str, list[QueryTokens]], windowed: bool) -> CacheGroups:
        """windowed: of layers that keep only their window."""
        gpu, staged, cpu = groups["gpu"], groups["staged"], groups["cpu"]
        staged_start = sum(query.num_tokens for query in gpu)
        cpu_start = staged_start + sum(query.num_tokens for query in staged)
        host = torch.device("cpu")
        return CacheGroups(
            gpu=self.pool_group(gpu, 0, self.device, windowed) if gpu else None,
            staged=self.staged_group(staged, staged_start, windowed) if staged else None,
            cpu=self.pool_group(cpu, cpu_start, host, windowed) if cpu else None,
        )

    def pool_group(
        self, queries: list[QueryTokens], start: int, device: torch.device, windowed: bool
    ) -> AttentionGroup:
        """Sequences attended in their own pool."""
        located = [query.pages.of(windowed) for query in queries]
        return self.group(queries, [pages.page_ids for pages in located], located, start, device)

    def group(
        self,
        queries: list[QueryTokens],
        tables: list[np.ndarray],
        located: list[SequencePages],
        start: int,
        device: torch.device,
    ) -> AttentionGroup:
        """Of sequences whose pages are ``tables``, the first of them those of ``located``: attention counts positions
        from there."""
        lengths = np.array([len(query.token_ids) for query in queries], dtype=np.int32)
        passed = self.page_tokens * np.array([pages.first for pages in located], dtype=np.int32)
        before = np.array([query.start for query in queries], dtype=np.int32) - passed
        contexts = before + lengths
        used = -(-contexts // self.page_tokens)
        table = np.zeros((len(queries), used.max()), dtype=np.int32)
        table[np.arange(table.shape[1]) < used[:, None]] = np.concatenate(
            [pages[:count] for pages, count in zip(tables, used.tolist(), strict=True)]
        )
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        owner = np.repeat(np.arange(len(queries)), lengths)
        where = np.arange(starts[-1]) + (before - starts[:-1])[owner]
        slots = table[owner, where // self.page_tokens].astype(np.int64) * self.page_tokens + where % self.page_tokens
        masks = self.masks(queries, device)
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
            positions=None if masks is None else self.upload(positions_of(queries) - passed[owner], device),
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
        for first, old, count in zip(starts, existing, total, strict=False):
            tables.append(
                np.concatenate([np.arange(first, first + old), np.arange(cursor, cursor + count - old)]).astype(
                    np.int32
                )
            )
            cursor += count - old
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


def positions_of(queries: list[QueryTokens]) -> np.ndarray:
    """Of all query tokens: [num_tokens] int32."""
    return np.fromiter(chain.from_iterable(query.positions for query in queries), dtype=np.int32)
