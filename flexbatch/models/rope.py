"""Rotary tables by position, with the context extensions of Hugging Face configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.models.arch import Arch, RopeScaling

BUILT_POSITIONS = 4096


@dataclass(frozen=True)
class RopeTables:
    """Cosines and sines [positions, rotary_dim / 2] in the compute dtype; the local pair is for layers with their
    own base, and the same where none has."""

    cos: Tensor
    sin: Tensor
    local_cos: Tensor
    local_sin: Tensor

    def of(self, arch: Arch, layer: int) -> tuple[Tensor, Tensor]:
        return (self.local_cos, self.local_sin) if arch.uses_local_rope(layer) else (self.cos, self.sin)


def num_tables(arch: Arch) -> int:
    """Cosines and sines, and those of layers with a base of their own; 0 when the model does not rotate."""
    return 0 if arch.position != "rope" else 2 if arch.local_rope_theta is None else 4


def fill_tables(arch: Arch, data: Tensor) -> RopeTables:
    """Fill ``data`` [num_tables, positions, rotary_dim / 2] with the tables of a rotating model for positions 0, 1,
    ...; beside it they take float32 for ``BUILT_POSITIONS`` at a time.

    Two extensions depend on the sequence in transformers, and are functions of the position here, so that tokens depend
    neither on chunking nor on the batch:
    - "dynamic" NTK (the base grows with the sequence) uses the length ``position + 1``. That is what `generate` does
      for one sequence alone, as long as its prompt fits the trained context: every later token is rotated with the
      base of the moment and keeps it in the cache. For longer prompts transformers rotates the whole prompt with the
      base of the prompt's length.
    - "longrope" uses its short factors; `families` limits such a model to its trained context, where transformers
      uses them too.
    """
    bases = [(arch.rope_scaling, arch.rope_theta)]
    if arch.local_rope_theta is not None:
        bases.append((arch.local_rope_scaling, arch.local_rope_theta))
    for start in range(0, data.shape[1], BUILT_POSITIONS):
        positions = range(start, min(start + BUILT_POSITIONS, data.shape[1]))
        for pair, (scaling, theta) in zip(data.split(2), bases, strict=True):
            built = _tables(*_scaled(scaling, theta, arch.rotary_dim, positions), positions)
            for table, part in zip(pair, built, strict=True):
                table[positions.start : positions.stop].copy_(part)
    return RopeTables(data[0], data[1], data[-2], data[-1])


def _frequencies(theta: float | Tensor, dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _tables(frequencies: Tensor, attention_factor: float, positions: range) -> tuple[Tensor, Tensor]:
    """frequencies: [pairs], or [positions, pairs] where they depend on the position."""
    angles = torch.arange(positions.start, positions.stop, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def _scaled(scaling: RopeScaling | None, theta: float, dim: int, positions: range) -> tuple[Tensor, float]:
    """Frequencies after the extension and the factor of the tables."""
    plain = _frequencies(theta, dim)
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        return _dynamic(scaling, theta, dim, positions), 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(scaling, theta, dim)
    if scaling.kind == "longrope":
        factors = torch.tensor(scaling.short_factor, dtype=torch.float32)
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        attention_factor = scaling.attention_factor
        if attention_factor is None:
            attention_factor = (
                1.0
                if scaling.factor <= 1
                else math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_positions))
            )
        return 1.0 / (factors * theta**exponents), attention_factor
    raise ValueError(f"rope scaling {scaling.kind!r} is unknown; known: linear, dynamic, llama3, yarn, longrope")


def _dynamic(scaling: RopeScaling, theta: float, dim: int, positions: range) -> Tensor:
    """[positions, pairs]: position p has the base of a sequence of p + 1 tokens (bloc97's NTK-aware scaling, dynamic
    variant)."""
    seen = torch.arange(positions.start + 1, positions.stop + 1, dtype=torch.float32).clamp(
        min=scaling.original_positions
    )
    growth = (scaling.factor * seen / scaling.original_positions) - (scaling.factor - 1)
    return _frequencies((theta * growth ** (dim / (dim - 2)))[:, None], dim)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated (Llama 3.1 release)."""
    wavelength = 2 * math.pi / plain
    longest = scaling.original_positions / scaling.low_freq_factor
    shortest = scaling.original_positions / scaling.high_freq_factor
    stretched = torch.where(wavelength > longest, plain / scaling.factor, plain)
    smooth = (scaling.original_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, stretched)


def _yarn(scaling: RopeScaling, theta: float, dim: int) -> tuple[Tensor, float]:
    """Frequencies between interpolation and extrapolation by a linear ramp (Peng et al. 2023, "YaRN", section 3)."""

    def pair_of(rotations: float) -> float:
        return dim * math.log(scaling.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp needs a width
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    plain = theta ** (torch.arange(0, dim, 2).float() / dim)
    frequencies = (1.0 / (scaling.factor * plain)) * (1 - keep) + (1.0 / plain) * keep
    attention_factor = scaling.attention_factor
    if attention_factor is None and scaling.mscale and scaling.mscale_all_dim:
        attention_factor = mscale(scaling.factor, scaling.mscale) / mscale(scaling.factor, scaling.mscale_all_dim)
    return frequencies, mscale(scaling.factor) if attention_factor is None else attention_factor
