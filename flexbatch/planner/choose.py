"""From model, settings and job to a policy: the optimizer's sizes and rates on one side, the engine's exact sizes on
the other."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flexbatch.config import EngineConfig
from flexbatch.job import Job
from flexbatch.memory.tiers import MemoryRequirement, check_budgets
from flexbatch.memory.weight_plan import PlacedTensor, tensor_format
from flexbatch.models.arch import Arch
from flexbatch.models.specs import weight_specs
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import MAX_MICRO_BATCH_TOKENS, MAX_PREFILL_CHUNK, PAGE_TOKENS, weight_group
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.optimizer import choose
from flexbatch.policy.plan import DoesNotFit, Plan, price
from flexbatch.policy.policy import Constraints, Policy, Split
from flexbatch.policy.workload import Workload
from flexbatch.validation.errors import DoesNotFitError

logger = logging.getLogger("flexbatch")

SMALL = 0.25
"""Share of every budget below which a job needs no search: whatever is chosen, nothing has to travel."""
WHOLE_BLOCK = 1024
"""Sequences of a block that is chosen without a search, at most: GEMMs are efficient from there on."""
SMALLEST_PREFILL_BUDGET = 32
"""Prompt tokens of a micro-batch in a pass where memory is so short that no more find room."""
ROUNDING = 0.05
"""Share of a budget that whole tensors, sequences and pages may exceed a plan by."""
KEPT_BLOCK_SHARE = 0.97
"""Of the predicted throughput: what a block may lose when it is placed again in a little less room. A block of 70
sequences that was kept at any price went to disk with 9 % of its cache, and from 250 to 101 tokens a second."""
LENGTH_TOLERANCE = 0.25
"""Relative difference of mean lengths from which another job is decided for again."""
ROUNDS = 12
"""Choices that may follow each other with less room, until the exact sizes fit."""
ON_GPU, ON_CPU, ON_DISK = Split(1, 0), Split(0, 1), Split(0, 0, 1)
FALLBACK_PLACEMENTS = (
    (ON_GPU, ON_GPU),
    (ON_CPU, ON_GPU),
    (ON_CPU, ON_CPU),
    (ON_DISK, ON_GPU),
    (ON_DISK, ON_CPU),
    (ON_DISK, ON_DISK),
)
"""Placements of weights and cache that are tried with exact sizes when the optimizer, whose sizes are a little
larger, finds none."""


@dataclass(frozen=True)
class Problem:
    """What a policy is chosen for. ``budgets``: bytes by tier."""

    arch: Arch
    config: EngineConfig
    job: Job
    budgets: dict[str, int]
    element_bytes: int
    prequantized: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(bits, group) by role of a checkpoint that is quantised already."""
    loaded: Policy | None = None
    """The policy whose weights and bits are in memory and stay as they are."""

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.config.model, self.arch, self.element_bytes, self.config.weight_bits, self.prequantized)

    @property
    def stored_bits(self) -> int | None:
        """Bits of the weights of a checkpoint that is quantised already."""
        return max((bits for bits, _ in self.prequantized.values()), default=None)

    @property
    def percent(self) -> tuple[float | None, ...] | None:
        """The six numbers that are fixed, by the user or because the weights are loaded."""
        if self.config.percent is not None or self.loaded is None:
            return self.config.percent
        return (100 * self.loaded.weights.gpu, 100 * self.loaded.weights.cpu, None, None, None, None)

    @property
    def settled(self) -> bool:
        """Whether the user left nothing to choose."""
        config = self.config
        sizes = (
            config.percent,
            config.gpu_batch_size,
            config.num_gpu_batches,
            config.cpu_attention,
            config.prefill_chunk,
            config.prefill_budget,
        )
        return None not in sizes and not config.allow_bits


@dataclass(frozen=True)
class Choice:
    """A policy that fits by exact sizes, and its plan where the optimizer priced it."""

    policy: Policy
    plan: Plan | None


Needs = Callable[[Policy], list[MemoryRequirement]]
"""The engine's exact needs under a policy."""


def model_shape(
    name: str, arch: Arch, element_bytes: int, bits: int = 16, prequantized: Mapping[str, tuple[int, int]] | None = None
) -> ModelShape:
    """The sizes of all tensors in placement order. Of tied embeddings the table belongs to the head, which ships it.

    ``prequantized`` roles of a checkpoint keep their own (bits, group), and with them every matrix beside them is
    stored at ``bits`` already.
    """
    specs = list(weight_specs(arch))
    block = [spec for spec in specs if spec.layer == 0]
    group = weight_group(arch.hidden_size)
    stored = [
        PlacedTensor(spec, "gpu", *tensor_format(spec, bits, group, prequantized or {}), element_bytes).num_bytes
        for spec in block
    ]

    def elements(layers: Iterable[int]) -> tuple[int, ...]:
        return tuple(
            math.prod(spec.shape)
            for spec in specs
            if spec.layer in layers and not (spec.role == "embed.weight" and arch.tie_word_embeddings)
        )

    table = tuple(math.prod(spec.shape) for spec in specs if spec.role == "embed.weight" and arch.tie_word_embeddings)
    return ModelShape(
        name=name,
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        intermediate_size=arch.intermediate_size,
        vocab_size=arch.vocab_size,
        block_tensors=elements((0,)),
        head_tensors=(*table, *elements((arch.num_layers,))),
        embedding_tensors=elements((-1,)),
        mlp_matrices=3 if arch.mlp == "gated" else 2,
        element_bytes=element_bytes,
        stored_block_bytes=tuple(stored) if prequantized else (),
    )


def workload_of(job: Job) -> Workload:
    """Lengths as the cost model counts them: the last generated token needs no row of the cache."""
    outputs = [cache - prompt + 1 for cache, prompt in zip(job.cache_tokens, job.prompt_tokens, strict=True)]
    return Workload.from_lengths(
        [max(1, prompt) for prompt in job.prompt_tokens], [max(1, output) for output in outputs]
    )


def constraints_of(problem: Problem, room: dict[str, int], block: tuple[int, int] | None = None) -> Constraints:
    """What the user gave is fixed; ``block`` fixes its sizes too. Bits are chosen only among --allow-bits."""
    config, loaded = problem.config, problem.loaded

    def bits(name: str, stored: int | None) -> tuple[int, ...]:
        given: int = getattr(config, name)
        if loaded is not None:
            return (getattr(loaded, name),)
        if stored is not None:
            return (stored,)
        return tuple(config.allow_bits) if config.allow_bits and given == 16 else (given,)

    return Constraints(
        percent=problem.percent,
        gpu_batch_size=block[0] if block else config.gpu_batch_size,
        num_gpu_batches=block[1] if block else config.num_gpu_batches,
        cpu_attention=config.cpu_attention,
        prefill_chunk=config.prefill_chunk,
        prefill_budget=config.prefill_budget,
        weight_bits=bits("weight_bits", problem.stored_bits),
        cache_bits=bits("cache_bits", None),
        overlap=config.overlap,
        gpu_memory=room["gpu"],
        cpu_memory=room["cpu"],
        disk=room["disk"],
    )


def baseline_policy(
    problem: Problem, placement: tuple[Split, Split] = (ON_GPU, ON_GPU), most_sequences: int = WHOLE_BLOCK
) -> Policy:
    """The user's settings; where they say nothing, ``placement`` of weights and cache, one micro-batch and the block
    as large as the job."""
    config, job, percent = problem.config, problem.job, problem.percent
    weights, cache = placement
    activations = ON_GPU
    if config.percent is not None:
        weights, cache, activations = (
            Split.from_percent(config.percent[2 * kind], config.percent[2 * kind + 1]) for kind in range(3)
        )
    if problem.loaded is not None:
        weights = problem.loaded.weights
    assert percent is None or len(percent) == 6
    sequences = max(1, min(job.num_requests, most_sequences))
    batch = config.gpu_batch_size or -(-sequences // (config.num_gpu_batches or 1))
    constraints = constraints_of(problem, problem.budgets)
    return Policy(
        weights=weights,
        cache=cache,
        activations=activations,
        gpu_batch_size=batch,
        num_gpu_batches=config.num_gpu_batches or -(-sequences // batch),
        weight_bits=max(constraints.weight_bits),
        cache_bits=max(constraints.cache_bits),
        cpu_attention=config.cpu_attention or 0.0,
        prefill_chunk=config.prefill_chunk
        or min(MAX_PREFILL_CHUNK, -(-max(job.prompt_tokens) // PAGE_TOKENS) * PAGE_TOKENS),
        overlap=config.overlap,
        prefill_budget=config.prefill_budget or 0,
    )


def overshoot(rows: Iterable[MemoryRequirement], budgets: dict[str, int], share: float = 1.0) -> dict[str, int]:
    """Bytes by which the needs of each tier exceed ``share`` of its budget; empty when all fit."""
    totals = dict.fromkeys(budgets, 0)
    for row in rows:
        totals[row.tier] += row.num_bytes
    return {
        tier: math.ceil(total - share * budgets[tier])
        for tier, total in totals.items()
        if total > share * budgets[tier]
    }


def choose_policy(problem: Problem, hardware: Callable[[], Hardware], needs: Needs) -> Choice:
    """The policy of the user's settings, the rest of it chosen; it fits by the engine's exact ``needs``.

    ``hardware`` is called only when something has to be weighed. A job far below all budgets is not searched for:
    everything is where the user wants it, or on the gpu tier. Raises DoesNotFitError with a table of what is
    missing.
    """
    plain = baseline_policy(problem)
    if not overshoot(needs(plain), problem.budgets, SMALL):
        return Choice(plain, None)
    machine = without_reserves(hardware())
    if problem.settled:
        # Refused by the caller with the exact table when it does not fit.
        return Choice(plain, priced(problem, machine, plain))
    simple = [priced(problem, machine, policy) for policy in fallbacks(problem, needs)]
    found = [Choice(plan.policy, plan) for plan in simple]
    refusal = None
    try:
        found.append(searched(problem, machine, needs))
    except DoesNotFit as error:
        refusal = error
    if not found:
        if problem.config.percent is not None:
            smallest = baseline_policy(problem, most_sequences=1)
            check_budgets(
                needs(dataclasses.replace(smallest, prefill_budget=smallest.prefill_budget or SMALLEST_PREFILL_BUDGET)),
                problem.budgets,
            )
        raise DoesNotFitError(str(refusal)) from refusal
    return max(found, key=predicted)


def searched(problem: Problem, hardware: Hardware, needs: Needs) -> Choice:
    """The optimizer's choice. While exact sizes exceed a budget, it chooses again with less room. Raises DoesNotFit."""
    room, block, before, last, cut = dict(problem.budgets), None, 0.0, None, 1
    shape, workload = problem.shape, workload_of(problem.job)
    for left in reversed(range(ROUNDS)):
        try:
            plan = choose(shape, hardware, workload, constraints_of(problem, room, block))
        except DoesNotFit:
            if block is None or not left:
                raise
            block = None
            continue
        if block is not None and plan.predicted_tokens_per_second < KEPT_BLOCK_SHARE * before:
            # The block lost more than rounding: another one suits the smaller room better.
            plan, block = choose(shape, hardware, workload, constraints_of(problem, room)), None
        before = plan.predicted_tokens_per_second
        found = choice_of(plan, problem, hardware)
        policy = found.policy
        exceeded = overshoot(needs(policy), problem.budgets)
        if not exceeded:
            # A block that was kept while rounding was mended may have lost more than another one would.
            return found if block is None else faster(found, problem, hardware, needs, room)
        # Rounding is mended within the block; what is missing by more calls for another block, and so does rounding
        # that cannot be mended.
        small = all(size <= ROUNDING * problem.budgets[tier] for tier, size in exceeded.items())
        block = (policy.gpu_batch_size, policy.num_gpu_batches) if small and left > ROUNDS // 2 else None
        # The same policy again: the optimizer still counts on bytes that the exact sizes do not leave, and more has to
        # go than what is missing.
        last, cut = policy, 2 * cut if policy == last else 1
        for tier, size in exceeded.items():
            room[tier] = max(1, room[tier] - cut * (size + size // 20) - PAGE_TOKENS)
    raise DoesNotFit(
        f"{shape.name}: no policy was found in {ROUNDS} rounds whose exact sizes fit the budgets; give any tier one "
        "layer's weights more"
    )


def choice_of(plan: Plan, problem: Problem, hardware: Hardware) -> Choice:
    """The policy of ``plan`` as the engine runs it, priced anew where that differs."""
    policy = executable(problem, plan.policy)
    return Choice(policy, plan if policy == plan.policy else with_search(priced(problem, hardware, policy), plan))


def predicted(choice: Choice) -> float:
    """Tokens per second; 0 where nothing was weighed."""
    return choice.plan.predicted_tokens_per_second if choice.plan else 0.0


def faster(found: Choice, problem: Problem, hardware: Hardware, needs: Needs, room: dict[str, int]) -> Choice:
    """``found``, or what the optimizer chooses in ``room`` with any block where that fits and is faster."""
    try:
        plan = choose(problem.shape, hardware, workload_of(problem.job), constraints_of(problem, room))
    except DoesNotFit:
        return found
    other = choice_of(plan, problem, hardware)
    if overshoot(needs(other.policy), problem.budgets):
        return found
    return max(found, other, key=predicted)


def differs(problem: Problem, policy: Policy, job: Job) -> bool:
    """Whether the sizes of a block that were chosen for the problem's job are wrong for another: lengths unlike, or
    more requests than the block was cut to."""
    planned, config = problem.job, problem.config
    if None not in (config.gpu_batch_size, config.num_gpu_batches) or job == planned:
        return False
    if (
        job.num_requests > planned.num_requests
        and policy.block_size >= planned.num_requests
        and policy.block_size < min(job.num_requests, WHOLE_BLOCK)
    ):
        return True
    mean, expected = (sum(each.cache_tokens) / each.num_requests for each in (job, planned))
    return policy.block_size < job.num_requests and abs(mean / expected - 1) > LENGTH_TOLERANCE


def executable(problem: Problem, policy: Policy) -> Policy:
    """The policy as the engine runs it: loaded weights stay in their homes, and whole prompts are a budget where
    they exceed the engine's own."""
    if problem.loaded is not None:
        policy = dataclasses.replace(policy, weights=problem.loaded.weights)
    if not policy.prefill_budget and policy.prompt_tokens_per_micro_batch > MAX_MICRO_BATCH_TOKENS:
        whole = min(policy.prompt_tokens_per_micro_batch, policy.gpu_batch_size * max(problem.job.prompt_tokens))
        policy = dataclasses.replace(policy, prefill_budget=max(whole, policy.prefill_chunk))
    return policy


def fallbacks(problem: Problem, needs: Needs) -> Iterator[Policy]:
    """Simple placements that fit, each with its largest block, and with few prompt tokens a pass where more do not
    fit."""
    for placement in FALLBACK_PLACEMENTS[: 1 if problem.config.percent is not None else None]:
        for policy in ladder(problem, placement):
            if not overshoot(needs(policy), problem.budgets):
                yield policy
                break


def ladder(problem: Problem, placement: tuple[Split, Split]) -> Iterator[Policy]:
    """Ever smaller blocks of one placement."""
    for budget in [problem.config.prefill_budget] if problem.config.prefill_budget else [512, SMALLEST_PREFILL_BUDGET]:
        sequences = min(WHOLE_BLOCK, problem.job.num_requests)
        while sequences:
            policy = baseline_policy(problem, placement, sequences)
            yield dataclasses.replace(policy, prefill_budget=min(budget, policy.gpu_batch_size * policy.prefill_chunk))
            sequences //= 2


def without_reserves(hardware: Hardware) -> Hardware:
    """The engine's budgets are for its pools alone: what the context and libraries take is outside of them."""
    return dataclasses.replace(hardware, gpu_reserved_bytes=0, cpu_reserved_bytes=0)


def priced(problem: Problem, hardware: Hardware, policy: Policy) -> Plan:
    """What a policy costs for the problem's job within its budgets."""
    budgets = problem.budgets
    return price(
        problem.shape,
        hardware.with_memory(budgets["gpu"], budgets["cpu"], budgets["disk"]),
        workload_of(problem.job),
        policy,
    )


def with_search(plan: Plan, searched_plan: Plan) -> Plan:
    """``plan`` with what the search found beside the policy."""
    names = ("machine_bound_tokens_per_second", "tokens_per_second_per_gib", "linear_programs", "search_seconds")
    return dataclasses.replace(plan, **{name: getattr(searched_plan, name) for name in names})
