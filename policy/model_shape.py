"""The sizes of a decoder that the cost model needs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from flexbatch.policy.expert_shape import ExpertShape
from flexbatch.policy.layer_window import LayerWindow
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
    """Bytes of each of ``block_tensors`` in a checkpoint that is quantized already, whatever its bits and groups;
    empty: the policy's bits decide."""
    experts: ExpertShape | None = None
    """What takes the place of the MLP in the layers of ``block_tensors``."""
    dense_layers: int = 0
    """Layers that have a plain MLP beside those with experts, counted as the first ones."""
    dense_tensors: tuple[int, ...] = ()
    """Tensors of one of them."""
    stored_dense_bytes: tuple[int, ...] = ()
    """Like ``stored_block_bytes``, of ``dense_tensors``."""
    cache_sides: int = 2
    """Vectors that are cached of a key-value head: 1 for latent attention, whose keys are the values as well."""
    head_width: int = 0
    """Of latent attention, elements of a head's query and value outside the space of the latent."""
    adapter_tensors: tuple[int, ...] = ()
    """Of the adapters of one layer, which are never quantized."""
    window: int = 0
    """Tokens that queries of ``window_layers`` layers see; their cache keeps no more."""
    window_layers: int = 0
    window_chunked: bool = False
    """Whether the window does not slide: see `LayerWindow`."""
    stages: int = 1
    """Of a pipeline, of which this is one: so many passes are in flight, each with sequences of its own."""

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
        experts: ExpertShape | None = None,
    ) -> ModelShape:
        """Biases and norms are left out (under 0.1 % of the elements). ``positions``: rows of a learned position
        table. ``experts``: what every layer has in the place of its MLP."""
        kv_heads, dim = num_kv_heads or num_heads, head_dim or hidden_size // num_heads
        mlp = (hidden_size * intermediate_size * (mlp_matrices - 1), hidden_size * intermediate_size)
        block = (
            hidden_size * (num_heads + 2 * kv_heads) * dim,
            num_heads * dim * hidden_size,
            *(mlp if experts is None else experts.tensors(hidden_size)),
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
            experts=experts,
        )

    @classmethod
    def from_dict(cls, data: dict) -> ModelShape:
        """From a shape JSON: the fields of this class, or the arguments of `from_sizes`."""
        if "block_tensors" not in data:
            return cls.from_sizes(**data)
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        if fields.get("experts") is not None:
            fields["experts"] = ExpertShape(**fields["experts"])
        return cls(**fields)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    @property
    def layer_window(self) -> LayerWindow | None:
        return LayerWindow(self.window, self.window_chunked) if self.window_layers else None

    def kept_layers(self, tokens: float, kept: float) -> float:
        """Token rows of a sequence of so many tokens, over all layers, of which those with a window keep ``kept``."""
        return (self.num_layers - self.window_layers) * tokens + self.window_layers * min(tokens, kept)

    def weight_bytes(self, elements: int, bits: int) -> int:
        """Bytes of ``elements`` weights at ``bits``: codes and one (scale, minimum) pair a group."""
        if bits == 16:
            return elements * self.element_bytes
        return (
            math.ceil(elements * bits / 8)
            + math.ceil(elements / weight_group(self.hidden_size)) * 2 * self.element_bytes
        )

    def token_bytes(self, bits: int) -> int:
        """Bytes of one token row of the cache of one layer, keys and values or what stands for both."""
        if bits == 16:
            return self.cache_sides * self.num_kv_heads * self.head_dim * self.element_bytes
        used = (
            self.cache_sides
            * self.num_kv_heads
            * (
                math.ceil(self.head_dim * bits / 8)
                + math.ceil(self.head_dim / cache_group(self.head_dim)) * 2 * self.element_bytes
            )
        )
        return math.ceil(used / 16) * 16  # quantized rows are padded to what a 16-byte load wants

    def block_tensor_bytes(self, bits: int) -> tuple[int, ...]:
        """Each tensor of one layer as it is stored."""
        plain = tuple(self.weight_bytes(elements, bits) for elements in self.block_tensors)
        adapters = tuple(self.weight_bytes(elements, 16) for elements in self.adapter_tensors)
        return ((self.stored_block_bytes or plain) if bits != 16 else plain) + adapters

    def dense_tensor_bytes(self, bits: int) -> tuple[int, ...]:
        """Each tensor of one of the ``dense_layers`` as it is stored."""
        plain = tuple(self.weight_bytes(elements, bits) for elements in self.dense_tensors)
        return self.stored_dense_bytes or plain if bits != 16 else plain

    def block_bytes(self, bits: int) -> int:
        return sum(self.block_tensor_bytes(bits))

    def dense_bytes(self, bits: int) -> int:
        return sum(self.dense_tensor_bytes(bits))

    def expert_bytes(self, bits: int) -> int:
        """All experts of a layer as they are stored: the last of its tensors."""
        if self.experts is None:
            return 0
        end = len(self.block_tensors)
        return sum(self.block_tensor_bytes(bits)[end - self.experts.num_tensors : end])

    def dequantized_bytes(self, bits: int) -> int:
        """The largest layer expanded to 16 bits, but for experts, which are multiplied as they are stored; nothing is
        where weights have 16 bits."""
        return 0 if bits == 16 else max(self.block_bytes(16) - self.expert_bytes(16), self.dense_bytes(16))

    @property
    def block_elements(self) -> int:
        return sum(self.block_tensors) + sum(self.adapter_tensors)

    @property
    def spared_elements(self) -> int:
        """Weights of a layer that a token does not go through: the experts that it is not given to."""
        experts = self.experts
        return (experts.count - experts.top_k) * experts.elements(self.hidden_size) if experts else 0

    @property
    def active_elements(self) -> int:
        """Weights of all layers that a token goes through."""
        sparse = self.num_layers - self.dense_layers
        return sparse * (self.block_elements - self.spared_elements) + self.dense_layers * sum(self.dense_tensors)

    def least_bytes_read(self, bits: int) -> int:
        """What a pass reads of the weights, however few tokens it has."""
        spared = (self.num_layers - self.dense_layers) * self.spared_elements
        return self.total_bytes(bits) - (self.weight_bytes(spared, bits) if spared else 0)

    @property
    def head_elements(self) -> int:
        return sum(self.head_tensors)

    @property
    def total_elements(self) -> int:
        sparse = self.num_layers - self.dense_layers
        layers = sparse * self.block_elements + self.dense_layers * sum(self.dense_tensors)
        return layers + self.head_elements + sum(self.embedding_tensors)

    def total_bytes(self, bits: int) -> int:
        """All weights as they are stored: blocks at ``bits``, head and tables at 16 bits whatever the blocks have."""
        outside = self.weight_bytes(self.head_elements + sum(self.embedding_tensors), 16)
        sparse = self.num_layers - self.dense_layers
        return sparse * self.block_bytes(bits) + self.dense_layers * self.dense_bytes(bits) + outside

    def largest_layer_bytes(self, bits: int) -> int:
        """The bytes of the largest layer as it is stored, the head included: the working slab is sized by it."""
        return max(self.block_bytes(bits), self.dense_bytes(bits), self.weight_bytes(self.head_elements, 16))

    def streamed_layer_bytes(self, bits: int) -> int:
        """Of the largest layer without the head, which is resident where the gpu tier has any share worth the name."""
        return max(self.block_bytes(bits), self.dense_bytes(bits))

    @property
    def hidden_bytes(self) -> int:
        """The bytes of one token's hidden state."""
        return self.hidden_size * self.element_bytes

    @property
    def peak_workspace_bytes(self) -> int:
        """What the engine keeps free for one token inside a layer: hidden states, projections and MLP with their
        copies."""
        routed = self.experts.workspace_elements(self.hidden_size) if self.experts else 0
        elements = workspace_elements(
            self.hidden_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.intermediate_size,
            routed,
            self.head_width,
        )
        return elements * self.element_bytes

    @property
    def workspace_bytes(self) -> int:
        """GPU workspace of one token inside a layer: residual, normed input, the larger of attention's and the MLP's
        intermediates, output."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim + self.num_heads * self.head_width
        mlp = self.mlp_matrices * self.intermediate_size
        if self.experts:
            mlp = self.experts.workspace_elements(self.hidden_size)
        return (3 * self.hidden_size + max(attention, mlp)) * self.element_bytes
