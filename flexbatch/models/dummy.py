"""Random weights of any architecture, at the speed of memory: for measurements without a download."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from flexbatch.kernels.mxfp4_reference import VALUES
from flexbatch.models.arch import Arch
from flexbatch.models.quantized.scheme import Form, QuantizedPiece
from flexbatch.models.specs import Piece, WeightSpec, weight_specs

# 8 MB in 16 bits, about the size of a last-level cache; more than one row of any published matrix.
POOL_SIZE = 4_000_000


def dummy(
    arch: Arch,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    formats: Mapping[str, Form] | None = None,
    device: torch.device | None = None,
) -> Iterator[Piece | QuantizedPiece]:
    """Every tensor of the model in the order of a pass, in pieces of at most 2 million numbers. The same seed gives the
    same values. formats: those of ``formats`` that are MXFP4 come so. device: where dense pieces are, the same values
    on each (None: the host).

    Matrices are normal with standard deviation 0.02, those that write into the residual stream 0.02 / sqrt(2 x
    layers) (GPT-2's initialization); norms are normal around one with 0.1, biases around zero with 0.02. The numbers
    are not independent over a whole model: drawing 30 billion of them takes many minutes, so pieces are views of one
    pool of 4 million normal numbers, or twice as many as the largest tensor has, each from a random offset of its own.
    Copy them, never write to them.
    """
    specs = weight_specs(arch)
    size = min(POOL_SIZE, 2 * max(spec.numel for spec in specs))
    normal = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    pools: dict[tuple[float, float], Tensor] = {}
    codes: Tensor | None = None
    for spec in specs:
        scale, center = _distribution(spec, arch)
        form = (formats or {}).get(spec.role)
        if form is not None and form.floats:
            if codes is None:
                codes = torch.randint(256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
            yield from _blocks(codes, spec, form, seed, scale)
            continue
        if (scale, center) not in pools:
            pools[scale, center] = (normal * scale + center).to(dtype).to(device)
        yield from _cut(pools[scale, center], spec, seed)


def _cut(pool: Tensor, spec: WeightSpec, seed: int) -> Iterator[Piece]:
    offsets = random.Random(f"{seed} {spec.layer} {spec.role}")
    row_size = spec.numel // spec.shape[0]
    # Half a pool at a time leaves many offsets to choose from.
    step = max(1, len(pool) // 2 // row_size)
    for first in range(0, spec.shape[0], step):
        count = min(step, spec.shape[0] - first)
        offset = offsets.randint(0, len(pool) - count * row_size)
        values = pool[offset : offset + count * row_size].view(count, *spec.shape[1:])
        yield Piece(spec.layer, spec.role, None if count == spec.shape[0] else slice(first, first + count), values)


def _blocks(codes: Tensor, spec: WeightSpec, form: Form, seed: int, deviation: float) -> Iterator[QuantizedPiece]:
    """Any codes, with the scale that gives them about this standard deviation: without one theirs is that of the 16
    values."""
    spread = math.sqrt(sum(value**2 for value in VALUES) / len(VALUES))
    exponent = 127 + round(math.log2(deviation / spread))
    columns = spec.shape[1]
    for piece in _cut(codes, replace(spec, shape=(spec.shape[0], columns // 2)), seed):
        scales = torch.full((len(piece.tensor), columns // form.group), exponent, dtype=torch.uint8)
        yield QuantizedPiece(spec.layer, spec.role, piece.rows, piece.tensor, scales, *form)


def _distribution(spec: WeightSpec, arch: Arch) -> tuple[float, float]:
    """Standard deviation and mean."""
    if spec.role.endswith("norm.weight"):
        return 0.1, 1.0 - arch.norm_offset
    if spec.role == "o.weight" or spec.role.split(".")[-2:] == ["down", "weight"]:
        return 0.02 * (2 * arch.num_layers) ** -0.5, 0.0
    return 0.02, 0.0
