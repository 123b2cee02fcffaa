"""The vocabulary of placement: splits, policies, hardware, workloads and model shapes, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def block_size(self) -> int:
        """Sequences in flight together."""
        return self.gpu_batch_size * self.num_gpu_batches

    @property
    def percent(self) -> tuple[float, float, float, float, float, float]:
        """FlexGen's six numbers: weights, cache and activations on GPU and on CPU, in per cent."""
        w, c, a = self.weights, self.cache, self.activations
        return (100 * w.gpu, 100 * w.cpu, 100 * c.gpu, 100 * c.cpu, 100 * a.gpu, 100 * a.cpu)
