"""``python -m tests.execution.launch_counts``: what the layers of a tick launch on a GPU, by kind, as JSON. A process
of its own: an imagined GPU wants one."""

from __future__ import annotations

import json
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexbatch.config import EngineConfig
from flexbatch.execution.attention import CacheAttention
from flexbatch.execution.inputs import AttentionGroup
from flexbatch.execution.planned_kernels import kinds_of, tables_for, tables_of
from flexbatch.kernels.imagined_gpu import DEVICE, GpuTraits, imagined_gpu
from flexbatch.memory.tiers import Pool
from flexbatch.memory.weights import WeightStore
from flexbatch.models import layers
from flexbatch.planner.deploy import deploy
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.policy import Policy, Split

KINDS = {"aten.linear.default": "products", "aten.empty.memory_format": "allocations", "aten.mm.default": "products"}


class TorchCounted(TorchDispatchMode):
    """What torch is asked for."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kind := KINDS.get(str(func))) is not None:
            self.found[kind] += 1
        return func(*args, **(kwargs or {}))


class CountedRanks:
    """In the place of the ranks that share a layer."""

    def __init__(self, found: Counter[str]) -> None:
        self.found = found

    def sum(self, x: Tensor) -> Tensor:
        self.found["sums"] += 1
        return x


def counts(bits: int, ranks: int, tokens: int) -> Counter[str]:
    """Of one tick of Llama-3-70B with so many tokens that decode."""
    from triton.runtime.jit import JITFunction

    settings: dict[str, Any] = {"weight_bits": bits, "cache_bits": bits, "tensor_parallel_size": ranks}
    config = EngineConfig(model="llama-3-70b", dummy_weights=True, dtype="bfloat16", gpu_memory="40GiB", **settings)
    deployment = deploy(config, None, load_hardware("h200"), True, None)
    resident = Split(1, 0)
    policy = Policy(resident, resident, resident, tokens, 2, weight_bits=bits, cache_bits=bits)
    layout, dtype = deployment.layout(policy), torch.bfloat16
    kinds = kinds_of(deployment.weight_plan(policy), layout, dtype, policy, 0)
    found: Counter[str] = Counter()
    with imagined_gpu(GpuTraits(90, 132, 232448)):
        launch = JITFunction.run

        def counted(kernel: Any, *arguments: Any, **named: Any) -> None:
            found["triton"] += 1
            launch(kernel, *arguments, **named)

        JITFunction.run = counted
        here: Any = SimpleNamespace(device=DEVICE)
        tiers: Any = SimpleNamespace(gpu=Pool("gpu", 1 << 60, device=DEVICE), cpu=Pool("cpu", 0))
        weights, cache, nothing = WeightStore(kinds.plan, tiers, here, dtype), SimpleNamespace(layout=layout), None
        attention = CacheAttention(kinds.plan.arch, cache, here, nothing, {})  # type: ignore[arg-type]
        weights.pass_tokens = 2 * tokens
        hidden, update = (torch.empty(tokens, kinds.plan.arch.hidden_size, dtype=dtype, device=DEVICE) for _ in "12")
        rows = layout.row_view(torch.empty(8 * layout.page_bytes, dtype=torch.uint8, device=DEVICE))
        slots = torch.empty(tokens, dtype=torch.int64, device=DEVICE)
        group = AttentionGroup(0, tokens, *tables_for(tokens), None, 1, 256, None)
        found.clear()
        with TorchCounted(found):
            tick(kinds.plan.arch, weights, attention, layers.Apart(hidden, update), rows, slots, group, found)
        JITFunction.run = launch
    return found


def tick(
    arch: Any,
    weights: WeightStore,
    attention: CacheAttention,
    given: layers.Apart,
    rows: Tensor,
    slots: Tensor,
    group: AttentionGroup,
    found: Counter[str],
) -> None:
    """As `TickHalves` has one in a block that is on the GPU whole."""
    ranks: Any = CountedRanks(found) if arch.shard is not None else None
    tokens = len(slots)
    first, rope = weights.weights(1, "pre", tokens), tables_of(arch, torch.bfloat16)
    query, key, value = layers.pre_attention(arch, 1, first, given, slots, rope, None, ranks)
    attention.append(rows, slots, key, value)
    attended = query.new_empty(*query.shape[:-1], arch.value_dim)
    attention.attend_part(attended, 1, query, rows, group, 0)
    second = weights.weights(1, "post", tokens)
    context = None, None, ranks, None, None, None, True
    layers.end_of(layers.post_attention(arch, 1, second, given.hidden, attended, *context))


if __name__ == "__main__":
    json.dump([dict(counts(*cell)) for cell in json.loads(sys.argv[1])], sys.stdout)
