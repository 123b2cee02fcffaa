"""What rank 0 tells the other ranks of its engine: plain data, in the order in which it happens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexbatch.config import EngineConfig
from flexbatch.execution.block_sizes import BlockSizes
from flexbatch.execution.pass_batch import PassBatch
from flexbatch.memory.cache_orders import Order
from flexbatch.models.shard import RankShard
from flexbatch.models.stage import RankStage
from flexbatch.policy.policy import Policy


@dataclass(frozen=True)
class BeginEngine:
    """An engine begins. Budgets are those of one rank; threads are of the CPU."""

    config: EngineConfig
    device_type: str
    dtype: torch.dtype
    budgets: dict[str, int]
    shards: tuple[RankShard, ...]
    stages: tuple[RankStage, ...]
    threads: int


@dataclass(frozen=True)
class PlaceWeights:
    """Load the rank's part of the weights, or move it."""

    policy: Policy
    num_slabs: int


@dataclass(frozen=True)
class MakeRunner:
    """Make room for a block."""

    policy: Policy
    sizes: BlockSizes
    logits_chunk_bytes: int
    max_graphs: int
    piece_buckets: tuple[int, ...]
    """Graphs that every rank keeps: of decode passes, and of passes in pieces by their tokens. A rank that records runs
    a pass once before, with all of its sums: either all ranks do so in a pass, or none."""


@dataclass(frozen=True)
class ReachLonger:
    """Take sequences as long as these sizes say."""

    sizes: BlockSizes


@dataclass(frozen=True)
class RunHead:
    """Make logits of the oldest pass in flight in a pipeline: for the ranks that have a part of the head."""


@dataclass(frozen=True)
class RunPass:
    """Run a pass, after what was done to the cache since the last one. newest: rows of the tokens that rank 0 sends
    along, by sequence id; None where it has read them."""

    batch: PassBatch
    orders: tuple[Order, ...]
    newest: dict[int, int] | None


@dataclass(frozen=True)
class CloseEngine:
    """The engine ends; another one may begin."""


@dataclass(frozen=True)
class Leave:
    """No further engine begins."""


RankCommand = BeginEngine | PlaceWeights | MakeRunner | ReachLonger | RunPass | RunHead | CloseEngine | Leave
