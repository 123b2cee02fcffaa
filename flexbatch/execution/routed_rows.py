"""Rows of routed tokens on their way to the CPU's experts and back: a ring of pinned buffers, and the work between."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.kernels.native_experts import ExpertTable
from flexbatch.memory.cpu_experts import LeftOut
from flexbatch.memory.files import align
from flexbatch.memory.handles import READY, Handle
from flexbatch.memory.tiers import Pool
from flexbatch.memory.transfer import ROW_BYTES, TransferQueues
from flexbatch.models.expert_arch import Experts
from flexbatch.models.experts import RowsElsewhere
from flexbatch.policy.limits import EXPERT_INDEX, NUM_EXPERT_BUFFERS, cpu_expert_tokens, expert_buffer_bytes
from flexbatch.policy.policy import Policy


def buffer_tokens(experts: Experts, policy: Policy, max_query_nodes: int) -> int:
    """Tokens that a buffer holds: of sequences that decode, with trees of so many nodes."""
    return cpu_expert_tokens(experts.count, experts.top_k, policy.gpu_batch_size * (1 + max_query_nodes))


@dataclass
class RowsOnCpu:
    """A micro-batch whose rows are with the CPU's experts of a layer."""

    owner: RoutedRows
    buffer: int
    who: LeftOut
    rows: Tensor
    """[T x K, H] on the host, of which the first ``count`` will be filled."""
    index: Tensor
    """[T x K, EXPERT_INDEX] int64 on the host: the choice that each is of."""
    done: Handle = READY
    count: int = 0

    @property
    def left_out(self) -> Tensor:
        return self.who.on_device

    def compute(self, x: Tensor, chosen: Tensor, scales: Tensor | None, table: ExpertTable, threads: int) -> None:
        """On the CPU's thread: what its experts make of the rows that go to them."""
        experts = chosen.flatten()
        mine = self.who.on_host[experts].nonzero().flatten()
        self.count = len(mine)
        self.index[: self.count, 0] = mine
        tokens, factors = mine // chosen.shape[1], None if scales is None else scales.flatten()[mine]
        experts = experts[mine]
        self.owner.queues.cpu_experts.num_bytes += len(experts.unique()) * table.expert_bytes
        ops.expert_rows(x, tokens, experts, table, factors, out=self.rows[: self.count], threads=threads)

    def put_into(self, out: Tensor) -> None:
        """The results into the rows [T x K, H] of all choices. Waits for the CPU."""
        self.done.wait()
        queues = self.owner.queues
        if self.count:
            near, index = self.rows[: self.count], self.index[: self.count]
            if self.owner.copies:
                near, index = out.new_empty(near.shape), torch.empty_like(index, device=out.device)
                queues.copy_to_device(self.rows[: self.count], near)
                queues.copy_to_device(self.index[: self.count], index)
            out.index_copy_(0, index[:, 0], near)
        self.owner.release(self.buffer, queues.mark())


@dataclass
class RoutedRows:
    """Owner of the buffers, each of which one micro-batch has from `start` to `RowsOnCpu.put_into`. Without a GPU
    nothing is copied, and only results are new."""

    max_tokens: int
    hidden: int
    top_k: int
    dtype: torch.dtype
    host: Pool
    queues: TransferQueues
    threads: int = 0
    """Of the CPU; 0: as many as torch uses."""
    buffers: list[Tensor] = field(default_factory=list)
    owned: set[int] = field(default_factory=set)
    free_after: list[Handle] = field(default_factory=lambda: [READY] * NUM_EXPERT_BUFFERS)
    next: int = 0

    def __post_init__(self) -> None:
        """Raises DoesNotFitError."""
        if self.copies and self.max_tokens:
            size = expert_buffer_bytes(self.max_tokens, self.hidden, self.top_k, self.dtype.itemsize)
            self.buffers = [self.host.allocate(f"expert buffer {index}", size) for index in range(NUM_EXPERT_BUFFERS)]

    def begin_pass(self) -> None:
        """A pass that broke off may have left buffers with the CPU."""
        if self.owned:
            self.queues.cpu_experts.synchronize()
            self.owned.clear()

    @property
    def copies(self) -> bool:
        return self.queues.device.type == "cuda"

    def start(
        self, layer: int, x: Tensor, chosen: Tensor, scales: Tensor | None, table: ExpertTable, left_out: LeftOut
    ) -> RowsElsewhere:
        """Send the rows x [T, H] to the host and let the CPU compute those that went to the experts ``left_out``.
        chosen: [T, K]; scales [T, K]: of what an expert is given."""
        assert len(x) <= self.max_tokens, f"{len(x)} tokens for the CPU's experts, buffers hold {self.max_tokens}"
        buffer, self.next = self.next, (self.next + 1) % NUM_EXPERT_BUFFERS
        assert buffer not in self.owned, "a buffer of routed rows is taken before it was given back"
        self.owned.add(buffer)
        self.free_after[buffer].synchronize()
        rows, index = self._results(buffer, len(x))
        x, chosen, scales = self._sent(buffer, x, chosen, scales)
        pending = RowsOnCpu(self, buffer, left_out, rows, index)
        pending.done = self.queues.cpu_experts.submit(
            lambda: pending.compute(x, chosen, scales, table, self.threads), self.queues.mark(), f"experts {layer}"
        )
        return pending

    def _parts(self, buffer: int, tokens: int) -> list[Tensor]:
        """Hidden states, choices, what they count, results and their index, in a buffer."""
        shapes = (
            ((tokens, self.hidden), self.dtype),
            ((tokens, self.top_k), torch.int64),
            ((tokens, self.top_k), torch.float32),
            ((tokens * self.top_k, self.hidden), self.dtype),
            ((tokens * self.top_k, EXPERT_INDEX), torch.int64),
        )
        parts, cursor = [], 0
        for shape, dtype in shapes:
            size = shape[0] * shape[1] * dtype.itemsize
            parts.append(self.buffers[buffer][cursor : cursor + size].view(dtype).view(shape))
            cursor = align(cursor + size, ROW_BYTES)
        return parts

    def _results(self, buffer: int, tokens: int) -> tuple[Tensor, Tensor]:
        if not self.copies:
            count = tokens * self.top_k
            return torch.empty(count, self.hidden, dtype=self.dtype), torch.empty(
                count, EXPERT_INDEX, dtype=torch.int64
            )
        *_, rows, index = self._parts(buffer, tokens)
        return rows, index

    def _sent(
        self, buffer: int, x: Tensor, chosen: Tensor, scales: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.copies:
            return x, chosen, scales
        host_x, host_chosen, host_scales, *_ = self._parts(buffer, len(x))
        host_x.copy_(x, non_blocking=True)
        host_chosen.copy_(chosen, non_blocking=True)
        return host_x, host_chosen, None if scales is None else host_scales.copy_(scales, non_blocking=True)

    def release(self, buffer: int, done: Handle) -> None:
        """End the ownership of a buffer, which everything before ``done`` has read."""
        self.owned.remove(buffer)
        self.free_after[buffer] = done

    def check(self) -> None:
        """Invariant: between two passes nobody has a buffer but one that broke off."""
        assert len(self.owned) <= NUM_EXPERT_BUFFERS and len(self.free_after) == NUM_EXPERT_BUFFERS, self.owned

    def close(self) -> None:
        for handle in self.free_after:
            handle.synchronize()
        for index in range(len(self.buffers)):
            self.host.free(f"expert buffer {index}")
        self.buffers.clear()
        self.owned.clear()
