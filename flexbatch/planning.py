"""From settings, model and machine to a policy and exact sizes, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flexbatch.config import ConfigurationError, EngineConfig, parse_bytes
from flexbatch.execution.inputs import CPU_ATTENTION_MAX_QUERY_TOKENS
from flexbatch.kernels import reference
from flexbatch.memory.kvcache import CacheSizes
from flexbatch.memory.pages import CacheLayout
from flexbatch.memory.tiers import GIB, Need, align, check_budgets
from flexbatch.memory.uploads import HALF_BYTES
from flexbatch.memory.weight_plan import WeightPlan
from flexbatch.models.arch import Arch
from flexbatch.policy.types import TIERS, Policy, Split

PAGE_TOKENS = 16
GROUP = 64
"""Elements that share a scale and a minimum when weights or cache are quantised."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MICRO_BATCH = 64
MAX_MICRO_BATCH_TOKENS = 8192
"""Query tokens of one micro-batch, at most: compute is efficient from 1,024 on, and its workspace grows with them."""


@dataclass(frozen=True)
class Job:
    """What the planner knows of a job: the token rows that every request may need, and its prompt's length."""

    cache_tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]

    @classmethod
    def typical(cls, max_positions: int) -> Job:
        """Before any prompt is known: 256 requests of 512 prompt tokens and 128 generated ones, within the model's context."""
        prompt, total = min(512, max(1, max_positions - 1)), min(639, max_positions)
        return cls((total,) * 256, (prompt,) * 256)

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


def resolve_budgets(config: EngineConfig, device: torch.device) -> dict[str, int]:
    """Bytes of every tier. Without a GPU, gpu and cpu tier are the same memory: half of what is available each."""
    available = host_memory_bytes()
    if device.type == "cuda":
        gpu, cpu = int(torch.cuda.mem_get_info(device)[0] * 0.94), int(available * 0.9)
    else:
        gpu = cpu = int(available * 0.45)
    folder = config.offload_path or default_offload_dir()
    while not folder.exists():
        folder = folder.parent
    space = os.statvfs(folder)
    return {
        "gpu": parse_bytes(config.gpu_memory) if config.gpu_memory is not None else gpu,
        "cpu": parse_bytes(config.cpu_memory) if config.cpu_memory is not None else cpu,
        "disk": space.f_bavail * space.f_frsize,
    }


def default_offload_dir() -> Path:
    return Path(os.path.expanduser("~")) / ".cache" / "flexbatch" / "offload"


def cache_layout(arch: Arch, config: EngineConfig, dtype: torch.dtype) -> CacheLayout:
    return CacheLayout(arch.num_layers, arch.num_kv_heads, arch.head_dim, config.cache_bits, GROUP, PAGE_TOKENS, dtype)


def micro_batch_tokens(policy: Policy, max_query_nodes: int = 0) -> int:
    """Query tokens of one micro-batch, at most: every sequence's decode token with its tree, and one prompt chunk at least."""
    return policy.gpu_batch_size * (1 + max_query_nodes) + max(policy.chunk, min(policy.prompt_tokens_per_micro_batch, MAX_MICRO_BATCH_TOKENS))


def workspace_bytes(arch: Arch, policy: Policy, dtype: torch.dtype, max_query_nodes: int = 0) -> int:
    """Intermediate results of one tick: hidden states, projections, MLP, and the float32 logits of one block with their sampling copies."""
    width = 6 * arch.hidden_size + 2 * (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim + 3 * arch.intermediate_size
    logits = 3 * min(64 << 20, 4 * arch.vocab_size * policy.gpu_batch_size * (1 + max_query_nodes))
    return micro_batch_tokens(policy, max_query_nodes) * width * dtype.itemsize + logits


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
    attended = min(tokens, off_gpu * max(CPU_ATTENTION_MAX_QUERY_TOKENS, max_query_nodes + 1)) if policy.cpu_attention > 0 else 0
    return BlockSizes(cache, tokens, attended, max_query_nodes, sequence_tokens)


def needs(plan: WeightPlan, policy: Policy, layout: CacheLayout, sizes: BlockSizes, dtype: torch.dtype, cuda: bool) -> list[Need]:
    """What needs how much on which tier: the table of `check_budgets` and of the report."""
    arch, cache = plan.arch, sizes.cache
    expansion = plan.expansion_bytes("pre") + plan.expansion_bytes("post")
    disk_slab = max(plan.layer_bytes(layer, "disk") for layer in range(len(plan.layers)))
    activation = sizes.max_micro_batch_tokens * arch.hidden_size * dtype.itemsize * policy.num_gpu_batches
    off_gpu = 1 - policy.activations.gpu
    head = (2 * arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim * dtype.itemsize
    rows = [
        Need("weights", "gpu", plan.tier_bytes("gpu")),
        Need("weights", "cpu", plan.tier_bytes("cpu")),
        Need("weights", "disk", plan.tier_bytes("disk")),
        Need("weight slabs (2)", "gpu", 2 * plan.slab_bytes),
        Need("weight expansion", "gpu", expansion),
        Need("cache", "gpu", layout.num_layers * cache.gpu_pages * layout.page_bytes),
        Need("cache", "cpu", layout.num_layers * cache.cpu_pages * layout.page_bytes),
        Need("cache", "disk", layout.num_layers * cache.disk_pages * layout.disk_page_bytes),
        Need("cache staging (2)", "gpu", 2 * cache.staging_pages * layout.page_bytes),
        Need("cache tails", "cpu", layout.num_layers * cache.disk_sequences * cache.tail_tokens * layout.token_bytes),
        Need("activations", "gpu", activation if policy.activations.gpu > 0 else 0),
        Need("activations", "cpu", activation if off_gpu > 0 else 0),
        Need("activations", "disk", align(activation) if policy.activations.disk > 0 else 0),
        Need("workspace", "gpu", workspace_bytes(arch, policy, dtype, sizes.max_query_nodes)),
    ]
    if cuda:
        rows += [
            Need("disk staging (2)", "cpu", 2 * disk_slab + (2 * cache.staging_pages * layout.page_bytes if cache.disk_pages else 0)),
            Need("inputs", "cpu", 2 * HALF_BYTES),
            Need("attention buffers (4)", "cpu", 4 * sizes.max_cpu_attention_tokens * head),
        ]
    return [row for row in rows if row.num_bytes]


def fixed_split(percent: tuple[float, ...], kind: int) -> Split:
    return Split.from_percent(percent[2 * kind], percent[2 * kind + 1])


def choose_policy(arch: Arch, config: EngineConfig, layout: CacheLayout, job: Job, budgets: dict[str, int], element_bytes: int) -> Policy:
    """The policy of the user's settings; what is left out is chosen to fit the budgets."""
    gpu_batch_size = config.gpu_batch_size or min(DEFAULT_MICRO_BATCH, max(1, -(-job.num_requests // (config.num_gpu_batches or 1))))
    chunk = config.prefill_chunk or 256
    if config.percent is not None:
        weights, cache, activations = (fixed_split(config.percent, kind) for kind in range(3))
    else:
        weights, cache, activations = fitting_splits(arch, config, layout, job, budgets, element_bytes, gpu_batch_size)
    policy = Policy(
        weights=weights,
        cache=cache,
        activations=activations,
        gpu_batch_size=gpu_batch_size,
        num_gpu_batches=config.num_gpu_batches or 1,
        weight_bits=config.weight_bits,
        cache_bits=config.cache_bits,
        cpu_attention=config.cpu_attention or 0.0,
        prefill_chunk=chunk,
        prefill_budget=config.prefill_budget or 0,
        overlap=config.overlap,
    )
    if config.num_gpu_batches is None:
        room = {"gpu": budgets["gpu"] // 2, "cpu": budgets["cpu"] // 2, "disk": budgets["disk"] // 2}
        per_sequence = layout.num_layers * layout.num_pages(job.longest) * layout.page_bytes
        fits = min((room[tier] / (per_sequence * fraction) for tier, fraction in zip(TIERS, cache.fractions, strict=True) if fraction > 0), default=1)
        wanted = -(-job.num_requests // gpu_batch_size)
        policy = replace(policy, num_gpu_batches=int(max(1, min(wanted, fits // gpu_batch_size, 8))))
    return policy


def fitting_splits(
    arch: Arch, config: EngineConfig, layout: CacheLayout, job: Job, budgets: dict[str, int], element_bytes: int, gpu_batch_size: int
) -> tuple[Split, Split, Split]:
    """Weights first on the GPU, then on the CPU, then on disk; the cache likewise in what is left."""
    total = model_bytes(arch, config.weight_bits, element_bytes)
    cache_bytes = layout.num_layers * layout.num_pages(job.longest) * layout.page_bytes * min(gpu_batch_size, max(1, job.num_requests))
    gpu_share = min(1.0, 0.6 * budgets["gpu"] / total)
    if total + cache_bytes < 0.6 * budgets["gpu"]:
        gpu_share = 1.0
    cpu_share = min(1.0 - gpu_share, 0.6 * budgets["cpu"] / total)
    weights = Split(round(gpu_share, 2), round(cpu_share, 2), 0.0) if gpu_share + cpu_share > 0.999 else Split(gpu_share, cpu_share, 1 - gpu_share - cpu_share)
    if abs(sum(weights.fractions) - 1) > 1e-6:
        weights = Split(weights.gpu, 1 - weights.gpu)
    left = {
        "gpu": 0.3 * budgets["gpu"] if gpu_share < 1 else budgets["gpu"] * 0.9 - total,
        "cpu": 0.3 * budgets["cpu"] if cpu_share > 0 else 0.8 * budgets["cpu"],
    }
    if cache_bytes <= left["gpu"]:
        cache = Split(1, 0)
    elif cache_bytes <= left["cpu"]:
        cache = Split(0, 1)
    else:
        cache = Split(0, 0, 1)
    return weights, cache, Split(1, 0)


def model_bytes(arch: Arch, bits: int, element_bytes: int) -> int:
    """All weights as they are stored."""
    from flexbatch.memory.weight_plan import plan_weights

    return sum(tensor.num_bytes for tensor in plan_weights(arch, Split(1, 0), bits, GROUP, element_bytes).all_tensors)


def check_fit(rows: Iterable[Need], budgets: dict[str, int]) -> None:
    """Raise DoesNotFitError with the table of needs when a budget is short."""
    check_budgets(rows, budgets)


def gib(num_bytes: int) -> float:
    return num_bytes / GIB


def cache_bytes_per_token(layout: CacheLayout) -> int:
    return layout.num_layers * reference.token_bytes(layout.num_kv_heads, layout.head_dim, layout.bits, layout.group, layout.dtype.itemsize)
