"""Plain-torch oracle of MXFP4 (Open Compute Project 2023, "OCP Microscaling Formats (MX) Specification", sections 5.3.3
and 5.4.1): blocks of 32 neighboring inputs in floats of 4 bits that share a power of two.

Two codes a byte, the first in the low half. A code is a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6; a scale of s is
2^(s - 127), and 255 none. So a weight has at most two significant bits, and bfloat16 holds all of them exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Inputs that share a scale."""
NO_SCALE = 255
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def expand(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., size] in ``dtype``. codes: [..., size / 2] uint8; scales: [..., size / 32] uint8."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], device=codes.device)
    values = table[torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2).int()]
    exponents = scales.repeat_interleave(BLOCK, dim=-1).int() - 127
    # In two steps: 2^-127 is no normal float32, and what computes powers of two may take it for zero.
    half = exponents // 2
    return (values * torch.exp2(half.float()) * torch.exp2((exponents - half).float())).to(dtype)
