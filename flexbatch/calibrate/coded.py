"""How fast this machine's processor multiplies with weights in codes, as the engine does: FLOP/s by bits and tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbatch.calibrate.fits import fit_curve
from flexbatch.calibrate.links import Timer
from flexbatch.kernels import native_coded, ops, reference
from flexbatch.kernels.coded_matrix import CodedMatrix
from flexbatch.policy.curve import Curve

ROWS, COLUMNS, GROUP = 4096, 2048, 64
"""More than a core's own caches hold, at 4 bits too."""
TOKENS = (1, 4, 16, 64, 256)
SECONDS = 0.05
"""Of a measurement."""


def coded_curves(dtype: torch.dtype) -> dict[str, Curve]:
    """Fields of `policy.hardware.Hardware`; none where there are no compiled kernels."""
    curves: dict[str, Curve] = {}
    if not native_coded.most_tokens(dtype):
        return curves
    timer = Timer(torch.device("cpu"), SECONDS)
    for bits in (8, 4):
        codes = torch.randint(256, (ROWS, reference.code_bytes(COLUMNS, bits)), dtype=torch.uint8)
        parameters = torch.full((ROWS, reference.num_groups(COLUMNS, GROUP), 2), 2.0**-8, dtype=dtype)
        matrix = CodedMatrix(codes, parameters, bits, GROUP)
        rates = [2 * count * ROWS * COLUMNS / timer(product(count, matrix, dtype)) for count in TOKENS]
        curves[f"coded_{bits}"], _ = fit_curve(TOKENS, rates)
    return curves


def product(tokens: int, matrix: CodedMatrix, dtype: torch.dtype) -> Callable[[], Tensor]:
    """What a layer of the engine does for so many tokens of a micro-batch."""
    x = torch.randn(tokens, matrix.columns).to(dtype)
    if tokens <= native_coded.most_tokens(dtype):
        return lambda: ops.linear(x, matrix)
    dense = torch.empty(len(matrix.codes), matrix.columns, dtype=dtype)
    form = matrix.columns, matrix.bits, matrix.group
    return lambda: F.linear(x, ops.dequantize(matrix.codes, matrix.parameters, *form, out=dense))
