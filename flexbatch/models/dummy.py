"""Random weights of any architecture, at the speed of memory: for measurements without a download."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from flexbatch.models.arch import Arch
from flexbatch.models.specs import Piece, WeightSpec, weight_specs

# A prime, so that rows of no matrix start at the same place of the pool; 8 MB in 16 bits, about the size of a last-level cache.
POOL_SIZE = 4_000_037


def dummy(arch: Arch, seed: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[Piece]:
    """Every tensor of the model, one piece each, in the order of a pass. The same seed gives the same values whatever else was drawn.

    Matrices are normal with standard deviation 0.02, those that write into the residual stream 0.02 / sqrt(2 x layers) (GPT-2's initialisation);
    norms are normal around one with 0.1, biases around zero with 0.02. The numbers are not independent over a whole model: drawing 30 billion of them
    takes many minutes, so every tensor reads one pool of 4 million normal numbers round and round, from a place of its own.
    """
    normal = torch.randn(POOL_SIZE, generator=torch.Generator().manual_seed(seed))
    pools: dict[tuple[float, float], Tensor] = {}
    for spec in weight_specs(arch):
        scale, centre = _distribution(spec, arch)
        if (scale, centre) not in pools:
            pools[scale, centre] = (normal * scale + centre).to(dtype)
        yield Piece(spec.layer, spec.role, None, _fill(pools[scale, centre], spec, seed))


def _fill(pool: Tensor, spec: WeightSpec, seed: int) -> Tensor:
    out = torch.empty(spec.numel, dtype=pool.dtype)
    place = zlib.crc32(f"{seed} {spec.layer} {spec.role}".encode()) % POOL_SIZE
    start = 0
    while start < spec.numel:
        count = min(POOL_SIZE - place, spec.numel - start)
        out[start : start + count].copy_(pool[place : place + count])
        start, place = start + count, 0
    return out.view(spec.shape)


def _distribution(spec: WeightSpec, arch: Arch) -> tuple[float, float]:
    """Standard deviation and mean."""
    if spec.role.endswith("norm.weight"):
        return 0.1, 1.0 - arch.norm_offset
    if spec.role in ("o.weight", "down.weight"):
        return 0.02 * (2 * arch.num_layers) ** -0.5, 0.0
    return 0.02, 0.0
