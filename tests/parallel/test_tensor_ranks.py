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

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous

    def done(self, options: Any) -> Work | None:
        return Work() if options.asyncOp or self.asynchronous else None

    def allreduce(self, tensors: list[Tensor], options: Any) -> Work | None:
        tensors[0].mul_(2)
        return self.done(options)

    def broadcast(self, tensors: list[Tensor], options: Any) -> Work | None:
        return self.done(options)

    def gather(self, parts: list[list[Tensor]], own: list[Tensor], options: Any) -> Work | None:
        for part in parts[0] if parts else ():
            part.copy_(own[0])
        return self.done(options)


def ranks(group: Group) -> TensorRanks:
    return TensorRanks(Mesh(0, 2, "127.0.0.1:0", 0, 2, False), group, 0, ((0, 3), (3, 5)))


def test_collectives_that_give_no_work():
    of_two, x = ranks(Group()), torch.arange(6.0).view(2, 3)
    assert torch.equal(of_two.sum(x.clone()), 2 * x)
    assert torch.equal(of_two.broadcast(x), x)
    logits = of_two.gather_logits(x)
    assert logits is not None and torch.equal(logits, torch.cat([x, x[:, :2]], dim=1))


def test_work_that_fails_is_a_lost_rank():
    with pytest.raises(LostRankError, match=r"rank 0 of 2 has lost another rank: the connection is closed"):
        ranks(Group(asynchronous=True)).sum(torch.ones(2))
