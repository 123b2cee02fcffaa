"""Pinned host buffers of a pass: inputs on their way to the device; queries, keys and values for CPU attention on
their way to the host, its results on their way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.memory.handles import READY, Handle
from flexbatch.memory.tiers import Pool
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.uploads import Uploads

NUM_BUFFERS = 4
"""Up to three ticks are in flight at a time; one more lets the host run ahead of the device."""
ROWS_BYTES = 1 << 18
"""Of queries, keys and values side by side, up to which they go to the host as they are: one copy and not three, each
with a kernel before it. The host then has to gather the queries, 50 us for so many bytes."""


@dataclass(frozen=True)
class HostParts:
    """A buffer that is cut: queries [n, num_heads, head_dim], keys and values [n, num_kv_heads, head_dim], output as
    the queries. rows [n, widths of all]: of which the first three are columns, None where each lies by itself."""

    rows: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


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
        self.parts: dict[int, HostParts] = {}
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
        rows = rows_of(query, key, value)
        if rows is not None and rows.nbytes > ROWS_BYTES:
            rows = None
        parts = self.parts.get(index)
        if parts is None or len(parts.output) != num_tokens or (parts.rows is None) != (rows is None):
            parts = self.parts[index] = self.cut(index, num_tokens, rows is not None)
        if parts.rows is not None and rows is not None:
            parts.rows.copy_(rows, non_blocking=True)
        else:
            for target, source in ((parts.query, query), (parts.key, key), (parts.value, value)):
                target.copy_(source, non_blocking=True)
        self.owners[parts.output.data_ptr()] = index
        return parts.query, parts.key, parts.value, parts.output

    def cut(self, index: int, num_tokens: int, by_rows: bool) -> HostParts:
        """A buffer as query, key, value and output of so many tokens. by_rows: the first three lie side by side."""
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        width, output_width = sum(heads) * self.head_dim, self.num_heads * self.head_dim
        elements = self.buffers[index].view(self.dtype)
        given, output = elements[: num_tokens * (width + output_width)].split_with_sizes(
            [num_tokens * width, num_tokens * output_width]
        )
        rows = given.view(num_tokens, width) if by_rows else None
        if rows is not None:
            query, key, value = rows.view(num_tokens, -1, self.head_dim).split_with_sizes(heads, 1)
        else:
            sizes = [num_tokens * count * self.head_dim for count in heads]
            query, key, value = (
                part.view(num_tokens, count, self.head_dim)
                for part, count in zip(given.split_with_sizes(sizes), heads, strict=True)
            )
        return HostParts(rows, query, key, value, output.view(num_tokens, self.num_heads, self.head_dim))

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


def rows_of(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """The rows [tokens, widths of all] that the three are columns of, as the product that makes them leaves them; None
    where they are not."""
    num_tokens, (heads, kv_heads), width = query.shape[0], (query.shape[1], key.shape[1]), query.shape[2]
    total = (heads + 2 * kv_heads) * width
    side_by_side = all(each.stride() == (total, width, 1) and each.dtype == query.dtype for each in (query, key, value))
    size, start = width * query.element_size(), query.data_ptr()
    follow = key.data_ptr() == start + heads * size and value.data_ptr() == start + (heads + kv_heads) * size
    return query.as_strided((num_tokens, total), (total, 1)) if side_by_side and follow else None
