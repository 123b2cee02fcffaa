"""Pieces: the buckets of a block's passes, and that they come after the decode graphs where memory is short."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.planner.planner import Planner
from flexbatch.policy.admission import micro_batch_tokens
from flexbatch.policy.decode_graphs import PLANNED_GRAPHS
from flexbatch.policy.footprint import has_graphs, peak_memory
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.limits import MAX_PIECE_TOKENS
from flexbatch.policy.piece_graphs import BUCKETS, PIECED_RANKS, piece_buckets, piece_bytes
from flexbatch.policy.plan import price
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import public_shape
from flexbatch.policy.workload import Workload
from flexbatch.validation.errors import ConfigurationError

ALL = Split(1, 0)
ON_GPU = Policy(ALL, ALL, ALL, 64, 1, prefill_chunk=64, prefill_budget=512, piece_tokens=2048)
SHAPE, WORKLOAD = public_shape("opt-1.3b"), Workload.uniform(64, 64, 64)
MACHINE = dataclasses.replace(load_hardware("h200"), gpu_reserved_bytes=0, cpu_reserved_bytes=0, piece_seconds=0.0)


@pytest.mark.parametrize(
    ("sequences", "chunk", "tokens", "largest"),
    [(1, 16, 2048, 32), (8, 100, 2048, 128), (300, 512, 2048, 896), (300, 512, 600, 640), (9000, 512, 8192, 8192)],
)
def test_buckets_reach_up_to_the_largest_pass(sequences: int, chunk: int, tokens: int, largest: int) -> None:
    policy = Policy(ALL, ALL, ALL, sequences, 1, prefill_chunk=chunk, prefill_budget=chunk, piece_tokens=tokens)
    buckets = piece_buckets(policy)
    assert piece_buckets(policy, PIECED_RANKS) == buckets and piece_buckets(policy, PIECED_RANKS + 1) == ()
    assert buckets == BUCKETS[: len(buckets)] and buckets[-1] == largest
    assert buckets[-1] >= min(tokens, micro_batch_tokens(policy))
    assert piece_buckets(dataclasses.replace(policy, piece_tokens=0)) == () and piece_bytes(4, (), 1000, True) == 0
    assert piece_bytes(4, buckets, 1000, False) > piece_bytes(4, buckets[:-1], 1000, False) >= 0


def test_large_buckets_waste_little() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS)) and BUCKETS[-1] == MAX_PIECE_TOKENS
    assert all(wide - narrow <= narrow / 8 for narrow, wide in itertools.pairwise(BUCKETS) if narrow > 960)


def test_a_plan_counts_their_memory_and_their_launches() -> None:
    """Not measured, they cost what launching kernel by kernel does."""
    plain = dataclasses.replace(ON_GPU, piece_tokens=0)
    with_pieces, without = (
        peak_memory(SHAPE, MACHINE, WORKLOAD, policy, with_graphs=True)["gpu"]["decode graphs"]
        for policy in (ON_GPU, plain)
    )
    buckets = piece_buckets(ON_GPU)
    assert with_pieces - without == piece_bytes(SHAPE.num_layers, buckets, SHAPE.peak_workspace_bytes, False)
    machine = MACHINE.with_memory(gpu=80 << 30)
    measured = dataclasses.replace(machine, piece_seconds=machine.launch_seconds / 4)
    assert price(SHAPE, machine, WORKLOAD, ON_GPU).seconds == price(SHAPE, machine, WORKLOAD, plain).seconds
    quick, slow = (price(SHAPE, measured, WORKLOAD, policy) for policy in (ON_GPU, plain))
    assert quick.seconds < slow.seconds and has_graphs(quick.memory)


def test_pieces_take_what_decode_graphs_leave() -> None:
    """The smallest passes first: memory that runs out byte by byte takes the largest buckets, then all, then decode
    graphs."""
    job = Job((160,) * 40, (100,) * 40)
    wanted = {"percent": (100, 0, 100, 0, 100, 0), "gpu_batch_size": 40, "prefill_budget": 512, "piece_tokens": 2048}
    settings = {"model": "opt-1.3b", "hardware": "h200", "dummy_weights": True, "cpu_memory": "64MiB", **wanted}
    rich = Planner(EngineConfig(**settings, gpu_memory="9GiB"), job, dry=True).engine_plan
    sizes = rich.sizes(job)
    every = rich.graphs(sizes)
    assert every.buckets == piece_buckets(rich.policy) and every.decode > PLANNED_GRAPHS
    rows = [row for row in rich.requirements(sizes) if row.tier == "gpu"]
    assert rows[-1].num_bytes == every.num_bytes and "in pieces" in rows[-1].what
    bare, seen = sum(row.num_bytes for row in rows[:-1]), []
    for spare in range(0, every.num_bytes, every.num_bytes // 40):
        budgets = {**rich.budgets, "gpu": bare + spare}
        poor = dataclasses.replace(rich, deployment=dataclasses.replace(rich.deployment, budgets=budgets))
        found = poor.graphs(sizes)
        assert found.num_bytes <= spare
        assert found.buckets == every.buckets[: len(found.buckets)]
        assert not found.buckets or found.decode >= PLANNED_GRAPHS
        seen.append((found.decode, len(found.buckets)))
    assert len({count for _, count in seen}) > 3 and seen[0] == (0, 0)
    assert [count for _, count in seen] == sorted(count for _, count in seen)


@pytest.mark.parametrize("tokens", [-1, MAX_PIECE_TOKENS + 1])
def test_numbers_that_mean_nothing(tokens: int) -> None:
    with pytest.raises(ConfigurationError, match="piece_tokens"):
        EngineConfig(model="demo", piece_tokens=tokens)
