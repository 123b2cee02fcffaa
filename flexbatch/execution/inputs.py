"""The query tokens of a micro-batch as tensors: positions, page tables, slots, masks, grouped by where the cache is
attended."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from flexbatch.execution.pass_batch import DecodeTokens, LogitsChunk, QueryTokens
from flexbatch.memory.pages import Gather, SequencePages
from flexbatch.models.lora.applied import PassAdapters
from flexbatch.policy.limits import CPU_ATTENTION_MAX_TREE_TOKENS, DECODING_APART


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
    num_decoding: int = 0
    """Sequences of one token each that come first, where they came as arrays."""

    def of(self, tokens: Tensor, first: int = 0) -> Tensor:
        """The group's part of a tensor of tokens, which begins with the ``first`` of the micro-batch."""
        start, end = self.start - first, self.end - first
        return tokens if start == 0 and end == tokens.shape[0] else tokens[start:end]

    @cached_property
    def num_context_tokens(self) -> int:
        """Of all sequences. Waits for a device that has their lengths."""
        return int(self.context_lens.sum())

    @cached_property
    def halves(self) -> tuple[AttentionGroup, ...]:
        """What attention is launched for on a GPU instead: sequences that decode and prompts apart, where there are
        both. Tiles that are high enough for prompts leave one token most of the chip's registers, and its keys are read
        at a fraction of the memory's rate; quantized ones have kernels of their own.

        Empty where it is not divided: a group that held itself kept 1 MiB of the GPU's memory until the collector
        came, in every pass."""
        count, rest = self.num_decoding, len(self.context_lens) - self.num_decoding
        if count < DECODING_APART or not rest or self.tree_masks is not None:
            return ()
        decoding = replace(
            self,
            end=self.start + count,
            page_table=self.page_table[:count],
            query_starts=self.query_starts[: count + 1],
            context_lens=self.context_lens[:count],
            slots=self.slots[:count],
            max_query_len=1,
        )
        others = replace(
            self,
            start=self.start + count,
            page_table=self.page_table[count:],
            query_starts=self.query_starts[count:] - count,
            context_lens=self.context_lens[count:],
            slots=self.slots[count:],
            num_decoding=0,
        )
        return decoding, others


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
    """Those that are not in ``decoding``, whose tokens come first."""
    token_ids: Tensor
    host_token_ids: Tensor
    """[num_tokens] int64; embedding rows are gathered where the table lives, so both sides may need them."""
    positions: Tensor
    host_positions: Tensor
    gpu: AttentionGroup | None
    staged: StagedGroup | None
    cpu: AttentionGroup | None
    logit_rows: tuple[tuple[QueryTokens, int], ...]
    """(query, query token) of the logits that are behind those of ``decoding``."""
    logit_index: Tensor
    adapter_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    """[num_tokens] of the tokens' adapters, 0 for none."""
    adapters: PassAdapters | None = None
    head_adapters: tuple[PassAdapters | None, ...] = ()
    """Of every chunk of logits; empty where no adapter changes the head."""
    windows: CacheGroups | None = None
    """Of layers that keep only their window; None where these have the same pages as the others."""
    decoding: DecodeTokens | None = None

    def logits_chunk(self, start: int, logits: Tensor) -> LogitsChunk:
        """The logits from row ``start`` on, with whose they are."""
        end, first = start + len(logits), 0 if self.decoding is None else len(self.decoding)
        rows = self.logit_rows[max(0, start - first) : max(0, end - first)]
        return LogitsChunk(rows, logits, None if self.decoding is None else self.decoding.part(start, end))

    def drawn_chunk(self, token_ids: Tensor) -> LogitsChunk:
        """All rows, whose tokens [rows] are drawn; the next pass may overwrite these."""
        return LogitsChunk(self.logit_rows, token_ids.new_empty(0), self.decoding, token_ids.clone())

    def groups(self, windowed: bool) -> MicroBatchInputs | CacheGroups:
        """The groups of a layer. windowed: which keeps only its window."""
        return self.windows if windowed and self.windows is not None else self

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def decodes(self) -> bool:
        """Whether every sequence brings one token."""
        return self.num_tokens == len(self.queries) + (0 if self.decoding is None else len(self.decoding))


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
