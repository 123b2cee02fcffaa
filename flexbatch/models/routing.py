"""How evenly a model's routers share out the tokens: counted where they are computed, read when somebody asks.

Nothing here waits for the device but `describe`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flexbatch.models.arch import Arch
from flexbatch.policy.limits import MAX_PIECE_TOKENS


class RoutingCounts:
    """Tokens of every expert in every layer [layers, experts], over all passes and of the present one. A pass of CUDA
    graphs has more tokens than are real, the first ones."""

    def __init__(self, arch: Arch, device: torch.device) -> None:
        assert arch.experts is not None, "a model without experts routes nothing"
        self.sparse = [layer for layer in range(arch.num_layers) if arch.experts_of(layer)]
        shape = arch.num_layers, arch.experts.count
        self.total, self.of_pass = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        self.reached = torch.zeros(arch.num_layers, dtype=torch.int64, device=device)
        """Sum over the passes of the distinct experts that a layer's tokens went to."""
        self.one = torch.ones(1, dtype=torch.int64, device=device)
        self.real, self.in_graph = torch.zeros(MAX_PIECE_TOKENS, dtype=torch.int64, device=device), False
        """Of the tokens of a graph, or of pieces, 1 where they are real; whether these are being recorded."""
        self.passes = 0

    @contextmanager
    def of_graph(self) -> Iterator[None]:
        """What is counted here is recorded, and counted in every replay anew, real tokens only."""
        with self.of_pieces():
            self.of_pass.zero_()
            yield

    @contextmanager
    def of_pieces(self) -> Iterator[None]:
        """The same of several graphs in a row: the pass begins with nothing counted, once all of them are recorded."""
        self.in_graph = True
        try:
            yield
        finally:
            self.in_graph = False

    def begin_pass(self, tokens: int = 0) -> None:
        """``tokens``: that are real, should the pass be a graph."""
        self.of_pass.zero_()
        self.real[:tokens] = 1
        self.real[tokens:] = 0

    def add(self, layer: int, chosen: Tensor) -> None:
        """The experts [T, K] of a micro-batch's tokens. Not by `bincount`, which waits for the largest number."""
        ones = self.one.expand(chosen.numel())
        if self.in_graph:
            ones = self.real[: len(chosen), None].expand_as(chosen).flatten()
        self.of_pass[layer].scatter_add_(0, chosen.flatten(), ones)

    def end_pass(self) -> None:
        self.total += self.of_pass
        self.reached += (self.of_pass > 0).sum(1)
        self.passes += 1

    def describe(self) -> dict[str, Any]:
        """Of the mean layer: distinct experts a pass, the Gini coefficient of the experts' tokens (0: all have equally
        many), and the tokens of the busiest expert over the mean; of the least even layer its Gini coefficient."""
        total = self.total[self.sparse].double().cpu()
        used = total.sum(1) > 0
        if not self.passes or not used.any():
            return {}
        counts = total[used]
        uneven = gini(counts)
        return {
            "count": counts.shape[1],
            "distinct_per_pass": float(self.reached[self.sparse].double().mean()) / self.passes,
            "gini": float(uneven.mean()),
            "largest_gini": float(uneven.max()),
            "busiest": float((counts.amax(1) / counts.mean(1)).mean()),
            "passes": self.passes,
        }

    def check(self) -> None:
        """Invariants: nobody reaches more experts than there are, and layers without any have no tokens."""
        assert (self.total >= 0).all() and (self.reached <= self.passes * self.total.shape[1]).all()
        dense = [layer for layer in range(len(self.total)) if layer not in set(self.sparse)]
        assert not self.total[dense].any(), dense


def gini(counts: Tensor) -> Tensor:
    """[layers] of [layers, experts]: half the mean difference of two experts' tokens over their mean."""
    ordered, number = counts.sort(1).values, counts.shape[1]
    ranks = torch.arange(1, number + 1, dtype=counts.dtype)
    return (2 * (ordered * ranks).sum(1) / counts.sum(1) - (number + 1)) / number
