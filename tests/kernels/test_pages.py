"""Gather, scatter and copy of rows."""

import pytest
import torch

from flexbatch.kernels import reference


@pytest.mark.parametrize(
    ("num_pages", "chosen", "row_bytes"),
    [(9, 5, 4096), (9, 7, 100), (3, 2, 40_000), (5, 5, 33), (200, 150, 16), (4, 0, 64)],
)
def test_gather_and_scatter(num_pages, chosen, row_bytes, device):
    from flexbatch.kernels import pages

    host = torch.randint(0, 255, (num_pages, row_bytes), dtype=torch.uint8)
    host = host.pin_memory() if device.type == "cuda" else host
    ids = torch.randperm(num_pages)[:chosen]
    staging = torch.zeros(chosen, row_bytes, dtype=torch.uint8, device=device)
    pages.gather_pages(host, ids.int().to(device), staging, num_programs=3)
    assert torch.equal(staging.cpu(), host[ids])
    back, wanted = torch.zeros_like(host, pin_memory=host.is_pinned()), torch.zeros_like(host)
    pages.scatter_rows(staging, back, ids.to(device), num_programs=3)
    torch.cuda.synchronize() if device.type == "cuda" else None
    reference.scatter_rows(host[ids], wanted, ids)
    assert torch.equal(back, wanted)


def test_rows_of_many_dimensions_and_a_stride(device):
    from flexbatch.kernels import pages

    layers = torch.randn(6, 3, 2, 4, 5)  # slots x layers x ...: the rows of one layer lie apart
    layers = layers.pin_memory() if device.type == "cuda" else layers
    ids = torch.tensor([4, 1], dtype=torch.int32, device=device)
    staging = torch.zeros(2, 2, 4, 5, device=device)
    pages.gather_pages(layers[:, 1], ids, staging)
    assert torch.equal(staging.cpu(), layers[[4, 1], 1])


@pytest.mark.parametrize(("word", "size"), [(1, 1003), (2, 1010), (4, 404), (8, 70_000)])
@pytest.mark.parametrize("owners", [(), (2,), (0, 1, 3)])
def test_parts_whose_owners_are_wanted(word, size, owners, device):
    """Of every owner two parts, one of them empty for the last; nothing else is written."""
    from flexbatch.kernels import pages

    host = torch.randint(0, 255, (size,), dtype=torch.uint8)
    host = host.pin_memory() if device.type == "cuda" else host
    step = size // 10 // word * word
    parts = torch.tensor([(index % 4, index * step, (index + (index != 7)) * step) for index in range(8)])
    wanted = torch.zeros(4, dtype=torch.bool)
    wanted[list(owners)] = True
    target, expected = (torch.full((size,), 7, dtype=torch.uint8, device=each) for each in (device, "cpu"))
    pages.copy_parts(host, target, parts.to(device), wanted.to(device), word)
    reference.copy_parts(host, expected, parts, wanted)
    assert torch.equal(target.cpu(), expected)
    assert bool(owners) is bool((expected != 7).any())
