"""Every size that the engine and the planner both count, defined once."""

from __future__ import annotations

import math

PAGE_TOKENS = 16
"""Tokens of a page of the KV cache."""
LOOKAHEAD_TOKENS = 16
"""Tokens for which every sequence that runs has pages in sight when one is admitted, whatever is expected: nobody that
has come back steps aside again within as many passes."""
RESERVED_DEVIATIONS = 1.0
"""Standard deviations of the sum of all answers in flight that are reserved beyond its mean."""
MAX_PREFILL_CHUNK = 2048
"""Prompt tokens that one sequence brings to one pass where the user sets no chunk."""
MAX_MICRO_BATCH_TOKENS = 8192
"""Prompt tokens of a micro-batch in a pass where the policy sets no budget: compute is efficient from 1,024 on, and its
workspace grows with them."""
LOGITS_CHUNK_BYTES = 64 << 20
"""float32 logits that exist at one time, at most: the rows of a long prompt go through the head in chunks."""
MIN_LOGIT_ROWS = 64
"""Rows of scored prompts that go through the head together, however small the micro-batch: fewer would read the head's
weights too often."""
SAMPLING_CHUNK_LOGITS = 1 << 23
"""Logits that are sampled from at one time: 65 rows of Llama 3. Each time takes the host 1.5 ms of launches; with a
quarter of that, 1,000 rows took it 119 ms a pass."""
SAMPLING_BYTES_PER_LOGIT = 40
"""Workspace of each of them, at most, beside the logits themselves: top-p sorts (12 bytes) and adds up in float64 (16),
noise is made of 64-bit words."""
INPUT_BUFFER_BYTES = 8 << 20
"""One of two pinned buffers for the inputs of a pass: 8 MiB hold the page tables, slots and masks of 100,000 query
tokens; what does not fit goes by the copy engine."""
CPU_ATTENTION_MAX_TREE_TOKENS = 32
"""The CPU attends single tokens and trees of no more query tokens than this. Larger trees, and prompts however
short, are attended on the compute device: their attention is bound by compute, which the host is 100 times slower
at. A chunk of 16 prompt tokens held an H200's host for 1.3 ms a layer, as long as single tokens of 130 sequences of
Llama-3-8B."""
MAX_GRAPH_SEQUENCES = 1024
"""Sequences of the largest decode pass that is captured as a CUDA graph. Passes of 1,000 sequences of Llama-3-8B took
an H200 38 ms, and its host 57 ms to launch kernel by kernel."""
MAX_PIECE_TOKENS = 8192
"""Tokens of the largest pass with prompts that runs in pieces, whatever the settings say: a GPU computes more of them
for longer than any host launches."""
CODED_TOKENS, CODED_PASS_TOKENS = 128, 256
"""Tokens of a micro-batch that a GPU multiplies with quantized matrices as they are stored, at most, and those of a
pass, however many micro-batches it has: of more, faster products make up for what expanding a layer costs once. A
layer of Llama-3-8B with 4 bits takes an H100 148, 212, 312 and 548 us for 64, 128, 256 and 512 tokens where expanding
it first takes 368, 380, 405 and 491."""
DECODING_APART = 32
"""Sequences that decode, from which on attention is launched for them apart from prompts. With fewer the second
launch, which takes the host 50 us a layer, costs more than their keys."""
DISK_ALIGNMENT = 4096
"""Bytes at multiples of which everything on the disk tier begins, as direct transfers need it."""
DISK_THREADS = 4
"""Requests that the disk's transfer queue has under way together."""
MIN_GROUP, MAX_GROUP = 16, 64
"""Elements that share a scale and a minimum where weights or cache are quantized."""


def _bounded_group(elements: int) -> int:
    """The power of two at or below ``elements``, within the bounds: kernels divide by it and read its codes in whole
    bytes."""
    return max(MIN_GROUP, min(MAX_GROUP, 1 << max(0, elements.bit_length() - 1)))


def weight_group(hidden_size: int) -> int:
    """Inputs of a matrix that share a scale: 64 from 2,048 wide models on, 32 from 1,024, else 16. Small models feel
    the error of large groups, and not the bytes of small ones."""
    return _bounded_group(hidden_size // 32)


def cache_group(head_dim: int) -> int:
    """Elements of a head that share a scale: two groups a head, of 64 at most. Keys have a few channels far larger
    than the rest (docs/compression.md)."""
    return _bounded_group(head_dim // 2)


def workspace_elements(
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    routed: int = 0,
    head_width: int = 0,
) -> int:
    """What the engine keeps free for one token inside a layer: hidden states, projections and MLP with their copies.
    routed: what a layer of experts takes in the place of the MLP (`expert_workspace_elements`). head_width:
    elements of a head's query and value beside those in the space of a latent."""
    projections = (num_heads + 2 * num_kv_heads) * head_dim + num_heads * head_width
    return 6 * hidden_size + 2 * projections + max(3 * intermediate_size, routed)


def expert_workspace_elements(hidden_size: int, top_k: int, width: int, shared_width: int = 0) -> int:
    """What a token takes inside a layer of experts: its inputs and outputs gathered and scattered once for each of its
    ``top_k`` experts, gate and up likewise, and the shared MLP beside them."""
    return top_k * (2 * hidden_size + 4 * width) + 3 * shared_width


EXPERT_UNITS = 8
"""Parts that the experts of a layer are placed in, at most. Each is one tensor for gate and up and one for down: finer
parts meet a split more closely than a layer's share of the model already does, and cost a file and a launch each."""


EXPERT_TILES = (16, 32, 64, 128)
"""Rows that are multiplied with a block of an expert's weights together: the least of these that the mean expert's
fit."""


CPU_EXPERT_ROWS = 256
"""Rows that an expert is given in a pass of which the CPU computes experts, in the mean of all experts, at most. With
more the products take the time, not the weights' bytes, and the link brings the weights sooner; without AMX that is so
from an eighth of them on, which plans know by what was measured."""


def cpu_expert_tokens(count: int, top_k: int, decoding: int) -> int:
    """Tokens of a micro-batch of which the CPU computes experts, at most: twice as many as of a full one without
    prompts, ``decoding``. Buffers for all that prompts bring would take the memory of sequences."""
    return min(2 * decoding, CPU_EXPERT_ROWS * count // top_k)


HIT_SHARE = 0.7
"""Of a layer's experts that a pass is likely to need, up to which only these cross the link. Nothing hides their copy,
as it waits for the router, and a kernel makes it, which is slower than the copy engine."""


def hit_expert_tokens(count: int, top_k: int) -> int:
    """Tokens of a pass that brings only the experts that they hit, at most: 18 at 8 of 128, 4 at 2 of 8."""
    if top_k == count:
        return 0
    return int(math.log(1 - HIT_SHARE) / math.log(1 - top_k / count))


NUM_EXPERT_BUFFERS = 3
"""Of routed rows: two micro-batches are with the CPU's experts at a time, and one more is on its way back."""
EXPERT_INDEX = 2
"""Numbers of 64 bits that the index of a routed row takes: with one, rows would be too short for the kernel that brings
them to the device past the copy engine."""


def expert_buffer_bytes(tokens: float, hidden: int, top_k: int, element_bytes: int) -> int:
    """A buffer of so many tokens: hidden states, choices and what they count, and a result with its index for each; and
    what aligns these five to 16 bytes."""
    each = hidden * element_bytes + top_k * (8 + 4 + hidden * element_bytes + 8 * EXPERT_INDEX)
    return int(tokens * each) + 5 * 16


def expert_scratch_bytes(hidden: int, top_k: int, width: int) -> int:
    """What the CPU's experts take of memory for one token beside that, in float32."""
    return 4 * top_k * sum(-(-size // 16) * 16 for size in (hidden, width))


def units_of_experts(count: int) -> list[tuple[int, int]]:
    """(first expert, number of experts) of the parts of ``count`` experts; the last may be smaller."""
    size = -(-count // EXPERT_UNITS)
    return [(first, min(size, count - first)) for first in range(0, count, size)]
