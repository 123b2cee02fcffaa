"""Counts of what routers choose."""

from __future__ import annotations

import pytest
import torch

from flexbatch.models import families
from flexbatch.models.routing import RoutingCounts, gini
from tests.models.test_arch import configuration


def arch():
    """Layers 1 and 2 of three have experts, six each."""
    return families.read_arch(configuration("qwen3_moe").to_dict())


def test_gini_is_that_of_its_definition():
    counts = torch.tensor([[5.0, 5, 5, 5], [0, 0, 0, 8], [1, 2, 3, 10]], dtype=torch.float64)
    for row, found in zip(counts, gini(counts), strict=True):
        difference = (row[:, None] - row[None, :]).abs().mean()
        assert float(found) == pytest.approx(float(difference / (2 * row.mean())))
    assert gini(counts)[1] == pytest.approx(0.75), "all to one of four"


def test_counts_over_passes():
    """Micro-batches of a pass reach the same experts; a pass that broke off counts for nothing."""
    routing = RoutingCounts(arch(), torch.device("cpu"))
    assert routing.describe() == {}
    for layer in (1, 2):
        routing.add(layer, torch.tensor([[0, 1, 2]]))
    both = ((1, [[0, 1, 2], [3, 4, 5]]), (1, [[0, 1, 2]]), (2, [[5, 4, 3]]))
    for work in (both, both, ((1, [[0, 1, 2]]), (2, [[5, 4, 3]]))):
        routing.begin_pass()
        for layer, chosen in work:
            routing.add(layer, torch.tensor(chosen))
        routing.end_pass()
        routing.check()
    assert routing.total.tolist() == [[0] * 6, [5, 5, 5, 2, 2, 2], [0, 0, 0, 3, 3, 3]]
    found = routing.describe()
    assert (found["count"], found["passes"], found["distinct_per_pass"]) == (6, 3, 4.0)
    assert found["largest_gini"] == pytest.approx(0.5) and found["gini"] == pytest.approx((0.5 + 3 / 14) / 2)
    assert found["busiest"] == pytest.approx((10 / 7 + 2) / 2)


def test_adding_waits_for_nothing(monkeypatch):
    """No value goes to the host: on a GPU that would hold up every layer."""

    def refused(*arguments):
        raise AssertionError("the host read a value")

    routing, chosen = RoutingCounts(arch(), torch.device("cpu")), torch.tensor([[0, 1, 2]])
    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refused)
    monkeypatch.setattr(torch, "bincount", refused)
    routing.begin_pass()
    routing.add(1, chosen)
    routing.end_pass()
