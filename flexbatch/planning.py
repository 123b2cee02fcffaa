"""From settings, model and machine to budgets and exact sizes, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from flexbatch.config import ConfigurationError, EngineConfig, parse_bytes
from flexbatch.execution.executor import LOGITS_BLOCK_BYTES
from flexbatch.execution.graphs import MAX_GRAPHS, MAX_SEQUENCES, bucket_of, graph_bytes
from flexbatch.execution.inputs import CPU_ATTENTION_MAX_TREE_TOKENS
from flexbatch.kernels.native_sizes import workspace_bytes
from flexbatch.memory.files import align
from flexbatch.memory.kvcache import CacheSizes
from flexbatch.memory.pages import CacheLayout
from flexbatch.memory.rotary import table_bytes
from flexbatch.memory.tiers import Need
from flexbatch.memory.uploads import HALF_BYTES
from flexbatch.memory.weight_plan import WeightPlan
from flexbatch.models.arch import Arch
from flexbatch.policy.groups import cache_group
from flexbatch.policy.memory import logits_bytes
from flexbatch.policy.types import TIERS, Hardware, Policy

PAGE_TOKENS = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_MICRO_BATCH_TOKENS = 8192
"""Prompt tokens of a micro-batch in a pass where the policy sets no budget: compute is efficient from 1,024 on, and its workspace grows with them."""
MIN_LOGIT_ROWS = 64
"""Rows of scored prompts that go through the head together, however small the micro-batch: fewer would read the head's weights too often."""


@dataclass(frozen=True)
class Job:
    """What the planner knows of a job: the token rows that every request may need, and its prompt's length."""

    cache_tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, int]], max_positions: int) -> Job:
        """Of requests by (prompt tokens, max_tokens). The context may end one earlier, and the last token that it generates needs no row."""
        pairs = [(prompt, prompt + max(0, min(max_tokens, max_positions - prompt) - 1)) for prompt, max_tokens in lengths] or [(1, 1)]
        return cls(tuple(cache for _, cache in pairs), tuple(prompt for prompt, _ in pairs))

    @classmethod
    def typical(cls, max_positions: int) -> Job:
        """Before any prompt is known: 256 requests of 512 prompt tokens and 128 generated ones, within the model's context."""
        prompt, total = min(512, max(1, max_positions - 1)), min(639, max_positions)
        return cls((total,) * 256, (prompt,) * 256)

    def first(self, count: int) -> Job:
        """The job of its first requests alone."""
        return Job(self.cache_tokens[:count], self.prompt_tokens[:count])

    def longest_first(self) -> Job:
        pairs = sorted(zip(self.cache_tokens, self.prompt_tokens, strict=True), reverse=True)
        return Job(tuple(cache for cache, _ in pairs), tuple(prompt for _, prompt in pairs))

    @property
    def num_requests(self) -> int:
        return len(self.cache_tokens)

    @property
    def longest(self) -> int:
        return max(self.cache_tokens)


def resolve_device(name: str) -> torch.device:
    """The compute device. Raises ConfigurationError when a GPU is asked for and none is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigurationError(f"device {name!r} was asked for, but torch {torch.__version__} finds no CUDA device; use --device cpu")
        device = torch.device("cuda", device.index or 0)
    return device


def resolve_dtype(name: str, arch: Arch, device: torch.device) -> torch.dtype:
    """The compute dtype: on the CPU float32 unless asked otherwise; on a GPU the checkpoint's 16-bit type, bfloat16 for float32 checkpoints."""
    if name != "auto":
        if name not in DTYPES:
            raise ConfigurationError(f"dtype {name!r} is not known; use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if arch.dtype == "float16" else torch.bfloat16


def host_memory_bytes() -> int:
    """Memory that can be had without swapping (MemAvailable)."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def resolve_budgets(config: EngineConfig, device: torch.device, machine: Hardware | None = None) -> dict[str, int]:
    """Bytes of every tier, of this machine or of a named one. Without a GPU, gpu and cpu tier are the same memory: half of what is available each."""
    given = {tier: parse_bytes(size) for tier, size in (("gpu", config.gpu_memory), ("cpu", config.cpu_memory)) if size is not None}
    if machine is not None:
        gpu, cpu = machine.gpu_memory_bytes - machine.gpu_reserved_bytes, machine.cpu_memory_bytes - machine.cpu_reserved_bytes
        return {"gpu": gpu, "cpu": cpu, "disk": machine.disk_bytes, **given}
    available = host_memory_bytes()
    if device.type == "cuda":
        gpu, cpu = int(torch.cuda.mem_get_info(device)[0] * 0.94), int(available * 0.9)
    else:
        gpu = cpu = int(available * 0.45)
    folder = offload_dir(config)
    while not folder.exists():
        folder = folder.parent
    space = os.statvfs(folder)
    return {
        "gpu": gpu,
        "cpu": cpu,
        "disk": space.f_bavail * space.f_frsize,
        **given,
    }


def default_offload_dir() -> Path:
    return Path(os.path.expanduser("~")) / ".cache" / "flexbatch" / "offload"


def offload_dir(config: EngineConfig) -> Path:
    """The folder of the disk tier, and of what is kept between starts: converted weights and digests."""
    return config.offload_path or default_offload_dir()


def cache_layout(arch: Arch, bits: int, dtype: torch.dtype) -> CacheLayout:
    return CacheLayout(arch.num_layers, arch.num_kv_heads, arch.head_dim, bits, cache_group(arch.head_dim), PAGE_TOKENS, dtype)


def micro_batch_tokens(policy: Policy, max_query_nodes: int = 0) -> int:
    """Query tokens of one micro-batch, at most: every sequence's decode token with its tree, and one prompt chunk at least."""
    prompts = policy.prompt_tokens_per_micro_batch if policy.prefill_budget else min(policy.prompt_tokens_per_micro_batch, MAX_MICRO_BATCH_TOKENS)
    return policy.gpu_batch_size * (1 + max_query_nodes) + max(policy.chunk, prompts)


def pass_workspace_bytes(arch: Arch, policy: Policy, dtype: torch.dtype, max_query_nodes: int = 0) -> int:
    """Intermediate results of one tick: hidden states, projections, MLP, and one block of logits with what sampling makes of them."""
    logits = logits_bytes(logits_block_bytes(arch, policy, max_query_nodes) // 4)
    return micro_batch_tokens(policy, max_query_nodes) * arch.workspace_elements * dtype.itemsize + int(logits)


def logits_block_bytes(arch: Arch, policy: Policy, max_query_nodes: int = 0) -> int:
    """float32 logits that exist at one time: of all decode tokens of a micro-batch, as far as they fit the largest block."""
    rows = max(MIN_LOGIT_ROWS, policy.gpu_batch_size * (1 + max_query_nodes))
    return min(LOGITS_BLOCK_BYTES, 4 * arch.vocab_size * rows)


@dataclass(frozen=True)
class BlockSizes:
    """Exact sizes of everything that a block needs beside the weights."""

    cache: CacheSizes
    max_micro_batch_tokens: int
    max_cpu_attention_tokens: int
    max_query_nodes: int = 0
    """Nodes of the largest token tree."""
    sequence_tokens: tuple[int, ...] = ()
    """Token rows of the longest requests, one per sequence of the block."""
    longest: int = 1
    """Positions that a sequence may reach."""
    attended_sequences: int = 0
    """Sequences of a micro-batch whose cache the CPU attends, at most."""


def block_sizes(policy: Policy, layout: CacheLayout, job: Job, max_query_nodes: int = 0) -> BlockSizes:
    """Pages for a full block of the job's longest requests on every tier's share (a tier may hold one sequence more than its share)."""
    block = min(policy.block_size, max(1, job.num_requests))
    sequence_tokens = tuple(sorted(job.cache_tokens, reverse=True)[:block])
    longest = [layout.num_pages(tokens + max_query_nodes) for tokens in sequence_tokens] or [1]
    pages = {}
    for tier, fraction in zip(TIERS, policy.cache.fractions, strict=True):
        count = min(block, int(block * fraction + 1 - 1e-9) + (1 if 0 < fraction < 1 else 0)) if fraction > 0 else 0
        pages[tier] = sum(longest[:count])
    # Sequences of a micro-batch that go through staging: all that are not on the gpu tier (a CPU-attended one while its prompt is read).
    per_micro_batch = min(policy.gpu_batch_size, block)
    off_gpu = min(per_micro_batch, -(-int(block * (1 - policy.cache.gpu) + 2) // max(1, min(policy.num_gpu_batches, block))) + 1) if policy.cache.gpu < 1 else 0
    on_disk = min(block, int(block * policy.cache.disk + 2)) if policy.cache.disk > 0 else 0
    cache = CacheSizes(
        gpu_pages=pages["gpu"],
        cpu_pages=pages["cpu"],
        disk_pages=pages["disk"],
        staging_pages=sum(longest[:off_gpu]),
        disk_sequences=on_disk,
        tail_tokens=2 * layout.page_tokens + max_query_nodes if on_disk else 0,
    )
    tokens = micro_batch_tokens(policy, max_query_nodes)
    attended = off_gpu if policy.cpu_attention > 0 else 0
    attended_tokens = attended * min(CPU_ATTENTION_MAX_TREE_TOKENS, max_query_nodes + 1)
    return BlockSizes(cache, tokens, attended_tokens, max_query_nodes, sequence_tokens, max(sequence_tokens, default=1), attended)


def attention_workspace_bytes(arch: Arch, policy: Policy, sizes: BlockSizes, threads: int, device: str) -> int:
    """What compiled attention takes beside its tensors: of the CPU's share (``device`` "cpu"), or of everything on a machine without a GPU ("gpu")."""
    nodes, keys = sizes.max_query_nodes, sizes.longest + sizes.max_query_nodes
    sequences, tokens, queries = policy.gpu_batch_size, sizes.max_micro_batch_tokens, sizes.max_micro_batch_tokens
    if device == "cpu":
        sequences, tokens, queries = sizes.attended_sequences, sizes.max_cpu_attention_tokens, min(CPU_ATTENTION_MAX_TREE_TOKENS, nodes + 1)
    return workspace_bytes(arch.num_heads, arch.num_kv_heads, arch.head_dim, sequences, tokens, queries, keys, threads)


def needs(plan: WeightPlan, policy: Policy, layout: CacheLayout, sizes: BlockSizes, dtype: torch.dtype, cuda: bool, threads: int = 1) -> list[Need]:
    """What needs how much on which tier: the table of `check_budgets` and of the report. threads: of attention on the CPU."""
    arch, cache = plan.arch, sizes.cache
    expansion = plan.expansion_bytes("pre") + plan.expansion_bytes("post")
    disk_slab = max(plan.layer_bytes(layer, "disk") for layer in range(len(plan.layers)))
    activation = sizes.max_micro_batch_tokens * arch.hidden_size * dtype.itemsize * policy.num_gpu_batches
    # Rows go home in pages: the last page of a micro-batch may be a part of one.
    host_rows = (sizes.max_micro_batch_tokens + layout.page_tokens) * arch.hidden_size * dtype.itemsize
    off_gpu = 1 - policy.activations.gpu
    head = (2 * arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim * dtype.itemsize
    rows = [
        Need("weights", "gpu", plan.tier_bytes("gpu")),
        Need("weights", "cpu", plan.tier_bytes("cpu")),
        Need("weights", "disk", plan.tier_bytes("disk")),
        Need(f"weight slabs ({plan.num_slabs})", "gpu", plan.num_slabs * plan.slab_bytes),
        Need("weight expansion", "gpu", expansion),
        Need("cache", "gpu", layout.num_layers * cache.gpu_pages * layout.page_bytes),
        Need("cache", "cpu", layout.num_layers * cache.cpu_pages * layout.page_bytes),
        Need("cache", "disk", layout.num_layers * cache.disk_pages * layout.disk_page_bytes),
        Need("cache staging (2)", "gpu", 2 * cache.staging_pages * layout.page_bytes),
        Need("cache tails", "cpu", layout.num_layers * cache.disk_sequences * cache.tail_tokens * layout.token_bytes),
        Need("activations", "gpu", activation if policy.activations.gpu > 0 else 0),
        Need("activations", "cpu", policy.num_gpu_batches * host_rows if off_gpu > 0 else 0),
        Need("activations", "disk", policy.num_gpu_batches * align(host_rows) if policy.activations.disk > 0 else 0),
        Need("rotary tables", "gpu", table_bytes(arch, sizes.longest, dtype)),
        Need("workspace", "gpu", pass_workspace_bytes(arch, policy, dtype, sizes.max_query_nodes)),
        Need("attention workspace", "gpu", 0 if cuda else attention_workspace_bytes(arch, policy, sizes, threads, "gpu")),
        Need("attention workspace", "cpu", attention_workspace_bytes(arch, policy, sizes, threads, "cpu")),
    ]
    if cuda:
        rows += [
            Need("disk staging", "cpu", plan.num_slabs * disk_slab + (2 * cache.staging_pages * layout.page_bytes if cache.disk_pages else 0)),
            Need("inputs", "cpu", 2 * HALF_BYTES),
            Need("attention buffers (4)", "cpu", 4 * sizes.max_cpu_attention_tokens * head),
        ]
    return [row for row in rows if row.num_bytes]


def one_graph_bytes(arch: Arch, policy: Policy, layout: CacheLayout, sizes: BlockSizes) -> int:
    return graph_bytes(arch.num_layers, arch.hidden_size * layout.dtype.itemsize, policy.gpu_batch_size, sizes.longest, layout.page_tokens)


def graph_pool_bytes(arch: Arch, policy: Policy, layout: CacheLayout) -> int:
    """Intermediate results of the largest decode pass: graphs share them, and nothing else does."""
    return bucket_of(min(policy.gpu_batch_size, MAX_SEQUENCES)) * arch.workspace_elements * layout.dtype.itemsize


def num_graphs(arch: Arch, policy: Policy, layout: CacheLayout, sizes: BlockSizes, rows: Iterable[Need], budget: int, cuda: bool) -> int:
    """Decode graphs that a block keeps: they save launches and are not worth refusing a job, so they take what its ``rows`` leave of the gpu tier's budget."""
    resident = all(split.gpu == 1 for split in (policy.weights, policy.cache, policy.activations))
    if not (cuda and resident and policy.overlap):
        return 0
    left = budget - sum(row.num_bytes for row in rows if row.tier == "gpu") - graph_pool_bytes(arch, policy, layout)
    return max(0, min(MAX_GRAPHS, left // one_graph_bytes(arch, policy, layout, sizes)))


def graph_needs(arch: Arch, policy: Policy, layout: CacheLayout, sizes: BlockSizes, rows: Iterable[Need], budget: int, cuda: bool) -> list[Need]:
    """The row of the decode graphs, where there are any."""
    count = num_graphs(arch, policy, layout, sizes, rows, budget, cuda)
    size = count * one_graph_bytes(arch, policy, layout, sizes) + graph_pool_bytes(arch, policy, layout)
    return [Need(f"decode graphs ({count})", "gpu", size)] if count else []
