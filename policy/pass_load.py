"""What a pass carries: query tokens, contexts and prompts, for one pass, for the steady state and over a whole job.

The fields of a `PassLoad` are totals over the block; all may be arrays (one element a pass), and the cost formulas
broadcast over them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from flexbatch.policy.limits import PAGE_TOKENS
from flexbatch.policy.policy import Policy
from flexbatch.policy.workload import Workload

PROMPT_FIELDS = ("prompt_tokens", "prompt_context", "prompt_pairs", "finished_prompts")


@dataclass(frozen=True)
class PassLoad:
    """Totals of one pass over all its micro-batches."""

    decode_sequences: float | np.ndarray = 0.0
    decode_context: float | np.ndarray = 0.0
    """Tokens that the decoding sequences attend to."""
    prompt_tokens: float | np.ndarray = 0.0
    prompt_context: float | np.ndarray = 0.0
    """Tokens of earlier chunks that prompt chunks read again."""
    prompt_pairs: float | np.ndarray = 0.0
    """(query, key) pairs of the prompt chunks, earlier chunks included."""
    finished_prompts: float | np.ndarray = 0.0
    """Sequences whose prompt is complete in this pass: each gives its first token."""

    @property
    def tokens(self) -> np.ndarray:
        """Query tokens."""
        return np.asarray(self.decode_sequences) + np.asarray(self.prompt_tokens)

    @classmethod
    def decode(cls, sequences: float, context: float) -> PassLoad:
        """Every sequence decodes and attends to ``context`` tokens."""
        return cls(decode_sequences=sequences, decode_context=sequences * context)

    @classmethod
    def prefill(cls, sequences: float, chunk: float, before: float = 0.0, finished: bool = True) -> PassLoad:
        """Every sequence brings ``chunk`` prompt tokens after ``before`` earlier ones."""
        pairs = sequences * chunk * (before + (chunk + 1) / 2)
        return cls(0.0, 0.0, sequences * chunk, sequences * before, pairs, sequences if finished else 0.0)

    @classmethod
    def together(cls, loads: Sequence[PassLoad]) -> PassLoad:
        """Single passes as arrays over all of them."""
        return cls(*(np.array([getattr(load, f.name) for load in loads]) for f in fields(cls)))

    def __add__(self, other: PassLoad) -> PassLoad:
        return PassLoad(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def scaled(self, factor: float) -> PassLoad:
        return PassLoad(*(getattr(self, f.name) * factor for f in fields(self)))

    @property
    def size(self) -> int:
        return int(np.size(self.decode_sequences))

    def at(self, index: int) -> PassLoad:
        return PassLoad(*(float(np.broadcast_to(getattr(self, f.name), (self.size,))[index]) for f in fields(self)))


@dataclass(frozen=True)
class Lengths:
    """Means over the sequences of a workload for one chunk size and one number of tokens a pass."""

    prompt: float
    output: float
    prompt_passes: float
    decode_passes: float
    residence: float
    """Passes from admission to the end."""
    context: float
    """Tokens attended to, summed over the decode passes of a sequence."""
    prompt_context: float
    prompt_pairs: float
    reserved: float
    """Cache slots (full pages) of a sequence in flight; the longer a sequence stays, the more often it is met."""

    @classmethod
    def of(cls, workload: Workload, policy: Policy) -> Lengths:
        prompt, output = workload.columns
        chunk = policy.chunk
        chunks = np.ceil(prompt / chunk)
        decodes = output - 1
        stay = chunks + decodes
        slots = np.ceil((prompt + output) / PAGE_TOKENS) * PAGE_TOKENS
        # On average a sequence that grows is met at half of its answer.
        met = np.ceil((prompt + output / 2) / PAGE_TOKENS) * PAGE_TOKENS if workload.grows else slots
        values = {
            "prompt": prompt,
            "output": output,
            "prompt_passes": chunks,
            "decode_passes": decodes,
            "residence": stay,
            "context": decodes * (prompt + output / 2),
            "prompt_context": chunk * chunks * (chunks - 1) / 2,
            "prompt_pairs": prompt * (prompt + 1) / 2,
            "reserved": met * stay / stay.mean(),
        }
        return cls(**dict(zip(values, np.stack(list(values.values())).mean(axis=1).tolist(), strict=True)))


def first_finish(workload: Workload, policy: Policy) -> int:
    """Passes until the first sequence of a job has ended: prompts are read in their order, within the budget of each
    pass."""
    count = min(policy.block_size, workload.num_sequences or policy.block_size)
    prompt, output = workload.columns[:, np.arange(count) % len(workload.lengths)]
    budget = policy.num_gpu_batches * policy.prompt_tokens_per_micro_batch
    begun = np.floor((np.cumsum(prompt) - prompt) / budget)
    return int(np.min(begun + np.ceil(prompt / policy.chunk) + np.ceil(output) - 1))


def reserved_tokens(workload: Workload, policy: Policy) -> float:
    """Cache slots that the pools hold for a sequence of the block, on average: of a job that ends, for its longest
    sequences; where pages are taken as sequences grow, for those that are met."""
    if workload.num_sequences is None or workload.grows:
        return Lengths.of(workload, policy).reserved
    longest = workload.longest_slots
    count = min(1.0, policy.block_size / workload.num_sequences) * len(longest)
    whole = int(count)
    total = float(longest[:whole].sum()) + (count - whole) * float(longest[min(whole, len(longest) - 1)])
    return total / count


def steady_load(workload: Workload, policy: Policy, in_flight: float | None = None) -> tuple[PassLoad, float]:
    """The average pass of a job without end, and how many sequences it finishes.

    The block is full, or the budget of prompt tokens limits admission and it is not.
    """
    lengths = Lengths.of(workload, policy)
    block = policy.block_size if in_flight is None else in_flight
    rate = block / lengths.residence
    rate = min(rate, policy.num_gpu_batches * policy.prompt_tokens_per_micro_batch / lengths.prompt)
    load = PassLoad(
        lengths.decode_passes, lengths.context, lengths.prompt, lengths.prompt_context, lengths.prompt_pairs, 1.0
    )
    return load.scaled(rate), rate


FLUID_BLOCKS = 16
"""Blocks of a job from which its last wave is not looked at: the linear program's phases are means."""
MAX_STAYS = 1024
"""Sequences of a job whose stays in the block are followed, at most: each stands for several of a longer one."""


def stays(workload: Workload, policy: Policy, in_flight: int) -> tuple[float, float, float]:
    """(passes of a finite job, passes of its tail, mean sequences in flight in the tail), where every sequence stays in
    the block for as long as its lengths say and the next takes its slot: what waits for the prompt budget is left out.
    """
    total = workload.num_sequences or 1
    count = min(total, MAX_STAYS)
    prompt, output = workload.columns
    stay = np.ceil(prompt / policy.chunk) + output - 1
    each = np.random.default_rng(0).permutation(((np.arange(count) + 0.5) * len(stay) / count).astype(int))
    slots = max(1, round(in_flight * count / total))
    ends = [0.0] * min(slots, count)
    last = 0.0
    for length in stay[each].tolist():
        last = ends[0]
        heapq.heapreplace(ends, last + length)
    tail = max(ends) - last
    return max(ends), tail, sum(end - last for end in ends) * in_flight / len(ends) / tail if tail else 0.0


def job_phases(workload: Workload, policy: Policy) -> list[tuple[PassLoad, float]]:
    """(average load, number of passes) of the phases of a finite job: fill, full with prompts, full without, the last
    wave, and what the fill has spread.

    With S passes between the first and the last admission of a block, each block takes R passes of residence and the
    job S more.
    """
    assert workload.num_sequences is not None, "a job without end has one phase: steady_load"
    lengths = Lengths.of(workload, policy)
    in_flight = float(min(policy.block_size, workload.num_sequences))
    admitted = policy.num_gpu_batches * policy.prompt_tokens_per_micro_batch / lengths.prompt
    fill = max(in_flight / admitted, lengths.prompt_passes)
    if fill > lengths.residence:
        in_flight, fill = admitted * lengths.residence, lengths.residence
    stagger = fill - lengths.prompt_passes
    blocks = max(1.0, workload.num_sequences / in_flight)
    passes, tail, in_tail = blocks * lengths.residence, 0.0, 0.0
    if blocks < FLUID_BLOCKS:
        passes, tail, in_tail = stays(workload, policy, max(1, round(in_flight)))
    prompts = PassLoad(0.0, 0.0, lengths.prompt, lengths.prompt_context, lengths.prompt_pairs, 1.0).scaled(
        in_flight / fill
    )
    mean_context = lengths.context / lengths.decode_passes if lengths.decode_passes else 0.0
    decoding_in_fill = in_flight * stagger**2 / (2 * fill**2)
    early = lengths.prompt + stagger / 3
    late = lengths.prompt + lengths.output - stagger / 3
    decoding = max(0.0, passes - blocks * fill)
    # The last wave reads its prompts as the others do.
    in_tail_decoding = min(decoding, tail * (1 - fill / lengths.residence)) if tail else 0.0
    phases = [
        (prompts + PassLoad.decode(decoding_in_fill, min(early, mean_context)), fill),
        (prompts + PassLoad.decode(in_flight * stagger / fill, mean_context), (blocks - 1) * fill),
        (PassLoad.decode(in_flight, mean_context), decoding - in_tail_decoding),
        (PassLoad.decode(in_tail, mean_context), in_tail_decoding),
        (PassLoad.decode(in_flight / 2, max(late, mean_context)), stagger),
    ]
    return [(load, count) for load, count in phases if count > 1e-9]
