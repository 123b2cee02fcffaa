"""What no policy can exceed on a machine: one linear program in which the number of sequences in flight is free and
continuous.

With N sequences in flight a pass takes T; N / T is to be as large as possible. Divided by N, everything is linear in
v = 1 / N and v times the weights' split (Charnes and Cooper 1962, "Programming with linear fractional functionals").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexbatch.policy.affine import KINDS, VARIABLES, total
from flexbatch.policy.cost import JOINT, PassModel
from flexbatch.policy.curve import Curve
from flexbatch.policy.footprint import capacity
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import hit_expert_tokens
from flexbatch.policy.lp import LinearProgram, add_shares, column, fixed_fractions
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import Lengths, steady_load
from flexbatch.policy.policy import TIERS, Constraints, Policy, Split
from flexbatch.policy.units import GIB
from flexbatch.policy.workload import Workload

IDEAL = 1e30


@dataclass(frozen=True)
class MachineBound:
    """``sequences``: in flight at the bound; a good place to start a search."""

    tokens_per_second: float
    sequences: float


def machine_bound(
    shape: ModelShape,
    hardware: Hardware,
    workload: Workload,
    constraints: Constraints,
    weight_bits: int,
    cache_bits: int,
) -> MachineBound | None:
    """None when not even one sequence fits without any working memory.

    Nothing is launched, GEMMs run at their best rate, weights are read once a pass as they are stored, working
    memory costs nothing, the cache holds only what is in use.
    """
    anywhere, longest = Split(1, 0), workload.longest_prompt
    policy = Policy(anywhere, anywhere, anywhere, 1, 1, weight_bits, cache_bits, prefill_chunk=int(np.ceil(longest)))
    ideal = ideal_machine(hardware, weight_bits)
    # Two micro-batches of half a sequence: with one, CPU attention would not overlap.
    policy = dataclasses.replace(policy, num_gpu_batches=2)
    load, finished = steady_load(workload, policy, in_flight=1.0)
    # Of many sequences all experts cross the link in each pass, though a single one would hit few.
    experts, count = shape.experts, workload.num_sequences
    hits = experts is not None and count is not None and count <= hit_expert_tokens(experts.count, experts.top_k)
    rows = rows_of(PassModel(shape, ideal, policy, load, hits=hits))
    if weight_bits != 16:
        # By itself a sequence would be multiplied with codes, whose start and tiles many share in fact.
        plain = rows_of(PassModel(shape, ideal, dataclasses.replace(policy, weight_bits=16), load, hits=hits))
        alone = {name: row for name, row in rows.items() if "gpu_compute" not in JOINT.get(name, ())}
        rows = alone | {name: plain[name] for name in ("gpu_compute", "gpu_memory")}
    lengths = Lengths.of(workload, policy)
    occupied = lengths.prompt + lengths.output / 2
    seconds = _solve(
        shape,
        hardware,
        workload,
        constraints,
        policy,
        rows.values(),
        shape.kept_layers(occupied, shape.window) * shape.token_bytes(cache_bits) * shape.stages,
    )
    if seconds is None:
        return None
    return MachineBound(finished * lengths.output / seconds[0], seconds[1])


def ideal_machine(hardware: Hardware, weight_bits: int) -> Hardware:
    """Products at the best rate, everything else on the device in no time, and nothing that begins costs anything."""
    coded = hardware.coded(weight_bits)
    best = float(max((*hardware.gemm.values, *(coded.values if coded else ()))))
    # The curve starts below one token: a sequence brings a fraction of a token to each micro-batch of the head.
    ideal = dataclasses.replace(
        hardware, gemm=Curve((1e-9,), (best,)), expand=IDEAL, gpu_bandwidth=IDEAL, launch_seconds=0.0, pass_seconds=0.0
    )
    fixed_costs = (
        "graph_seconds",
        "piece_seconds",
        "expand_seconds",
        "expand_start_seconds",
        "request_seconds",
        "sequence_seconds",
        "away_sequence_seconds",
        "cpu_attention_seconds",
        "exchange_seconds",
        "synchronize_seconds",
        "link_seconds",
        "disk_read_seconds",
        "interconnect_seconds",
        "interconnect_launch_seconds",
    )
    no_fixed_costs: dict[str, Any] = dict.fromkeys((*fixed_costs, "attention_tile_keys"), 0.0)
    return dataclasses.replace(ideal, **no_fixed_costs)


def rows_of(model: PassModel) -> dict[str, np.ndarray]:
    """Seconds of a pass by what takes them, over all layers."""
    stages = model.stages
    return {name: total(stage.count * stage.seconds[name] for stage in stages) for name in stages[0].seconds}


def _solve(
    shape: ModelShape,
    hardware: Hardware,
    workload: Workload,
    constraints: Constraints,
    policy: Policy,
    rows: Iterable[np.ndarray],
    cache_bytes: float,
) -> tuple[float, float] | None:
    """(seconds of a pass for each sequence in flight, sequences in flight)."""
    program = LinearProgram()
    for _ in VARIABLES:
        program.add(0.0, 1.0)
    per_sequence = program.add()
    inverse = program.add(1.0 / workload.num_sequences if workload.num_sequences else 0.0, 1.0)
    program.cost[per_sequence] = 1.0
    weights = shape.total_bytes(policy.weight_bits)
    least_read = shape.least_bytes_read(policy.weight_bits)
    program.at_most.append(({inverse: least_read / hardware.gpu_bandwidth, per_sequence: -1.0}, 0.0))
    for row in rows:
        program.at_most.append(({**dict(enumerate(row[1:])), per_sequence: -1.0}, -float(row[0])))
    fixed = fixed_fractions(constraints)
    for kind in KINDS:
        # The whole of a kind: v for the weights, which are read once for all sequences, and 1 for what each sequence
        # has.
        def share(part: float, of_weights: bool = kind == "weights") -> tuple[dict[int, float], float]:
            return ({inverse: -part}, 0.0) if of_weights else ({}, part)

        scaled, limit = share(1.0)
        program.equal.append((dict.fromkeys((column(f"{kind}_{tier}") for tier in TIERS), 1.0) | scaled, limit))
        for tier in TIERS:
            if f"{kind}_{tier}" in fixed:
                scaled, limit = share(fixed[f"{kind}_{tier}"])
                program.equal.append(({column(f"{kind}_{tier}"): 1.0} | scaled, limit))
    add_shares(program, constraints)
    for tier, budget in capacity(hardware).items():
        needed = {column(f"weights_{tier}"): weights / GIB, column(f"cache_{tier}"): cache_bytes / GIB}
        program.at_most.append((needed | {inverse: -budget / GIB}, 0.0))
    solution = program.solved()
    if solution is None:
        return None
    return float(solution.x[per_sequence]), 1.0 / max(float(solution.x[inverse]), 1e-9)
