"""Memory of decode passes as CUDA graphs, counted by the engine and the planner alike: a block that is on the GPU whole
launches a pass by one call where there is room for them, and a thousand kernels one by one where there is none."""

from __future__ import annotations

import numpy as np

from flexbatch.policy.limits import LOGITS_CHUNK_BYTES, MAX_GRAPH_SEQUENCES
from flexbatch.policy.policy import Policy

CONTEXT_STEP = 512
"""Tokens. The longest context is rounded up to a multiple; it only decides how a sequence's keys are split over the
chip."""
MAX_GRAPHS = 16
"""Graphs that are kept, at most. A block of 512 sequences has 20 sizes, each with a graph for every 512 tokens of
context."""
RECORDING_PASSES = 8
"""Passes that take as long as recording one more: its layers run, are launched again to be recorded, and the graph is
made; kernels that only this number of sequences needs are compiled, once on a machine."""
PLANNED_GRAPHS = 4
"""Graphs that a plan leaves room for: the sizes of a full block and of its last wave. 541 prompts of Llama-3.2-3B on an
H200 took 27 ms a pass in a block that filled the GPU to the last 13 MiB, where graphs would have taken 11; four of them
take the memory of three of its 185 sequences."""
RECORDED_RANKS = 2
"""Ranks that share every layer and record passes, sums between them included, at most: as many as have done so on GPUs,
where two made 7,683 tok/s of Llama-3-8B instead of 6,160 (two H100). More of them may sum up by other algorithms of
NCCL, in the switch, which nobody has recorded yet: ``python -m benchmark.parallel --graphs-of-ranks 4``."""
LAUNCHES_OF_LAYER, LAUNCHES_OF_EXPERTS, LAUNCH_BYTES = 16, 32, 16 << 10
"""What the driver keeps of a graph: parameters and code of every kernel that it launches, about; of a layer of experts
routing, sorting and counting beside the products."""


def bucket_of(num_sequences: int) -> int:
    """Sequences that a graph is captured for: powers of two up to 32, then multiples of 32."""
    if num_sequences <= 32:
        return 1 << (num_sequences - 1).bit_length()
    return -(-num_sequences // 32) * 32


def sequences_of(sequences: np.ndarray) -> np.ndarray:
    """`bucket_of` of every pass; the mean pass of several may have a part of a sequence."""
    whole = np.maximum(1.0, np.ceil(sequences))
    return np.where(whole <= 32, 2.0 ** np.ceil(np.log2(whole)), np.ceil(whole / 32) * 32)


def wasted_by(bucket: float, covering: float | None) -> float:
    """Passes that a graph of its own would have saved a pass of this bucket, which runs in the one that covers it;
    without any graph, what recording one takes."""
    return RECORDING_PASSES if covering is None else 1 - bucket / covering


def recorded_sequences(sequences: np.ndarray, graphs: np.ndarray) -> np.ndarray:
    """Sequences of the graph that each pass of a job runs in, of those that are ``graphs``, in their order: of the
    least that is there and covers it, until what that computes for nothing has cost as much as a graph of its own.

    At the end of a job most sizes come once or twice, and run in the graph of the full block.
    """
    wanted = np.atleast_1d(np.where(graphs, sequences_of(sequences), 0.0))
    found, there, wasted = wanted.copy(), set[float](), dict[float, float]()
    for index, bucket in enumerate(wanted.tolist()):
        if not bucket or bucket in there:
            continue
        if wasted.get(bucket, 0.0) >= RECORDING_PASSES:
            there.add(bucket)
        covering = min((other for other in there if other >= bucket), default=None)
        wasted[bucket] = wasted.get(bucket, 0.0) + wasted_by(bucket, covering)
        found[index] = covering or bucket
    return found if np.ndim(sequences) else found[0]


def graph_bytes(
    num_layers: int,
    hidden_bytes: int,
    sequences: int,
    longest: int,
    page_tokens: int,
    experts: bool,
    ring: int = 0,
) -> int:
    """The bytes of one graph for up to ``sequences`` whose longest has ``longest`` tokens: the driver's, static inputs
    (page tables above all, those of ``ring`` pages among them), and hidden states."""
    launches = LAUNCHES_OF_LAYER + LAUNCHES_OF_EXPERTS * experts
    bucket = bucket_of(min(sequences, MAX_GRAPH_SEQUENCES))
    pages = -(-longest // CONTEXT_STEP) * CONTEXT_STEP // page_tokens + ring
    return LAUNCH_BYTES * (launches * num_layers + 8) + bucket * (4 * pages + 64 + hidden_bytes)


def graph_pool_bytes(sequences: int, workspace_bytes: int, vocab_size: int, element_bytes: int) -> int:
    """Intermediate results of the largest decode pass: graphs share them, and nothing else does. Workspace of the
    layers, of which one token takes ``workspace_bytes``, and a chunk of logits, as they are multiplied and in
    float32."""
    rows = bucket_of(min(sequences, MAX_GRAPH_SEQUENCES))
    logit_rows = min(rows, max(1, LOGITS_CHUNK_BYTES // (4 * vocab_size)))
    return rows * workspace_bytes + logit_rows * vocab_size * (4 + element_bytes)


def runs_graphs(policy: Policy, device: str, tensor_ranks: int = 1, stages: int = 1) -> bool:
    """Whether decode passes are graphs where everything is on the gpu tier. Stages of a pipeline are none: while one
    waits for rows, another pass is begun."""
    plain = policy.num_gpu_batches == 1 and policy.overlap
    return device == "cuda" and plain and tensor_ranks <= RECORDED_RANKS and stages == 1
