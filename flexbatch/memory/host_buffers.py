"""Pinned host buffers of a pass: inputs on their way to the device; queries, keys and values for CPU attention on
their way to the host, its results on their way back."""

from __future__ import annotations

import torch
from torch import Tensor

from flexbatch.memory.tiers import Pool
from flexbatch.memory.transfer import READY, Handle, TransferQueues
from flexbatch.memory.uploads import Uploads

NUM_BUFFERS = 4
"""Up to three ticks are in flight at a time; one more lets the host run ahead of the device."""


class HostBuffers:
    """A ring of host buffers, each with one owner from `acquire` to `release`. On the CPU nothing is copied and only
    the output is new."""

    def __init__(
        self,
        max_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        host: Pool,
        queues: TransferQueues,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim, self.dtype, self.host = (
            num_heads,
            num_kv_heads,
            head_dim,
            dtype,
            host,
        )
        self.copies = queues.device.type == "cuda"
        self.uploads = Uploads(host, queues)
        row_bytes = (2 * num_heads + 2 * num_kv_heads) * head_dim * dtype.itemsize
        self.max_tokens = max_tokens
        self.buffers = (
            [host.allocate(f"attention buffer {i}", max_tokens * row_bytes) for i in range(NUM_BUFFERS)]
            if self.copies and max_tokens
            else []
        )
        self.parts: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        """Of each buffer, what it was cut into last: all layers of a pass want it cut alike."""
        self.free_after: list[Handle] = [READY] * NUM_BUFFERS
        self.owners: dict[int, int] = {}
        self.next = 0

    def acquire(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns host copies of query [n, num_heads, head_dim], key and value [n, num_kv_heads, head_dim], enqueued on
        the current stream; and an output."""
        if not self.copies:
            return query, key, value, torch.empty_like(query)
        num_tokens = query.shape[0]
        assert num_tokens <= self.max_tokens, (
            f"{num_tokens} query tokens for CPU attention, buffers hold {self.max_tokens}"
        )
        index, self.next = self.next, (self.next + 1) % NUM_BUFFERS
        # By buffer, not by address: where the output lies in a buffer depends on the number of tokens.
        assert index not in self.owners.values(), "a host buffer is taken before it was given back"
        self.free_after[index].synchronize()
        parts = self.parts.get(index)
        if parts is None or parts[0].shape[0] != num_tokens:
            parts = self.parts[index] = self.cut(index, num_tokens)
        for target, source in zip(parts, (query, key, value), strict=False):
            target.copy_(source, non_blocking=True)
        self.owners[parts[3].data_ptr()] = index
        return parts

    def cut(self, index: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A buffer as query, key, value and output of so many tokens."""
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads
        sizes = [num_tokens * count * self.head_dim for count in heads]
        elements = self.buffers[index][: sum(sizes) * self.dtype.itemsize].view(self.dtype)
        query, key, value, output = (
            part.view(num_tokens, count, self.head_dim)
            for part, count in zip(elements.split_with_sizes(sizes), heads, strict=True)
        )
        return query, key, value, output

    def release(self, output: Tensor, done: Handle) -> None:
        """End the ownership of the buffer of ``output``, which everything before ``done`` has read."""
        if self.copies:
            self.free_after[self.owners.pop(output.data_ptr())] = done

    def check(self) -> None:
        """Invariant: a buffer has one owner."""
        assert len(set(self.owners.values())) == len(self.owners) <= NUM_BUFFERS
        self.uploads.check()

    def close(self) -> None:
        for handle in self.free_after:
            handle.synchronize()
        self.owners.clear()
        self.parts.clear()
        self.uploads.close()
        self.buffers.clear()
        for i in range(NUM_BUFFERS):
            self.host.free(f"attention buffer {i}")
