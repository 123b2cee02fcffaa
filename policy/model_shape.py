"""The sizes of a decoder that the cost model needs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from flexbatch.policy.limits import cache_group, weight_group, workspace_elements


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that the cost needs; ``*_tensors`` are elements of each tensor, in the order in which
    they are placed."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    block_tensors: tuple[int, ...]
    """Tensors of one layer."""
    head_tensors: tuple[int, ...]
    """What the head ships: final norm and output matrix, also when that matrix is the embedding table."""
    embedding_tensors: tuple[int, ...]
    """Tables that stay where they live; empty where the head's matrix is the table."""
    mlp_matrices: int = 2
    element_bytes: int = 2
    stored_block_bytes: tuple[int, ...] = ()
    """Bytes of each of ``block_tensors`` in a checkpoint that is quantised already, whatever its bits and groups;
    empty: the policy's bits decide."""
    adapter_tensors: tuple[int, ...] = ()
    """Of the adapters of one layer, which are never quantised."""

    @classmethod
    def from_sizes(
        cls,
        name: str,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        vocab_size: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mlp_matrices: int = 2,
        tied: bool = False,
        positions: int = 0,
        element_bytes: int = 2,
    ) -> ModelShape:
        """A dense decoder; biases and norms are left out (under 0.1 % of the elements). ``positions``: rows of a
        learned position table."""
        kv_heads, dim = num_kv_heads or num_heads, head_dim or hidden_size // num_heads
        block = (
            hidden_size * (num_heads + 2 * kv_heads) * dim,
            num_heads * dim * hidden_size,
            hidden_size * intermediate_size * (mlp_matrices - 1),
            hidden_size * intermediate_size,
        )
        table = vocab_size * hidden_size
        embedding = (() if tied else (table,)) + ((positions * hidden_size,) if positions else ())
        return cls(
            name,
            num_layers,
            hidden_size,
            num_heads,
            kv_heads,
            dim,
            intermediate_size,
            vocab_size,
            block,
            (table,),
            embedding,
            mlp_matrices,
            element_bytes,
        )

    @classmethod
    def from_dict(cls, data: dict) -> ModelShape:
        """From a shape JSON: the fields of this class, or the arguments of `from_sizes`."""
        if "block_tensors" not in data:
            return cls.from_sizes(**data)
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**fields)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def weight_bytes(self, elements: int, bits: int) -> int:
        """Bytes of ``elements`` weights at ``bits``: codes and one (scale, minimum) pair a group."""
        if bits == 16:
            return elements * self.element_bytes
        return (
            math.ceil(elements * bits / 8)
            + math.ceil(elements / weight_group(self.hidden_size)) * 2 * self.element_bytes
        )

    def token_bytes(self, bits: int) -> int:
        """Bytes of one token row of the cache of one layer, keys and values."""
        if bits == 16:
            return 2 * self.num_kv_heads * self.head_dim * self.element_bytes
        used = (
            2
            * self.num_kv_heads
            * (
                math.ceil(self.head_dim * bits / 8)
                + math.ceil(self.head_dim / cache_group(self.head_dim)) * 2 * self.element_bytes
            )
        )
        return math.ceil(used / 16) * 16  # quantised rows are padded to what a 16-byte load wants

    def block_tensor_bytes(self, bits: int) -> tuple[int, ...]:
        """Each tensor of one layer as it is stored."""
        plain = tuple(self.weight_bytes(elements, bits) for elements in self.block_tensors)
        adapters = tuple(self.weight_bytes(elements, 16) for elements in self.adapter_tensors)
        return ((self.stored_block_bytes or plain) if bits != 16 else plain) + adapters

    def block_bytes(self, bits: int) -> int:
        return sum(self.block_tensor_bytes(bits))

    @property
    def block_elements(self) -> int:
        return sum(self.block_tensors) + sum(self.adapter_tensors)

    @property
    def head_elements(self) -> int:
        return sum(self.head_tensors)

    @property
    def total_elements(self) -> int:
        return self.num_layers * self.block_elements + self.head_elements + sum(self.embedding_tensors)

    def total_bytes(self, bits: int) -> int:
        """All weights as they are stored: blocks at ``bits``, head and tables at 16 bits whatever the blocks have."""
        outside = self.weight_bytes(self.head_elements + sum(self.embedding_tensors), 16)
        return self.num_layers * self.block_bytes(bits) + outside

    def largest_layer_bytes(self, bits: int) -> int:
        """The bytes of the largest layer as it is stored, the head included: the working slab is sized by it."""
        return max(self.block_bytes(bits), self.weight_bytes(self.head_elements, 16))

    @property
    def hidden_bytes(self) -> int:
        """The bytes of one token's hidden state."""
        return self.hidden_size * self.element_bytes

    @property
    def peak_workspace_bytes(self) -> int:
        """What the engine keeps free for one token inside a layer: hidden states, projections and MLP with their
        copies."""
        elements = workspace_elements(
            self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, self.intermediate_size
        )
        return elements * self.element_bytes

    @property
    def workspace_bytes(self) -> int:
        """GPU workspace of one token inside a layer: residual, normed input, the larger of attention's and the MLP's
        intermediates, output."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        mlp = self.mlp_matrices * self.intermediate_size
        return (3 * self.hidden_size + max(attention, mlp)) * self.element_bytes
