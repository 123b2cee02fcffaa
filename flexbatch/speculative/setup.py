"""From settings to a speculator: what the drafts are and need, before anything is loaded; then loading them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexbatch.config import NGRAM, EngineConfig
from flexbatch.memory.loading import Loader
from flexbatch.memory.pages import CacheLayout
from flexbatch.memory.rotary import table_bytes
from flexbatch.memory.tiers import MemoryRequirement, Pool, Tiers
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weight_plan import WeightPlan, plan_weights
from flexbatch.memory.weights import WeightStore
from flexbatch.models.arch import Arch
from flexbatch.models.opened import OpenModel, open_model
from flexbatch.policy.limits import INPUT_BUFFER_BYTES
from flexbatch.policy.policy import Split
from flexbatch.speculative.draft import (
    DRAFT_LOGITS_CHUNK_BYTES,
    PASS_TOKENS,
    SCORED_ELEMENTS,
    SCORING_BYTES_PER_LOGIT,
    DraftModel,
)
from flexbatch.speculative.sources import LookupSource, Source
from flexbatch.speculative.speculator import AUTO_NODES, Speculator, fixed_plan
from flexbatch.speculative.tree import Drawing
from flexbatch.speculative.tree_spec import TreeSpec, parse_tree
from flexbatch.validation.errors import ConfigurationError

AUTO_MICRO_BATCH_TOKENS = 2048
"""Query tokens of a micro-batch that an automatic tree may fill: intermediate results of every one take memory on the
GPU."""
DEFAULT_MICRO_BATCH = 64


@dataclass(frozen=True)
class DraftPlan:
    """One draft model, with its weights and cache, all on the gpu tier."""

    model: OpenModel
    weights: WeightPlan
    layout: CacheLayout

    @property
    def arch(self) -> Arch:
        return self.model.arch

    @property
    def workspace_bytes(self) -> int:
        """Intermediate results of one draft pass, and one block of its logits with what scoring makes of them."""
        layers = PASS_TOKENS * self.arch.workspace_elements * self.layout.dtype.itemsize
        return layers + DRAFT_LOGITS_CHUNK_BYTES + SCORING_BYTES_PER_LOGIT * SCORED_ELEMENTS

    def pages(self, tokens: Iterable[int], grown_nodes: int) -> int:
        """For sequences of so many tokens each, and their largest tree; the newest token of a sequence is read too."""
        return sum(self.layout.num_pages(count + 1 + grown_nodes) for count in tokens)


@dataclass(frozen=True)
class Speculation:
    """What ``--draft`` and ``--tree`` ask for."""

    spec: TreeSpec
    max_nodes: int
    drafts: tuple[DraftPlan, ...]
    lookup: bool
    simulate: float | None
    drawing: Drawing
    seed: int
    target: Arch = field(repr=False)

    @property
    def grown_nodes(self) -> int:
        """Nodes that a draft reads for one tree: of a best-first tree also the candidates that are not kept."""
        return fixed_plan(self.spec).grown_nodes if self.spec.kind == "best-first" else self.max_nodes

    def requirements(self, longest: Sequence[int], cuda: bool) -> list[MemoryRequirement]:
        """Rows of the memory table. longest: tokens of the longest requests, one per sequence of the block."""
        rows = []
        for draft in self.drafts:
            rows.append(
                MemoryRequirement(f"draft weights {draft.model.name}"[:28], "gpu", draft.weights.tier_bytes("gpu"))
            )
            pages = draft.pages(longest, self.grown_nodes)
            rows.append(
                MemoryRequirement(
                    f"draft cache {draft.model.name}"[:28],
                    "gpu",
                    pages * draft.layout.page_bytes * draft.arch.num_layers,
                )
            )
            rows.append(
                MemoryRequirement(
                    f"draft rotary tables {draft.model.name}"[:28],
                    "gpu",
                    table_bytes(draft.arch, self.positions(longest), draft.layout.dtype),
                )
            )
            rows.append(MemoryRequirement(f"draft workspace {draft.model.name}"[:28], "gpu", draft.workspace_bytes))
            if cuda:
                rows.append(MemoryRequirement(f"draft inputs {draft.model.name}"[:28], "cpu", 2 * INPUT_BUFFER_BYTES))
        if self.drawing is not Drawing.DETERMINISTIC:
            # What the children of every inner node were drawn from, float32 until the trees are verified, and the noise
            # of all children of one node.
            num_bytes = 4 * len(longest) * self.max_nodes + 28 * self.max_nodes + 40
            rows.append(MemoryRequirement("draft distributions", "gpu", self.target.vocab_size * num_bytes))
        return rows

    def positions(self, longest: Sequence[int]) -> int:
        """That a draft reads of the longest sequence and a tree below its end."""
        return max(longest, default=1) + 1 + self.grown_nodes

    def load(self, queues: TransferQueues, dtype: torch.dtype, offload_dir: Path) -> Speculator:
        """Draft weights to the compute device."""
        sources: list[Source] = []
        with contextlib.ExitStack() as stack:
            for draft in self.drafts:
                sources.append(load_draft(draft, self, queues, dtype, offload_dir))
                stack.callback(sources[-1].close)
            if self.lookup:
                sources.append(LookupSource())
            speculator = Speculator(sources, self.spec, max_nodes=self.max_nodes, simulate=self.simulate)
            stack.pop_all()
        return speculator

    def open_runner(self, speculator: Speculator, longest: Sequence[int]) -> None:
        """Size the drafts' caches; see `requirements`."""
        models = [source for source in speculator.sources if isinstance(source, DraftModel)]
        for draft, model in zip(self.drafts, models, strict=True):
            model.open_runner(draft.pages(longest, self.grown_nodes), self.positions(longest))


def plan_speculation(config: EngineConfig, target: Arch, tokenizer: Any, layout: CacheLayout) -> Speculation | None:
    """Read the drafts' configurations and tokenizers; None when no draft is asked for. layout: of the target's cache.

    Raises ConfigurationError for settings that contradict each other and for a draft whose tokenizer is not the
    target's.
    """
    if not config.draft:
        for name in ("tree", "simulate_acceptance"):
            if getattr(config, name) is not None:
                raise ConfigurationError(
                    f"{name}={getattr(config, name)} needs a draft; give --draft MODEL, or --draft {NGRAM}"
                )
        if config.compare_plain:
            raise ConfigurationError(
                f"compare_plain compares speculation with plain decoding; give --draft MODEL, or --draft {NGRAM}"
            )
        return None
    spec = parse_tree(config.tree or "auto")
    most = AUTO_MICRO_BATCH_TOKENS // (config.gpu_batch_size or DEFAULT_MICRO_BATCH) - 1
    nodes = spec.nodes if spec.kind != "auto" else max(2, min(AUTO_NODES, most))
    names = [name for name in config.draft if name != NGRAM]
    drawing = {"independent": Drawing.INDEPENDENT, "without-replacement": Drawing.WITHOUT_REPLACEMENT}.get(
        config.draft_sampling, Drawing.DETERMINISTIC
    )
    if drawing is not Drawing.DETERMINISTIC and (len(config.draft) != 1 or not names or spec.kind == "best-first"):
        raise ConfigurationError(
            f"draft_sampling={config.draft_sampling} verifies one draft model with a tree of fixed shape (chain, "
            "widths or auto), "
            f"not draft={' '.join(config.draft)} tree={config.tree}; use draft_sampling=matched"
        )
    drafts = tuple(plan_draft(name, config, target, tokenizer, layout) for name in names)
    return Speculation(
        spec, nodes, drafts, NGRAM in config.draft, config.simulate_acceptance, drawing, config.seed, target
    )


def plan_draft(name: str, config: EngineConfig, target: Arch, tokenizer: Any, target_layout: CacheLayout) -> DraftPlan:
    """One draft model. Raises ConfigurationError when it does not fit the target."""
    model = open_model(name, config.dummy_weights)
    arch = model.arch
    if model.folder is not None:
        check_tokenizers(name, model.tokenizer, config.model, tokenizer)
    elif arch.vocab_size != target.vocab_size:
        raise ConfigurationError(
            f"draft {name} has {arch.vocab_size} tokens and {config.model} has {target.vocab_size}: without "
            "tokenizers the vocabularies must be of one size"
        )
    layout = CacheLayout(
        arch.num_layers,
        arch.num_kv_heads,
        arch.head_dim,
        16,
        target_layout.group,
        target_layout.page_tokens,
        target_layout.dtype,
        arch.cache_sides,
    )
    weights = plan_weights(arch, Split(1, 0), 16, target_layout.group, target_layout.dtype.itemsize)
    return DraftPlan(model, weights, layout)


def check_tokenizers(draft_name: str, draft: Any, target_name: str, target: Any) -> None:
    """Raises ConfigurationError that names the first token on which the two differ."""
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours == theirs:
        return
    token = min(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, 1 << 60), token),
    )
    here, there = (vocabulary.get(token, "unknown") for vocabulary in (theirs, ours))
    raise ConfigurationError(
        f"draft {draft_name} and {target_name} have different tokenizers ({len(theirs)} and {len(ours)} tokens; "
        f"{token!r} is {here} in the draft and "
        f"{there} in the target). Use a draft trained with the target's tokenizer, or --draft {NGRAM}"
    )


def load_draft(
    plan: DraftPlan, speculation: Speculation, queues: TransferQueues, dtype: torch.dtype, offload_dir: Path
) -> DraftModel:
    """Weights of one draft; its pools are its own, sized by the plan that the planner has checked."""
    unlimited = 1 << 62
    gpu, cpu = (
        Pool("gpu", unlimited, device=queues.device),
        Pool("cpu", unlimited, pinned=queues.device.type == "cuda"),
    )
    tiers = Tiers(gpu, cpu, Pool("disk", unlimited), offload_dir)
    vocab_size, nodes, drawing = speculation.target.vocab_size, speculation.grown_nodes, speculation.drawing
    with tiers.all_or_nothing(), contextlib.ExitStack() as stack:
        store = WeightStore(plan.weights, tiers, queues, dtype)
        stack.callback(store.close)
        with torch.inference_mode():
            Loader(store, None, cache_quantized=False).load(
                lambda skip: plan.model.pieces(skip, speculation.seed, dtype)
            )
        store.check()
        model = DraftModel(plan.model.name, plan.arch, store, tiers, queues, plan.layout, vocab_size, nodes, drawing)
        stack.pop_all()
    return model
