"""Sums, broadcasts and gathers as groups of GPUs do them: what is to stay on the stream that computes gives nothing to
wait for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexbatch.parallel.mesh import Mesh
from flexbatch.parallel.tensor_ranks import TensorRanks
from flexbatch.validation.errors import LostRankError


class Work:
    """Of a collective on a stream of its own."""

    def wait(self) -> None:
        raise RuntimeError("the connection is closed")


class Group:
    """Two ranks that have the same; like NCCL's it gives no work for options that ask for none."""

    def done(self, options: Any) -> Work | None:
        return Work() if options.asyncOp else None

    def allreduce(self, tensors: list[Tensor], options: Any) -> Work | None:
        tensors[0].mul_(2)
        return self.done(options)

    def gather(self, parts: list[list[Tensor]], own: list[Tensor], options: Any) -> Work | None:
        for part in parts[0] if parts else ():
            part.copy_(own[0])
        return self.done(options)


def ranks(group: Group) -> TensorRanks:
    return TensorRanks(Mesh(0, 2, "127.0.0.1:0", 0, 2, False), group, 0, ((0, 3), (3, 5)))


def test_sums_that_give_no_work():
    of_two, x = ranks(Group()), torch.arange(6.0).view(2, 3)
    of_two.in_line = True
    assert torch.equal(of_two.sum(x.clone()), 2 * x)


def test_work_that_fails_is_a_lost_rank():
    """Of sums on a stream of their own, which is where they are but while passes are recorded."""
    of_two = ranks(Group())
    for each in (of_two.sum, of_two.gather_logits):
        with pytest.raises(LostRankError, match=r"rank 0 of 2 has lost another rank: the connection is closed"):
            each(torch.ones(2, 3))
