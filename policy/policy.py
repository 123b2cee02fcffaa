"""The vocabulary of placement: splits, policies, workloads and model shapes, as frozen data. Lengths in tokens,
sizes in bytes, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from flexbatch.policy.percent import checked_pair, checked_percent

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
            raise ValueError(
                f"a split needs three fractions >= 0 that sum to 1, got gpu={self.gpu:g} cpu={self.cpu:g} "
                f"disk={self.disk:g}"
            )

    @classmethod
    def from_percent(cls, gpu: float, cpu: float) -> Split:
        """The rest (100 - gpu - cpu) is on disk, as in FlexGen's ``--percent``."""
        on_gpu, on_cpu = (share or 0.0 for share in checked_pair(gpu, cpu))
        return cls(on_gpu / 100, on_cpu / 100, max(0.0, 1 - on_gpu / 100 - on_cpu / 100))

    @property
    def fractions(self) -> tuple[float, float, float]:
        return (self.gpu, self.cpu, self.disk)


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
    cpu_experts: float = 0.0
    """Share of the experts in host memory that the CPU computes there, of passes in which they have few tokens."""
    prefill_chunk: int = 512
    """Prompt tokens that one sequence brings to one pass, at most."""
    overlap: bool = True
    async_scheduling: bool = True
    """Whether passes that lie on one GPU whole are composed and launched while the one before runs."""
    prefill_budget: int = 0
    """Prompt tokens that one micro-batch brings to one pass, at most; 0: every sequence may bring its chunk."""
    piece_tokens: int = 0
    """Tokens of the largest pass with prompts that runs in pieces, where everything is on the GPU; 0: none does."""
    admission_passes: int = 1
    """From one round of admission that filled the block to the next, at least: see `rounds.Rounds`."""
    few_in_codes: bool = True
    """Whether few tokens are multiplied with the dense quantized matrices as they are stored (see
    `expansion.in_codes`), or like many with what these are expanded to, once a layer of a pass: see `code_choice`."""

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

        Two, or three with CPU attention or CPU experts over several micro-batches: the second half of a layer's last
        tick then runs in the next layer, and with two slabs the link would stand still until it is done (OPT-30B,
        16-bit weights, prompts in the pass: 20.4 ms a layer, of which the link used 15).
        """
        with_cpu = self.cpu_attention > 0 or self.cpu_experts > 0
        return 3 if self.overlap and with_cpu and self.num_gpu_batches > 1 else 2


@dataclass(frozen=True)
class Constraints:
    """What the user fixed; None leaves the choice to the optimizer. Memory budgets replace the machine's, in bytes."""

    percent: tuple[float | None, ...] | None = None
    """FlexGen's six numbers, each of which may be None."""
    gpu_batch_size: int | None = None
    num_gpu_batches: int | None = None
    cpu_attention: float | None = None
    cpu_experts: float | None = None
    prefill_chunk: int | None = None
    prefill_budget: int | None = None
    weight_bits: tuple[int, ...] = (16,)
    """Bits the user allows: quality is the user's choice."""
    cache_bits: tuple[int, ...] = (16,)
    overlap: bool = True
    async_scheduling: bool = True
    piece_tokens: int = 0
    gpu_memory: int | None = None
    cpu_memory: int | None = None
    disk: int | None = None

    def __post_init__(self) -> None:
        if self.percent is not None:
            object.__setattr__(self, "percent", checked_percent(self.percent))
        if self.cpu_attention is not None and not 0 <= self.cpu_attention <= 1:
            raise ValueError(f"cpu_attention={self.cpu_attention} must be between 0 and 1")
        if self.cpu_experts is not None and not 0 <= self.cpu_experts <= 1:
            raise ValueError(f"cpu_experts={self.cpu_experts} must be between 0 and 1")
        for bits in self.weight_bits + self.cache_bits:
            if bits not in (16, 8, 4):
                raise ValueError(f"bits={bits} must be 16, 8 or 4")
