"""Every type of blocks against the package gguf bit for bit: as numbers, and as codes of the stores that hold them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import example, given
from hypothesis import strategies as st

from flexbatch.kernels import ops, reference
from flexbatch.models.gguf import blocks
from flexbatch.models.gguf.header import read_header

TYPES = (*blocks.FLOATS, *blocks.CODE_BITS, *blocks.EXPANDED)
NAMED = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
)
ROWS, COLUMNS = 7, 512


def random_blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Any bytes are blocks; the scales at their ends are made finite, because NaN equals nothing."""
    elements, width = blocks.block_sizes(kind)
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns // elements, width), dtype=np.uint8)
    for start in (*range(0, width, 2),) if kind not in ("F32", "BF16", "MXFP4") else ():
        # A float16 of exponent 31 is infinite or NaN: any two bytes may be a scale.
        raw[..., start + 1] &= 0xBB if kind not in blocks.CODE_BITS or start < 4 else 0xFF
    if kind in ("F32", "BF16"):
        raw[..., -1] &= 0xBF
    if kind == "MXFP4":
        raw[..., 0] %= 200
    return raw.reshape(rows, -1)


def write(path: Path, kind: str, raw: np.ndarray) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("first", np.ones(5, np.float32))
    writer.add_tensor("matrix", raw, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bits_of(values: torch.Tensor | np.ndarray) -> torch.Tensor:
    return torch.as_tensor(values).contiguous().view(torch.int32)


def test_every_type_that_files_have_is_read() -> None:
    assert set(NAMED) <= set(blocks.type_names().values())


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_equal_the_package_bit_for_bit(kind: str, tmp_path: Path) -> None:
    raw = random_blocks(kind, ROWS, COLUMNS, seed=len(kind))
    write(tmp_path / "x.gguf", kind, raw)
    stored = read_header(tmp_path / "x.gguf").tensors["matrix"]
    assert (stored.shape, stored.dtype) == ((ROWS, COLUMNS), kind)
    wanted = gguf.quants.dequantize(raw, GGMLQuantizationType[kind])
    whole = blocks.numbers(blocks.raw_rows(stored, 0, ROWS), kind).float()
    assert whole.std() > 0
    assert torch.equal(bits_of(whole), bits_of(wanted))
    assert torch.equal(bits_of(blocks.numbers(blocks.raw_rows(stored, 3, 5), kind).float()), bits_of(wanted[3:5]))


@pytest.mark.parametrize(
    "kind, bits", [(kind, bits) for kind, least in blocks.CODE_BITS.items() for bits in {least, 8}]
)
@given(seed=st.integers(0, 2**32 - 1))
@example(seed=0)
def test_stores_hold_what_the_file_does(kind: str, bits: int, seed: int) -> None:
    """In float32 the package's numbers, and in float16 these rounded: by the oracle, and by the kernel of a CPU."""
    raw = random_blocks(kind, ROWS, 64, seed)
    codes, parameters = blocks.codes_and_parameters(raw, kind, bits)
    wanted = torch.as_tensor(gguf.quants.dequantize(raw, GGMLQuantizationType[kind]))
    assert codes.shape == (ROWS, 64 * bits // 8) and parameters.shape == (ROWS, 64 // blocks.GROUP, 2)
    for dequantize in (reference.dequantize, ops.dequantize):
        held = dequantize(codes, parameters, 64, bits, blocks.GROUP)
        assert torch.equal(held, wanted)  # -0 is 0
        assert torch.equal(bits_of(held)[wanted != 0], bits_of(wanted)[wanted != 0])
    kept = parameters.half()
    small = kept.isfinite().all(-1).repeat_interleave(blocks.GROUP, -1)
    assert torch.equal(kept.float()[kept.isfinite()], parameters[kept.isfinite()]), "a float16 holds the parameters"
    assert torch.equal(reference.dequantize(codes, kept, 64, bits, blocks.GROUP)[small], wanted.half()[small])
