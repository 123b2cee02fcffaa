"""Latent attention: the oracle against attention over explicit keys and values, and Triton against the oracle."""

from __future__ import annotations

import pytest
import torch

from flexbatch.kernels import attention_reference, latent_reference, reference
from tests.kernels.cases import Case

WIDTH, VALUES = 40, 28
OPTIONS = {
    "decode": ((1, 1, 1), (1, 37, 130), {}),
    "chunks and one without queries": ((5, 0, 40, 1), (37, 5, 90, 18), {}),
    "trees": ((9, 37, 1), (10, 80, 60), {"tree": True}),
    "pages of 1": ((3, 1), (20, 9), {"page_tokens": 1}),
    "8 bits": ((2, 13, 1), (10, 60, 70), {"bits": 8}),
    "4 bits": ((2, 13, 1), (10, 60, 70), {"bits": 4}),
    "half precision, 4 bits": ((2, 13, 1), (10, 60, 70), {"bits": 4, "dtype": torch.float16}),
    "many heads": ((1, 3), (33, 20), {"num_heads": 40}),
}


def build(name: str, device: torch.device | str = "cpu"):
    """Arguments of latent attention, and of attention over the same rows as keys and values; NaN where nobody reads."""
    queries, contexts, options = OPTIONS[name]
    case = Case(queries, contexts, **{"num_heads": 6, "num_kv_heads": 1, "head_dim": WIDTH, "group": 16, **options})
    (query, _, table, starts, lengths), given = case.build()
    random = torch.Generator().manual_seed(5)
    slots = torch.cat([case.slots_of(table[s], context) for s, context in enumerate(contexts)])
    key = torch.randn(len(slots), 1, WIDTH, generator=random).to(case.dtype)
    num_slots = table.numel() * case.page_tokens
    row_bytes = reference.token_bytes(1, WIDTH, case.bits, case.group, case.dtype.itemsize, sides=1)
    rows = torch.full((num_slots, row_bytes), 0xFF, dtype=torch.uint8)
    if case.bits == 16:
        rows = torch.full((num_slots, 1, 1, WIDTH), torch.nan, dtype=case.dtype)
    latent_reference.append_latent_rows(rows, slots, key, case.bits, case.group)
    shared = {name: given[name] for name in ("page_tokens", "scale", "max_query_len")}
    shared |= {name: given[name] for name in ("tree_masks", "positions") if name in given}
    stored = torch.full((num_slots, 2, 1, WIDTH), torch.nan, dtype=case.dtype)
    read = latent_reference.unpack_latent_rows(rows[slots], WIDTH, case.bits, case.group, case.dtype)[:, None]
    reference.append_rows(stored, slots, read, read)
    wanted = attention_reference.paged_attention(query, stored, table, starts, lengths, num_kv_heads=1, **shared)
    latent = {**shared, "bits": case.bits, "group": case.group, "value_dim": VALUES}
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in latent.items()}
    return tuple(x.to(device) for x in (query, rows, table, starts, lengths)), moved, wanted[..., :VALUES]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = 1e-5 if wanted.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(found.cpu(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_latent_is_key_and_value(name, monkeypatch):
    arguments, options, wanted = build(name)
    assert_close(latent_reference.latent_attention(*arguments, **options), wanted)
    monkeypatch.setattr(latent_reference, "MAX_SCORES", 300)  # a few query tokens at a time
    assert_close(latent_reference.latent_attention(*arguments, **options), wanted)


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        *(("decode", 3), ("trees", 1), ("half precision, 4 bits", 1)),
        *(
            pytest.param(name, splits, marks=pytest.mark.slow)
            for name in OPTIONS
            for splits in (1, 3)
            if (name, splits) not in (("decode", 3), ("trees", 1), ("half precision, 4 bits", 1))
        ),
    ],
)
def test_triton(name, splits, device):
    from flexbatch.kernels import latent

    arguments, options, wanted = build(name, device)
    assert_close(latent.latent_attention(*arguments, **options, splits=splits), wanted)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_rows_come_back(bits):
    """One row alone as well: its parameters start anywhere in memory."""
    random = torch.Generator().manual_seed(1)
    key = torch.randn(7, 1, WIDTH, generator=random)
    row_bytes = reference.token_bytes(1, WIDTH, bits, 16, 4, sides=1)
    rows = torch.zeros(9, 1, 1, WIDTH) if bits == 16 else torch.zeros(9, row_bytes, dtype=torch.uint8)
    slots = torch.tensor([3, 0, 8, 5, 1, 2, 7])
    latent_reference.append_latent_rows(rows, slots, key, bits, 16)
    found = latent_reference.unpack_latent_rows(rows[slots], WIDTH, bits, 16, torch.float32)
    wanted = (
        key[:, 0] if bits == 16 else reference.dequantize(*reference.quantize(key[:, 0], bits, 16), WIDTH, bits, 16)
    )
    assert torch.equal(found, wanted)
    one = latent_reference.unpack_latent_rows(rows[5:6], WIDTH, bits, 16, torch.float32)
    assert torch.equal(one[0], wanted[3]) and row_bytes == rows[0].nbytes
