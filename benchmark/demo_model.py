"""The demo model as it is trained: a small Llama in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmark.demo_files import (
    CONTEXT,
    VOCAB_SIZE,
    Shape,
)


class DecoderLayer(nn.Module):
    """A Llama decoder layer; parameter names as in Hugging Face checkpoints."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.shape, self.dropout = shape, dropout
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(shape.hidden, width, bias=False),
                "k_proj": nn.Linear(shape.hidden, kv_width, bias=False),
                "v_proj": nn.Linear(shape.hidden, kv_width, bias=False),
                "o_proj": nn.Linear(width, shape.hidden, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(shape.hidden, shape.intermediate, bias=False),
                "up_proj": nn.Linear(shape.hidden, shape.intermediate, bias=False),
                "down_proj": nn.Linear(shape.intermediate, shape.hidden, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, tokens, hidden] -> the same shape."""
        batch, tokens, _ = x.shape
        normed = self.input_layernorm(x)
        split = (batch, tokens, -1, self.shape.head_dim)
        query, key, value = (
            self.self_attn[name](normed).view(split).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + functional.dropout(
            self.self_attn["o_proj"](attended.transpose(1, 2).reshape(batch, tokens, -1)), self.dropout, self.training
        )
        normed = self.post_attention_layernorm(x)
        gated = functional.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed)
        return x + functional.dropout(self.mlp["down_proj"](gated), self.dropout, self.training)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves paired; x [batch, heads, tokens, head_dim], cos and sin [tokens, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Llama(nn.Module):
    """The training-time model: Llama with residual dropout and tied embeddings."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, shape.hidden)
        self.layers = nn.ModuleList(DecoderLayer(shape, dropout) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        angles = torch.outer(
            torch.arange(CONTEXT), shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual_out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers) if residual_out else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [batch, length] -> logits [batch, length, vocab]."""
        x = functional.dropout(self.embed_tokens(tokens), self.dropout, self.training)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.norm(x), self.embed_tokens.weight)
