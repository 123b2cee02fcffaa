"""The package of models driven by the oracle of the kernels: no tiers, no scheduling, every weight in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from flexbatch.kernels import attention_reference, latent_reference, reference
from flexbatch.models import layers
from flexbatch.models.arch import Arch
from flexbatch.models.rope import RopeTables, fill_tables, num_tables
from flexbatch.models.specs import sink_role

PAGE_TOKENS = 8


def rope_tables(arch: Arch, dtype: torch.dtype = torch.float32, num_positions: int | None = None) -> RopeTables | None:
    """Tables for positions 0 .. num_positions - 1 (default: the model's context), None when the model does not
    rotate."""
    if arch.position != "rope":
        return None
    length = arch.max_positions if num_positions is None else num_positions
    return fill_tables(arch, torch.empty(num_tables(arch), length, arch.rotary_dim // 2, dtype=dtype))


class DenseModel:
    """Ragged chunks of several sequences through all layers, with a paged cache like the engine's."""

    def __init__(self, arch: Arch, stages: dict[int, dict[str, Tensor]], num_sequences: int, max_tokens: int) -> None:
        self.arch, self.stages = arch, stages
        pages = -(-max_tokens // PAGE_TOKENS)
        # Pages of the sequences interleave, so that a wrong page table shows.
        self.page_table = (
            torch.arange(pages * num_sequences, dtype=torch.int32).view(pages, num_sequences).t().contiguous()
        )
        shape = (pages * num_sequences * PAGE_TOKENS, arch.cache_sides, arch.num_kv_heads, arch.head_dim)
        self.caches = [torch.full(shape, float("nan")) for _ in range(arch.num_layers)]
        self.lengths = [0] * num_sequences
        self.rope = rope_tables(arch)
        slopes = arch.alibi_slopes()
        self.slopes = None if slopes is None else torch.tensor(slopes)
        head = dict(stages.get(arch.num_layers, {}))
        self.head = {"head.weight": stages[-1]["embed.weight"], **head} if arch.tie_word_embeddings else head

    def step(self, chunks: list[list[int]]) -> list[Tensor]:
        """Logits [tokens of the chunk, vocab] of every sequence; a chunk may be empty."""
        counts = [len(chunk) for chunk in chunks]
        tokens = torch.tensor([token for chunk in chunks for token in chunk])
        positions = torch.cat(
            [torch.arange(start, start + count) for start, count in zip(self.lengths, counts, strict=True)]
        )
        sequence = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(counts))
        slots = self.page_table[sequence, positions // PAGE_TOKENS].long() * PAGE_TOKENS + positions % PAGE_TOKENS
        self.lengths = [start + count for start, count in zip(self.lengths, counts, strict=True)]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        hidden = self._embed(tokens, positions)
        for layer in range(self.arch.num_layers):
            weights = self.stages[layer]
            query, key, value = layers.pre_attention(self.arch, layer, weights, hidden, positions, self.rope)
            arguments = query, self.caches[layer], self.page_table, starts, torch.tensor(self.lengths)
            if self.arch.latent is not None:
                latent_reference.append_latent_rows(self.caches[layer], slots, key)
                attention = latent_reference.latent_attention(
                    *arguments,
                    value_dim=self.arch.latent.rank,
                    page_tokens=PAGE_TOKENS,
                    scale=self.arch.attention_scale,
                )
                hidden = layers.end_of(layers.post_attention(self.arch, layer, weights, hidden, attention))
                continue
            reference.append_rows(self.caches[layer], slots, key, value)
            attention = attention_reference.paged_attention(
                *arguments,
                num_kv_heads=self.arch.num_kv_heads,
                page_tokens=PAGE_TOKENS,
                scale=self.arch.attention_scale,
                alibi_slopes=self.slopes,
                alibi_scale=self.arch.attention_scale if self.arch.scaled_alibi else 0.0,
                window=self.arch.window(layer),
                chunked=self.arch.chunked_window,
                soft_cap=self.arch.soft_cap,
                sinks=self.stages[-1][sink_role(layer)] if self.arch.sinks else None,
            )
            hidden = layers.end_of(layers.post_attention(self.arch, layer, weights, hidden, attention))
        return list(layers.head(self.arch, self.head, hidden).split(counts))

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        stage = self.stages[-1]
        rows = (
            stage["pos_embed.weight"][positions + self.arch.position_offset]
            if self.arch.position == "learned"
            else None
        )
        return layers.embed(self.arch, stage, stage["embed.weight"][tokens], rows)
