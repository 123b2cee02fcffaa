"""The collectives of tensor parallelism. A process that has the whole model has no such object, and calls none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, GatherOptions

from flexbatch.parallel.channel import Group, waited
from flexbatch.parallel.mesh import Mesh
from flexbatch.trace import Tracer


class TensorRanks:
    """The ranks that compute each layer together, and which rows of the vocabulary each has.

    On a GPU a collective is queued behind the products that it needs, and the copies that bring the next layer go on
    beside it. Decode passes can be recorded with their sums: all ranks record the same passes, since what decides that
    is the pass and how many graphs rank 0 has told them to keep.
    """

    def __init__(self, mesh: Mesh, group: Group, rank: int, vocabulary: Sequence[tuple[int, int]]) -> None:
        """rank: of this process in the group. vocabulary: (first, end) of the rows of every rank. The tracer is that of
        the executor that runs passes with these ranks."""
        self.tracer = Tracer()
        self.mesh, self.group, self.rank, self.vocabulary = mesh, group, rank, tuple(vocabulary)
        self.in_line = False
        """Whether sums are put on the stream that computes, as while passes are recorded, and not on one of their own:
        each saves two events and two waits of the GPU. No GPU has done so yet."""

    def sum(self, x: Tensor) -> Tensor:
        """x, which becomes the sum of what all ranks have. The same on every rank, to the bit."""
        if not x.is_contiguous():
            x = x.contiguous()
        with self.tracer.compute_span("sum", "collectives"):
            options = AllreduceOptions()
            options.asyncOp = not self.in_line
            waited(self.group.allreduce([x], options), self.mesh)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """x, which becomes what rank 0 has."""
        waited(self.group.broadcast(x, 0), self.mesh)
        return x

    def look_up(self, gather: Callable[[Tensor, Tensor], Tensor], ids: Tensor, host_ids: Tensor) -> Tensor:
        """Rows of a table of which every rank has a part. gather: rows of this rank's part by their ids there, on the
        compute device and on the host."""
        first, end = self.vocabulary[self.rank]
        rows = gather(*((each - first).clamp(0, end - first - 1) for each in (ids, host_ids)))
        return self.sum(rows.masked_fill(((ids < first) | (ids >= end))[:, None], 0))

    def gather_logits(self, logits: Tensor) -> Tensor | None:
        """[n, vocabulary] on rank 0, of the columns [n, own rows] that every rank has; None on the others."""
        widths = [end - first for first, end in self.vocabulary]
        widest = max(widths)
        if logits.shape[1] < widest:
            logits = torch.nn.functional.pad(logits, (0, widest - logits.shape[1]))
        options = GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(logits) for _ in widths] if self.rank == 0 else []
        waited(self.group.gather([parts] if parts else [], [logits.contiguous()], options), self.mesh)
        if not parts:
            return None
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
