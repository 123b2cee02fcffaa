"""What no policy can exceed on a machine: one linear program in which the number of sequences in flight is free and
continuous.

With N sequences in flight a pass takes T; N / T is to be as large as possible. Divided by N, everything is linear in
v = 1 / N and v times the weights' split (Charnes and Cooper 1962, "Programming with linear fractional functionals").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
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
from flexbatch.policy.pass_load import PROMPT_FIELDS, Lengths, PassLoad, steady_load
from flexbatch.policy.policy import TIERS, Constraints, Policy, Split
from flexbatch.policy.stage import FIRST_PAGES
from flexbatch.policy.units import GIB
from flexbatch.policy.workload import Workload

IDEAL = 1e30
COMPUTE = "gpu_compute", "gpu_memory"
FEW_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 512)
"""In flight, between which a pass of a model with experts is counted as one of the smaller number."""
OF_WEIGHTS = np.array([name.startswith("weights") or name == "cpu_experts" for name in ("", *VARIABLES)])
"""Columns of what a pass brings once, however many sequences it has."""


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
    rows = rows_of(PassModel(shape, ideal, policy, load, hits=False))
    if weight_bits != 16:
        # By itself a sequence would be multiplied with codes, whose start and tiles many share in fact.
        plain = rows_of(PassModel(shape, ideal, dataclasses.replace(policy, weight_bits=16), load, hits=False))
        rows = without_compute(rows) | {name: plain[name] for name in COMPUTE}
    lengths = Lengths.of(workload, policy)
    occupied = lengths.prompt + lengths.output / 2
    cache_bytes = shape.kept_layers(occupied, shape.window) * shape.token_bytes(cache_bits) * shape.stages
    most = workload.num_sequences or math.inf
    ranges = [(1.0, math.inf, rows)] if shape.experts is None else of_experts(shape, ideal, load, policy, rows)
    solved = [
        _solve(shape, hardware, constraints, policy, own, cache_bytes, (least, min(below, most)))
        for least, below, own in ranges
        if least <= most
    ]
    found = [each for each in solved if each is not None]
    if not found:
        return None
    seconds, sequences = min(found)
    return MachineBound(finished * lengths.output / seconds, sequences)


def without_compute(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: row for name, row in rows.items() if "gpu_compute" not in JOINT.get(name, ())}


def of_experts(
    shape: ModelShape, ideal: Hardware, load: PassLoad, policy: Policy, rows: dict[str, np.ndarray]
) -> Iterator[tuple[float, float, dict[str, np.ndarray]]]:
    """(sequences in flight, at least and at most, rows of a pass for each of them) of a model with experts. ``rows``:
    of one whose passes bring all experts; what it computes grows with each token alike.

    A pass of few tokens reads few experts, on the link or on the CPU, and the second token adds less than the first.
    So of a range of numbers the least is counted, and of prompts, which come in some of the passes alone, nothing.
    """
    experts = shape.experts
    assert experts is not None
    limit = hit_expert_tokens(experts.count, experts.top_k)
    cuts = sorted({*FEW_SEQUENCES, limit + 1})
    own = dataclasses.replace(load, **dict.fromkeys(PROMPT_FIELDS, 0.0))
    on_cpu = 1.0 if ideal.cpu_experts is not None and shape.stages == ideal.tensor_ranks == 1 else 0.0
    for least, below in zip(cuts, (*cuts[1:], math.inf), strict=True):
        sizes = dataclasses.replace(policy, gpu_batch_size=least, num_gpu_batches=1, cpu_experts=on_cpu)
        found = without_compute(rows_of(PassModel(shape, ideal, sizes, own.scaled(least)))) | {
            name: least * rows[name] for name in COMPUTE
        }
        yield least, below, {name: np.where(OF_WEIGHTS, row, row / least) for name, row in found.items()}


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
        "prompt_token_seconds",
        "prompt_start_seconds",
        "prompt_expand_8_start_seconds",
        "prompt_expand_4_start_seconds",
        "sequence_seconds",
        "away_sequence_seconds",
        "cpu_attention_seconds",
        "exchange_seconds",
        "synchronize_seconds",
        "link_seconds",
        "disk_read_seconds",
        "interconnect_seconds",
        "interconnect_launch_seconds",
        "tell_seconds",
    )
    no_fixed_costs: dict[str, Any] = dict.fromkeys((*fixed_costs, "attention_tile_keys"), 0.0)
    return dataclasses.replace(ideal, **no_fixed_costs)


def rows_of(model: PassModel) -> dict[str, np.ndarray]:
    """Seconds of a pass by what takes them, over all layers."""
    stages = [stage for stage in model.stages if stage.name != FIRST_PAGES]
    return {name: total(stage.count * stage.seconds[name] for stage in stages) for name in stages[0].seconds}


def _solve(
    shape: ModelShape,
    hardware: Hardware,
    constraints: Constraints,
    policy: Policy,
    rows: Mapping[str, np.ndarray],
    cache_bytes: float,
    in_flight: tuple[float, float],
) -> tuple[float, float] | None:
    """(seconds of a pass for each sequence in flight, sequences in flight), of which there are no fewer and no more
    than ``in_flight``."""
    program = LinearProgram()
    for _ in VARIABLES:
        program.add(0.0, 1.0)
    per_sequence = program.add()
    inverse = program.add(1.0 / in_flight[1], 1.0 / in_flight[0])
    program.cost[per_sequence] = 1.0
    weights = shape.total_bytes(policy.weight_bits)
    least_read = shape.least_bytes_read(policy.weight_bits)
    program.at_most.append(({inverse: least_read / hardware.gpu_bandwidth, per_sequence: -1.0}, 0.0))
    for row in rows.values():
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
