"""Which kernels the passes of a plan launch on a GPU: the code of passes says so itself, over tensors of a GPU that is
imagined (`kernels.imagined_gpu`), with as many tokens, sequences and keys as make a difference to any launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flexbatch.execution.attention import CacheAttention
from flexbatch.execution.embedding import embed
from flexbatch.execution.inputs import AttentionGroup
from flexbatch.kernels import ops
from flexbatch.kernels.imagined_gpu import DEVICE
from flexbatch.memory.handles import READY
from flexbatch.memory.pages import CacheLayout
from flexbatch.memory.tiers import Pool
from flexbatch.memory.transfer import ROW_BYTES
from flexbatch.memory.weight_plan import PlacedTensor, WeightPlan
from flexbatch.memory.weights import WeightStore
from flexbatch.models import layers
from flexbatch.models.arch import Arch
from flexbatch.models.rope import RopeTables, num_tables
from flexbatch.policy.limits import EXPERT_TILES
from flexbatch.policy.policy import Policy, Split

TOKENS = (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 4096)
"""Of a micro-batch, on both sides of where products with codes change."""
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Of a micro-batch: with fewer, contexts are split into more parts, a power of two."""
ROWS = (1, 16, 17, 64, 65, 128, 129)
"""Query tokens of a sequence times the heads that share keys, on both sides of where attention changes."""
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384)
"""Keys, where a context is split into more parts, or tiles change."""
LOGIT_ROWS = 64
WORD_BYTES = 8
"""Of the experts that are fetched as they are hit."""
ENOUGH = 1 << 60


@dataclass(frozen=True)
class PassKinds:
    """What the kernels of passes depend on: of one process, and its part of a model. Plain data. Neither the sizes of a
    block nor the share of each tier, so that the next job finds them compiled."""

    plan: WeightPlan
    """See `resident`."""
    layout: CacheLayout
    dtype: torch.dtype
    max_nodes: int
    """Of a token tree; 0: nothing is drafted."""
    streams: bool
    """Whether some of the cache, or of what passes are given, is on other tiers."""
    cpu_experts: bool
    few_in_codes: bool
    host_tables: tuple[tuple[int, ...], ...] = ()
    """Shapes of embedding tables in host memory."""

    @property
    def contexts(self) -> list[int]:
        longest = min(self.plan.arch.max_positions, CONTEXTS[-1])
        return [*(keys for keys in CONTEXTS if keys < longest), longest]

    @property
    def tokens(self) -> list[int]:
        experts = self.plan.arch.experts
        apart = [] if experts is None else [size * experts.count // experts.top_k for size in EXPERT_TILES]
        return sorted({*TOKENS, *apart, *(count + 1 for count in apart)} - {0})


def kinds_of(plan: WeightPlan, layout: CacheLayout, dtype: torch.dtype, policy: Policy, max_nodes: int) -> PassKinds:
    """Of the passes of a policy."""
    streams = min(policy.cache.gpu, policy.activations.gpu) < 1
    tables = tuple(tuple(each.spec.shape) for each in plan.gathered if each.tier == "cpu")
    products = policy.cpu_experts > 0, policy.few_in_codes
    return PassKinds(resident(plan), layout, dtype, max_nodes, streams, *products, tables)


def resident(plan: WeightPlan) -> WeightPlan:
    """All of it on the GPU: kernels do not depend on where a tensor came from."""

    def moved(tensors: tuple[PlacedTensor, ...]) -> tuple[PlacedTensor, ...]:
        return tuple(replace(tensor, tier="gpu", offset=0) for tensor in tensors)

    layers = tuple(map(moved, plan.layers))
    return WeightPlan(plan.arch, Split(1, 0), layers, moved(plan.gathered), moved(plan.resident))


class OneRank:
    """In the place of the ranks that share a layer: what they sum up has the shape that it had."""

    def sum(self, x: Tensor) -> Tensor:
        return x if x.is_contiguous() else x.contiguous()


def launch_all(models: Sequence[PassKinds]) -> None:
    """Every kernel that passes of these models may launch. Within `imagined_gpu`."""
    for kinds in models:
        here: Any = SimpleNamespace(device=DEVICE)
        tiers: Any = SimpleNamespace(gpu=Pool("gpu", ENOUGH, device=DEVICE), cpu=Pool("cpu", 0))
        weights = WeightStore(kinds.plan, tiers, here, kinds.dtype)
        weights.few_in_codes = kinds.few_in_codes
        cache: Any = SimpleNamespace(layout=kinds.layout)
        nothing: Any = None
        attention = CacheAttention(kinds.plan.arch, cache, here, nothing, weights.tensors.embedding_weights)
        for layer in differing_layers(kinds.plan):
            launch_layer(kinds, weights, attention, layer)
        launch_ends(kinds, weights)
        launch_copies(kinds)


def differing_layers(plan: WeightPlan) -> list[int]:
    """A layer of each kind: by its tensors, its window and whether it rotates; and the last, after which the head
    follows."""
    arch, last = plan.arch, plan.arch.num_layers - 1
    kinds: dict[object, int] = {}
    for layer in range(arch.num_layers):
        tensors = tuple((each.spec.role, each.spec.shape, each.form) for each in plan.layers[layer])
        where = arch.window(layer), arch.rotates(layer), arch.uses_local_rope(layer), layer == last
        kinds.setdefault((tensors, where), layer)
    return list(kinds.values())


def launch_layer(kinds: PassKinds, weights: WeightStore, attention: CacheAttention, layer: int) -> None:
    arch, rope = kinds.plan.arch, tables_of(kinds.plan.arch, kinds.dtype)
    ranks: Any = OneRank() if arch.shard is not None else None
    for tokens in kinds.tokens:
        for pass_tokens in (tokens, TOKENS[-1]):  # few tokens of a large pass are multiplied with what is expanded
            weights.pass_tokens = pass_tokens
            hidden, update = (torch.empty(tokens, arch.hidden_size, dtype=kinds.dtype, device=DEVICE) for _ in range(2))
            positions = torch.empty(tokens, dtype=torch.int64, device=DEVICE)
            for given in (hidden, layers.Apart(hidden, update)):
                matrices = weights.weights(layer, "pre", tokens)
                projected = layers.pre_attention(arch, layer, matrices, given, positions, rope, None, ranks)
            query = projected[0]
            attended = query.new_empty(*query.shape[:-1], arch.value_dim)
            matrices, stacks = weights.weights(layer, "post", tokens), weights.experts(layer)
            for elsewhere in (None, left_out) if kinds.cpu_experts and stacks is not None else (None,):
                context = None, None, ranks, stacks, elsewhere, None, layer < arch.num_layers - 1
                layers.end_of(layers.post_attention(arch, layer, matrices, hidden, attended, *context))
            weights.release(layer, READY)
    launch_attention(kinds, attention, layer, *projected)


def left_out(x: Tensor, chosen: Tensor, scales: Tensor | None) -> Any:
    """Rows that the CPU computes, of experts that need not be told apart."""
    return SimpleNamespace(left_out=torch.empty(1, dtype=torch.bool, device=DEVICE), put_into=lambda out: None)


def tables_of(arch: Arch, dtype: torch.dtype) -> RopeTables | None:
    if not num_tables(arch):
        return None
    return RopeTables(*torch.empty(4, 256, arch.rotary_dim // 2, dtype=dtype, device=DEVICE))


def launch_attention(
    kinds: PassKinds, attention: CacheAttention, layer: int, query: Tensor, key: Tensor, value: Tensor
) -> None:
    layout = kinds.layout
    rows = layout.row_view(torch.empty(8 * layout.page_bytes, dtype=torch.uint8, device=DEVICE))
    attention.append(rows, torch.empty(len(key), dtype=torch.int64, device=DEVICE), key, value)
    out = query.new_empty(*query.shape[:-1], kinds.plan.arch.value_dim)
    for group in groups(kinds):
        few = slice(0, group.end)
        attention.attend_part(out[few], layer, query[few], rows, group, 0)


def groups(kinds: PassKinds) -> Iterator[AttentionGroup]:
    """Sequences that decode, prompts alike and unlike, both together, and token trees."""
    arch = kinds.plan.arch
    shared = arch.num_heads if arch.latent is not None else max(1, arch.num_heads // arch.num_kv_heads)
    lengths = {max(1, -(-rows // shared)) for rows in ROWS} | {rows // shared for rows in ROWS if rows >= shared}
    for sequences in SEQUENCES:
        tables = tables_for(sequences)
        for length in sorted(lengths):
            trees = kinds.max_nodes > 0 and length <= 1 + kinds.max_nodes
            for tokens in sorted({sequences * length, sequences - 1 + length}):
                if tokens > TOKENS[-1]:
                    continue
                masks = torch.empty(tokens, 2, dtype=torch.int32, device=DEVICE)
                for tree in (None, masks) if trees else (None,):
                    positions = None if tree is None else tree.flatten()[:tokens]
                    for keys in kinds.contexts:
                        yield AttentionGroup(0, tokens, *tables, tree, length, keys, positions)


def tables_for(sequences: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages, where the tokens of each begin, keys and slots."""
    sizes = (sequences, 2), (sequences + 1,), (sequences,)
    pages, starts, keys = (torch.empty(size, dtype=torch.int32, device=DEVICE) for size in sizes)
    return pages, starts, keys, torch.empty(1, dtype=torch.int64, device=DEVICE)


def launch_ends(kinds: PassKinds, weights: WeightStore) -> None:
    """The embedding and the head, where they are here."""
    arch, ids = kinds.plan.arch, torch.empty(2, dtype=torch.int64, device=DEVICE)
    inputs: Any = SimpleNamespace(token_ids=ids, host_token_ids=ids, positions=ids, host_positions=ids, adapters=None)
    if (-1, "embed.weight") in weights.views:
        embed(arch, weights.tensors, inputs, None)
    if len(kinds.plan.layers) == arch.num_layers or not kinds.plan.layers[arch.num_layers]:
        return
    matrices = weights.weights(arch.num_layers, "head", 1)
    for rows in (1, 16, 17, SEQUENCES[-1]):
        hidden = torch.empty(rows, arch.hidden_size, dtype=kinds.dtype, device=DEVICE)
        layers.head(arch, matrices, hidden[:LOGIT_ROWS])
        if arch.shard is None:
            layers.largest_logits(arch, matrices, hidden, LOGIT_ROWS * arch.vocab_size)


def launch_copies(kinds: PassKinds) -> None:
    """Between the tiers, past the copy engine: pages, new rows, and what a pass is sent."""
    arch, layout = kinds.plan.arch, kinds.layout
    ids, slots = (torch.empty(2, dtype=kind, device=DEVICE) for kind in (torch.int32, torch.int64))
    rows = [torch.empty(4, ROW_BYTES, dtype=torch.uint8, device=DEVICE)]
    if kinds.streams:
        pages = torch.empty(4, layout.page_bytes, dtype=torch.uint8, device=DEVICE)
        new = layout.row_view(pages.flatten())
        ops.scatter_rows(new.index_select(0, slots), new, slots)
        rows += [pages, torch.empty(4, arch.num_heads, arch.value_dim, dtype=kinds.dtype, device=DEVICE)]
    if arch.experts is not None:
        memory = torch.empty(64, dtype=torch.uint8, device=DEVICE)
        parts = torch.empty(4, 3, dtype=torch.int64, device=DEVICE)
        ops.copy_parts(memory, memory, parts, torch.empty(4, dtype=torch.bool, device=DEVICE), WORD_BYTES)
    if kinds.cpu_experts:
        rows.append(torch.empty(4, arch.hidden_size, dtype=kinds.dtype, device=DEVICE))
    for each in rows:
        ops.gather_pages(each, ids, torch.empty_like(each))
    for shape in kinds.host_tables:
        table = torch.empty(shape, dtype=kinds.dtype, device=DEVICE)
        if shape[1] * table.element_size() % ROW_BYTES == 0:
            ops.gather_pages(table.view(torch.uint8), ids, torch.empty_like(table).view(torch.uint8))
