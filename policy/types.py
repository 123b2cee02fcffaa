"""The vocabulary of placement: splits, policies, workloads and model shapes, as frozen data. Lengths in tokens, sizes in bytes, times in seconds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexbatch.policy.groups import cache_group, weight_group
from flexbatch.policy.rates import Curve, Hardware

__all__ = ["TIERS", "Constraints", "Curve", "Hardware", "ModelShape", "Policy", "Speculation", "Split", "Workload"]

TIERS = ("gpu", "cpu", "disk")


@dataclass(frozen=True)
class Split:
    """Fractions of one kind of tensor on each tier; they sum to 1.

    Raises ValueError when a fraction is negative or the sum is not 1.
    """

    gpu: float
    cpu: float
    disk: float = 0.0

    def __post_init__(self) -> None:
        fractions = (self.gpu, self.cpu, self.disk)
        if min(fractions) < -1e-9 or abs(sum(fractions) - 1.0) > 1e-6:
            raise ValueError(f"a split needs three fractions >= 0 that sum to 1, got gpu={self.gpu:g} cpu={self.cpu:g} disk={self.disk:g}")

    @classmethod
    def from_percent(cls, gpu: float, cpu: float) -> Split:
        """The rest (100 - gpu - cpu) is on disk, as in FlexGen's ``--percent``."""
        if gpu < 0 or cpu < 0 or gpu + cpu > 100 + 1e-6:
            raise ValueError(f"percentages on gpu ({gpu:g}) and cpu ({cpu:g}) must be >= 0 and sum to at most 100; the rest goes to disk")
        return cls(gpu / 100, cpu / 100, max(0.0, 1 - gpu / 100 - cpu / 100))

    @property
    def fractions(self) -> tuple[float, float, float]:
        return (self.gpu, self.cpu, self.disk)


@dataclass(frozen=True)
class Speculation:
    """A token tree for every decoding sequence, and what its draft costs."""

    name: str
    query_tokens: int
    """Nodes of the tree with its root: the query tokens of one sequence in one pass."""
    tokens_per_pass: float
    """Expected committed tokens of one sequence in one pass: the accepted path and one more; 1 to query_tokens."""
    draft_bytes: int = 0
    """Draft weights and workspace, resident on the GPU."""
    draft_token_bytes: int = 0
    """Draft cache of one token over all its layers, resident on the GPU."""
    draft_seconds: float = 0.0
    """Time to draw the trees of one micro-batch; it does not overlap the target's pass."""

    def __post_init__(self) -> None:
        if not 1 <= self.tokens_per_pass <= self.query_tokens:
            raise ValueError(f"speculation {self.name!r}: tokens_per_pass={self.tokens_per_pass:g} must lie between 1 and query_tokens={self.query_tokens}")


@dataclass(frozen=True)
class Policy:
    """Where everything lives and how a pass is cut; the unit the optimizer searches over."""

    weights: Split
    cache: Split
    activations: Split
    gpu_batch_size: int
    """Sequences in one micro-batch."""
    num_gpu_batches: int
    """Micro-batches in one block."""
    weight_bits: int = 16
    cache_bits: int = 16
    cpu_attention: float = 0.0
    """Share of the CPU-resident sequences that is attended where it lies."""
    prefill_chunk: int = 512
    """Prompt tokens that one sequence brings to one pass, at most."""
    overlap: bool = True
    prefill_budget: int = 0
    """Prompt tokens that one micro-batch brings to one pass, at most; 0: every sequence may bring its chunk."""
    speculation: Speculation | None = None

    @property
    def block_size(self) -> int:
        """Sequences in flight together."""
        return self.gpu_batch_size * self.num_gpu_batches

    @property
    def percent(self) -> tuple[float, float, float, float, float, float]:
        """FlexGen's six numbers: weights, cache and activations on GPU and on CPU, in per cent."""
        w, c, a = self.weights, self.cache, self.activations
        return (100 * w.gpu, 100 * w.cpu, 100 * c.gpu, 100 * c.cpu, 100 * a.gpu, 100 * a.cpu)

    @property
    def prompt_tokens_per_micro_batch(self) -> int:
        """Prompt tokens of one micro-batch in one pass, at most."""
        unlimited = self.gpu_batch_size * self.prefill_chunk
        return min(unlimited, self.prefill_budget) if self.prefill_budget else unlimited

    @property
    def chunk(self) -> int:
        """Prompt tokens that one sequence really brings to one pass: its chunk, inside its micro-batch's budget."""
        return min(self.prefill_chunk, self.prefill_budget) if self.prefill_budget else self.prefill_chunk

    @property
    def num_weight_slabs(self) -> int:
        """Working slabs for the layers that are on their way.

        Two, or three with CPU attention over several micro-batches: the second half of a layer's last tick then runs in the next layer, and with two slabs
        the link would stand still until it is done (OPT-30B, 16-bit weights, prompts in the pass: 20.4 ms a layer, of which the link used 15).
        """
        return 3 if self.overlap and self.cpu_attention > 0 and self.num_gpu_batches > 1 else 2

    @property
    def query_tokens(self) -> int:
        """Query tokens of a sequence that decodes: 1, or the nodes of its tree."""
        return self.speculation.query_tokens if self.speculation else 1

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a decoding sequence gains in a pass."""
        return self.speculation.tokens_per_pass if self.speculation else 1.0


@dataclass(frozen=True)
class Workload:
    """The lengths of the sequences of a job, as equally likely (prompt tokens, generated tokens) pairs.

    ``num_sequences`` None stands for a job without end: only the steady state counts.
    """

    lengths: tuple[tuple[float, float], ...]
    num_sequences: int | None = None

    MAX_PAIRS = 256

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("a workload needs at least one pair of lengths")
        for prompt, output in self.lengths:
            if prompt < 1 or output < 1:
                raise ValueError(f"lengths must be at least 1, got prompt={prompt:g} output={output:g}")
        if self.num_sequences is not None and self.num_sequences < 1:
            raise ValueError(f"num_sequences={self.num_sequences} must be at least 1")

    @functools.cached_property
    def columns(self) -> np.ndarray:
        """[2, sequences]: prompt and generated tokens. A search asks for it thousands of times."""
        columns = np.array(self.lengths).T
        columns.flags.writeable = False
        return columns

    @functools.cached_property
    def longest_prompt(self) -> float:
        return max(prompt for prompt, _ in self.lengths)

    @functools.cached_property
    def mean_output(self) -> float:
        return sum(output for _, output in self.lengths) / len(self.lengths)

    @classmethod
    def uniform(cls, prompt_tokens: int, output_tokens: int, num_sequences: int | None = None) -> Workload:
        return cls(((float(prompt_tokens), float(output_tokens)),), num_sequences)

    @classmethod
    def from_lengths(cls, prompts: Sequence[int], outputs: Sequence[int], num_sequences: int | None = None) -> Workload:
        """From the actual prompts; beyond MAX_PAIRS, pairs of similar total length are merged into their mean, which keeps the sums."""
        pairs = sorted(zip(prompts, outputs, strict=True), key=sum)
        count = len(pairs)
        if count > cls.MAX_PAIRS:
            cuts = [count * i // cls.MAX_PAIRS for i in range(cls.MAX_PAIRS + 1)]
            pairs = [tuple(sum(column) / (end - begin) for column in zip(*pairs[begin:end], strict=True)) for begin, end in itertools.pairwise(cuts)]
        return cls(tuple((float(p), float(o)) for p, o in pairs), num_sequences or count)

    @classmethod
    def from_quantiles(cls, prompt_quantiles: Iterable[float], output_quantiles: Iterable[float], num_sequences: int | None = None) -> Workload:
        """Every prompt quantile with every output quantile: the two lengths are taken as independent."""
        outputs = tuple(output_quantiles)
        return cls(tuple((float(p), float(o)) for p in prompt_quantiles for o in outputs), num_sequences)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that the cost needs; ``*_tensors`` are elements of each tensor, in the order in which they are placed."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    block_tensors: tuple[int, ...]
    """Tensors of one layer."""
    head_tensors: tuple[int, ...]
    """What the head ships: final norm and output matrix, also when that matrix is the embedding table."""
    embedding_tensors: tuple[int, ...]
    """Tables that stay where they live; empty where the head's matrix is the table."""
    mlp_matrices: int = 2
    element_bytes: int = 2
    stored_block_bytes: tuple[int, ...] = ()
    """Bytes of each of ``block_tensors`` in a checkpoint that is quantised already, whatever its bits and groups; empty: the policy's bits decide."""

    @classmethod
    def from_sizes(
        cls,
        name: str,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        vocab_size: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mlp_matrices: int = 2,
        tied: bool = False,
        positions: int = 0,
        element_bytes: int = 2,
    ) -> ModelShape:
        """A dense decoder; biases and norms are left out (under 0.1 % of the elements). ``positions``: rows of a learned position table."""
        kv_heads, dim = num_kv_heads or num_heads, head_dim or hidden_size // num_heads
        block = (
            hidden_size * (num_heads + 2 * kv_heads) * dim,
            num_heads * dim * hidden_size,
            hidden_size * intermediate_size * (mlp_matrices - 1),
            hidden_size * intermediate_size,
        )
        table = vocab_size * hidden_size
        embedding = (() if tied else (table,)) + ((positions * hidden_size,) if positions else ())
        return cls(
            name, num_layers, hidden_size, num_heads, kv_heads, dim, intermediate_size, vocab_size, block, (table,), embedding, mlp_matrices, element_bytes
        )

    @classmethod
    def from_dict(cls, data: dict) -> ModelShape:
        """From a shape JSON: the fields of this class, or the arguments of `from_sizes`."""
        if "block_tensors" not in data:
            return cls.from_sizes(**data)
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        return cls(**fields)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def weight_bytes(self, elements: int, bits: int) -> int:
        """Bytes of ``elements`` weights at ``bits``: codes and one (scale, minimum) pair a group."""
        if bits == 16:
            return elements * self.element_bytes
        return math.ceil(elements * bits / 8) + math.ceil(elements / weight_group(self.hidden_size)) * 2 * self.element_bytes

    def token_bytes(self, bits: int) -> int:
        """Bytes of one token row of the cache of one layer, keys and values."""
        if bits == 16:
            return 2 * self.num_kv_heads * self.head_dim * self.element_bytes
        used = 2 * self.num_kv_heads * (math.ceil(self.head_dim * bits / 8) + math.ceil(self.head_dim / cache_group(self.head_dim)) * 2 * self.element_bytes)
        return math.ceil(used / 16) * 16  # quantised rows are padded to what a 16-byte load wants

    def block_tensor_bytes(self, bits: int) -> tuple[int, ...]:
        """Each tensor of one layer as it is stored."""
        plain = tuple(self.weight_bytes(elements, bits) for elements in self.block_tensors)
        return self.stored_block_bytes or plain if bits != 16 else plain

    def block_bytes(self, bits: int) -> int:
        return sum(self.block_tensor_bytes(bits))

    @property
    def block_elements(self) -> int:
        return sum(self.block_tensors)

    @property
    def head_elements(self) -> int:
        return sum(self.head_tensors)

    @property
    def total_elements(self) -> int:
        return self.num_layers * self.block_elements + self.head_elements + sum(self.embedding_tensors)

    def total_bytes(self, bits: int) -> int:
        """All weights as they are stored: blocks at ``bits``, head and tables at 16 bits whatever the blocks have."""
        outside = self.weight_bytes(self.head_elements + sum(self.embedding_tensors), 16)
        return self.num_layers * self.block_bytes(bits) + outside

    def largest_layer_bytes(self, bits: int) -> int:
        """Of the largest layer as it is stored, the head included: the working slab is sized by it."""
        return max(self.block_bytes(bits), self.weight_bytes(self.head_elements, 16))

    @property
    def hidden_bytes(self) -> int:
        """Of one token's hidden state."""
        return self.hidden_size * self.element_bytes

    @property
    def peak_workspace_bytes(self) -> int:
        """What the engine keeps free for one token inside a layer: hidden states, projections and MLP with their copies."""
        projections = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return (6 * self.hidden_size + 2 * projections + 3 * self.intermediate_size) * self.element_bytes

    @property
    def workspace_bytes(self) -> int:
        """GPU workspace of one token inside a layer: residual, normed input, the larger of attention's and the MLP's intermediates, output."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        mlp = self.mlp_matrices * self.intermediate_size
        return (3 * self.hidden_size + max(attention, mlp)) * self.element_bytes


@dataclass(frozen=True)
class Constraints:
    """What the user fixed; None leaves the choice to the optimizer. Memory budgets replace the machine's, in bytes."""

    percent: tuple[float | None, ...] | None = None
    """FlexGen's six numbers, each of which may be None."""
    gpu_batch_size: int | None = None
    num_gpu_batches: int | None = None
    cpu_attention: float | None = None
    prefill_chunk: int | None = None
    prefill_budget: int | None = None
    weight_bits: tuple[int, ...] = (16,)
    """Bits the user allows: quality is the user's choice."""
    cache_bits: tuple[int, ...] = (16,)
    overlap: bool = True
    speculations: tuple[Speculation | None, ...] = (None,)
    """Trees to choose from; None stands for plain decoding."""
    gpu_memory: int | None = None
    cpu_memory: int | None = None
    disk: int | None = None

    def __post_init__(self) -> None:
        if self.percent is not None and len(self.percent) != 6:
            raise ValueError(f"percent needs six numbers (or None) for weights, cache and activations on GPU and CPU, got {len(self.percent)}")
        if self.cpu_attention is not None and not 0 <= self.cpu_attention <= 1:
            raise ValueError(f"cpu_attention={self.cpu_attention} must be between 0 and 1")
        for bits in self.weight_bits + self.cache_bits:
            if bits not in (16, 8, 4):
                raise ValueError(f"bits={bits} must be 16, 8 or 4")
