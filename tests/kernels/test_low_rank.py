"""Low-rank updates of many adapters: Triton against torch, and torch against one product for each token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexbatch.execution.adapter_groups import group_tokens
from flexbatch.kernels import low_rank_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2}
# (ranks of the parts of every adapter, columns of the parts, inputs)
LAYOUTS = {
    "whole": ([[4], [16], [1]], (70,), 60),
    "parts": ([[4, 0, 5], [0, 33, 0], [16, 16, 16]], (24, 8, 130), 200),
    "ranks": ([[256], [0], [7]], (33,), 130),
}


def case(layout: str, dtype: torch.dtype, adapters: list[int], gather: bool = False):
    """Arguments of `low_rank_update`, out and x first, and the factors of every adapter and part."""
    ranks, widths, inputs = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(len(layout) + len(adapters))
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    segments, downs, ups, scales, row, element = [], [], [], [], 0, 0
    for adapter in ranks:
        segments.append([])
        for rank, width in zip(adapter, widths, strict=True):
            segments[-1].append([row, rank, element])
            downs.append(draw(rank, inputs))
            ups.append(draw(rank, width) * max(1, rank) ** -0.5)
            scales.append(0.5 + len(scales))
            row, element = row + rank, element + rank * width
    starts = [2 + sum(widths[:i]) for i in range(len(widths))]
    tokens = len(adapters)
    x = torch.randint(inputs, (tokens,), generator=generator) if gather else draw(tokens, inputs)
    order, tiles = group_tokens(np.array(adapters), extra_tiles=1)
    arguments = (
        torch.cat(downs), torch.cat([up.reshape(-1) for up in ups]), torch.tensor(segments),
        torch.tensor(scales).view(len(ranks), len(widths)), torch.tensor(list(zip(starts, widths, strict=True))),
        torch.from_numpy(order), torch.from_numpy(tiles), max(sum(adapter) for adapter in ranks),
    )  # fmt: skip
    return draw(tokens, sum(widths) + 3), x, arguments, (downs, ups, scales, starts, widths)


def one_by_one(out, x, adapters, factors):
    """The definition, token by token, in float64."""
    downs, ups, scales, starts, widths = factors
    out = out.double()
    for token, adapter in enumerate(adapters):
        for part, (start, width) in enumerate(zip(starts, widths, strict=True)):
            if adapter:
                i = (adapter - 1) * len(widths) + part
                row = x[token].double() if x.is_floating_point() else torch.eye(downs[i].shape[1])[x[token]].double()
                out[token, start : start + width] += scales[i] * (row @ downs[i].double().t() @ ups[i].double())
    return out


ADAPTERS = {
    "mixed": [3, 0, 1, 2, 2, 0, 1, 3, 1] * 5,
    "one": [2] * 40,
    "few": [1],
    "none": [0, 0],
}


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_oracle_is_a_product_for_every_token(layout, adapters, gather):
    ids = ADAPTERS[adapters]
    out, x, arguments, factors = case(layout, torch.float32, ids, gather)
    wanted = one_by_one(out, x, ids, factors)
    low_rank_reference.low_rank_update(out, x, *arguments)
    torch.testing.assert_close(out.double(), wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_is_the_oracle(layout, dtype, gather, device):
    from flexbatch.kernels import low_rank

    out, x, arguments, _ = case(layout, dtype, ADAPTERS["mixed"], gather)
    found = out.to(device, copy=True)
    on_device = [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments]
    low_rank.low_rank_update(found, x.to(device), *on_device)
    low_rank_reference.low_rank_update(out, x, *arguments)
    torch.testing.assert_close(found.cpu(), out, atol=20 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_token_does_not_depend_on_its_company(device):
    """Bit for bit: alone, and among tokens of other adapters and its own."""
    from flexbatch.kernels import low_rank

    ids = ADAPTERS["mixed"]
    out, x, arguments, _ = case("parts", torch.float16, ids)
    together = out.to(device, copy=True)
    fixed = [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments]
    low_rank.low_rank_update(together, x.to(device), *fixed)
    for token in (0, 1, 3, 17):
        order, tiles = (torch.from_numpy(each).to(device) for each in group_tokens(np.array([ids[token]])))
        alone = out[token : token + 1].to(device, copy=True)
        low_rank.low_rank_update(alone, x[token : token + 1].to(device), *fixed[:5], order, tiles, fixed[7])
        assert torch.equal(alone[0], together[token])


# (rows of every adapter, columns of the matrix, inputs)
TABLES = {"whole": ([[70], [0], [70]], 70, 60), "some": ([[3], [140], [1]], 300, 200)}


def table_case(layout: str, dtype: torch.dtype, has_bias: bool):
    """Arguments of `replace_columns`, out and x first."""
    counts, width, inputs = TABLES[layout]
    counts = [count for (count,) in counts]
    generator = torch.Generator().manual_seed(len(layout))
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    columns = torch.cat([torch.randperm(width, generator=generator)[:count] for count in counts])
    segments = torch.tensor([[sum(counts[:i]), count] for i, count in enumerate(counts)])
    order, tiles = (torch.from_numpy(each) for each in group_tokens(np.array(ADAPTERS["mixed"]), extra_tiles=1))
    out, x = draw(len(ADAPTERS["mixed"]), width), draw(len(ADAPTERS["mixed"]), inputs)
    bias = draw(sum(counts)) if has_bias else None
    return out, x, (draw(sum(counts), inputs), bias, segments, columns, order, tiles, max(counts))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("layout", TABLES)
def test_columns_are_replaced_token_by_token(layout, has_bias):
    out, x, arguments = table_case(layout, torch.float32, has_bias)
    rows, bias, segments, columns = arguments[:4]
    wanted = out.clone()
    for token, adapter in enumerate(ADAPTERS["mixed"]):
        start, count = segments[adapter - 1].tolist() if adapter else (0, 0)
        for row in range(start, start + count):
            wanted[token, columns[row]] = rows[row] @ x[token] + (0 if bias is None else bias[row])
    low_rank_reference.replace_columns(out, x, *arguments)
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", TABLES)
def test_triton_replaces_the_columns_of_the_oracle(layout, dtype, has_bias, device):
    from flexbatch.kernels import low_rank

    out, x, arguments = table_case(layout, dtype, has_bias)
    found = out.to(device, copy=True)
    on_device = [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments]
    low_rank.replace_columns(found, x.to(device), *on_device)
    low_rank_reference.replace_columns(out, x, *arguments)
    torch.testing.assert_close(found.cpu(), out, atol=20 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
