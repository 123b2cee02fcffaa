"""MXFP4 to numbers: the oracle against every code and scale there is, Triton against the oracle, bit for bit."""

from __future__ import annotations

import pytest
import torch

from flexbatch.kernels import mxfp4_reference, ops
from tests.mxfp4_writer import LEVELS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def everything() -> tuple[torch.Tensor, torch.Tensor]:
    """Every scale but that of no number, with every pair of codes."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(255).view(255, 256)
    return codes, torch.arange(255, dtype=torch.uint8)[:, None].expand(-1, 16).contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_and_scale(dtype):
    """In float64, then rounded once: bfloat16 loses nothing of what it has the range for."""
    codes, scales = everything()
    found = mxfp4_reference.expand(codes, scales, dtype)
    values = torch.cat([LEVELS, -LEVELS]).double()
    for byte in (0x00, 0x12, 0x7F, 0x80, 0x9A, 0xF8):
        pair = torch.stack([values[byte & 15], values[byte >> 4]]) * 2.0 ** (scales[:, :1].double() - 127)
        assert torch.equal(found[:, 2 * byte : 2 * byte + 2], pair.to(torch.float32).to(dtype))
    if dtype == torch.bfloat16:
        assert torch.equal(found.float(), mxfp4_reference.expand(codes, scales, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_triton(rows, dtype, device):
    """With a last tile that is not full, and rows that a tile holds several of."""
    from flexbatch.kernels import mxfp4

    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(256, (2, rows, 1248), generator=generator, dtype=torch.uint8)
    scales = torch.randint(255, (2, rows, 78), generator=generator, dtype=torch.uint8)
    scales[0, 0, :3] = torch.tensor([0, 1, 254])
    if dtype == torch.bfloat16:  # the interpreter rounds the smallest and the largest of them otherwise than a GPU
        scales.clamp_(16, 240)
    wanted = mxfp4_reference.expand(codes, scales, dtype)
    assert torch.equal(mxfp4.expand(codes.to(device), scales.to(device), dtype).cpu(), wanted)
    out = torch.full(wanted.shape, torch.nan, dtype=dtype, device=device)
    assert mxfp4.expand(codes.to(device), scales.to(device), dtype, out) is out and torch.equal(out.cpu(), wanted)


def test_ops_write_where_they_are_told():
    codes, scales = everything()
    out = torch.empty(255, 512)
    assert ops.expand_mxfp4(codes, scales, torch.float32, out) is out
    assert torch.equal(out, ops.expand_mxfp4(codes, scales, torch.float32))
