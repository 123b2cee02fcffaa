"""The architecture of a decoder as data: sizes and semantic flags. Nothing here knows a product's name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flexbatch.models.expert_arch import Experts
from flexbatch.models.latent_arch import Latent
from flexbatch.models.shard import RankShard
from flexbatch.models.stage import RankStage
from flexbatch.policy.limits import workspace_elements

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class RopeScaling:
    """The extension of rotary frequencies beyond the trained context.

    kind: "linear", "dynamic" (NTK), "llama3", "yarn" or "longrope". original_positions: tokens of the trained
    context that the formula refers to. attention_factor multiplies both tables; None derives it from the factor
    where the kind has one. short_factor: "longrope" only, one number per rotated pair.
    """

    kind: str
    factor: float
    original_positions: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class Arch:
    """A decoder-only transformer. Sizes count elements, lengths count tokens.

    position: "rope" rotates the first ``rotary_dim`` of every head (``rope_interleaved``: neighbors form a pair,
    else the two halves do); "learned" adds row ``position + position_offset`` of a table; "alibi" adds a slope per
    head to the scores. parallel_residual: MLP and attention read the same hidden state (``shared_norm``: even the
    same norm) and are added together. post_norm: norms come after the residual addition. sublayer_norm: the output
    of attention and of the MLP is normed before it is added. sliding_layers: for every layer whether
    ``sliding_window`` holds there; empty when it holds everywhere. chunked_window: the window does not slide, a query
    sees the keys of its own chunk of that many. rope_layers: for every layer whether it rotates; empty: all do.
    qk_norm: every head of queries and keys is normed (``late_qk_norm``: after the rotation); ``wide_qk_norm``: all
    heads together; ``plain_qk_norm``: in the layers that rotate, after it and without weights. query_growth: in the
    layers that do not rotate, queries at position p are multiplied by 1 + query_growth x log(1 + floor((p + 1) /
    query_growth_tokens)). norm_wide: norms are multiplied by their weights in float32. sinks: every head has one more
    score, that of a key without a value. clip_qkv: largest absolute value of queries, keys and values, 0: any.
    residual_scale multiplies what a layer adds to its input, ``logits_divisor`` divides the logits. experts: what
    takes the place of the MLP in the layers that ``sparse_layers`` names (empty: in all of them). latent: what queries,
    keys and values are made from in latent attention; ``head_dim`` is then the width of the one row that is cached, and
    ``num_kv_heads`` is 1. skipped_layers: further layers of the files, which predict tokens after the next and are not
    used. shard: what one of several ranks has of every layer; the numbers of heads and the inner sizes are then its
    own. stage: which layers one stage of a pipeline has; their number and what is told of each are then its own.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    # norms
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_affine: bool = True
    norm_wide: bool = False
    norm_biases: bool = True
    post_norm: bool = False
    sublayer_norm: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    late_qk_norm: bool = False
    plain_qk_norm: bool = False
    embed_norm: bool = False
    final_norm: bool = True
    # positions
    position: str = "rope"
    position_offset: int = 0
    rope_theta: float = 10000.0
    local_rope_theta: float | None = None
    local_rope_scaling: RopeScaling | None = None
    rotary_dim: int = 0
    rope_interleaved: bool = False
    rope_layers: tuple[bool, ...] = ()
    rope_scaling: RopeScaling | None = None
    # attention
    query_scale: float | None = None
    query_growth: float = 0.0
    query_growth_tokens: int = 8192
    soft_cap: float = 0.0
    sinks: bool = False
    clip_qkv: float = 0.0
    sliding_window: int = 0
    sliding_layers: tuple[bool, ...] = ()
    chunked_window: bool = False
    scaled_alibi: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    latent: Latent | None = None
    # MLP and residuals
    mlp: str = "gated"
    activation: str = "silu"
    mlp_bias: bool = False
    parallel_residual: bool = False
    shared_norm: bool = False
    residual_scale: float = 1.0
    experts: Experts | None = None
    sparse_layers: tuple[bool, ...] = ()
    skipped_layers: int = 0
    # embedding and head
    embed_size: int = 0
    embed_scale: float = 1.0
    tie_word_embeddings: bool = False
    head_bias: bool = False
    final_soft_cap: float = 0.0
    logits_divisor: float = 1.0
    # tokens and storage
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = "float32"
    shard: RankShard | None = None
    stage: RankStage | None = None
    context_limit: int | None = field(default=None, repr=False)
    """Of the user, below the model's own."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}")
        if self.position == "rope" and (self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise ValueError(f"rotary_dim={self.rotary_dim} must be even and between 2 and head_dim={self.head_dim}")
        for name in ("sliding_layers", "sparse_layers", "rope_layers"):
            count = len(getattr(self, name))
            if count not in (0, self.num_layers):
                raise ValueError(f"{name} names {count} layers, the model has {self.num_layers}")

    @property
    def context(self) -> int:
        """Tokens of prompt and answer that a sequence may have."""
        return self.max_positions if self.context_limit is None else min(self.context_limit, self.max_positions)

    @property
    def has_ends(self) -> bool:
        """Whether the embedding and the head are here."""
        return self.stage is None or self.stage.is_first

    @property
    def embedding_dim(self) -> int:
        """Width of the embedding table and of the head's input."""
        return self.embed_size or self.hidden_size

    @property
    def projects_embedding(self) -> bool:
        return self.embedding_dim != self.hidden_size

    @property
    def vocabulary(self) -> tuple[int, int]:
        """First and end of the rows of embedding table and head that are here."""
        return self.shard.vocabulary if self.shard else (0, self.vocab_size)

    @property
    def qkv_sections(self) -> tuple[int, int, int]:
        """Rows of the fused projection that make queries, keys and values."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """Elements of a head's result of attention."""
        return self.head_dim if self.latent is None else self.latent.rank

    @property
    def output_columns(self) -> int:
        """Inputs of the output projection."""
        return self.num_heads * (self.head_dim if self.latent is None else self.latent.value)

    @property
    def cache_sides(self) -> int:
        """Vectors that are cached of a head: key and value, or a latent that is both."""
        return 2 if self.latent is None else 1

    @property
    def norm_bias(self) -> bool:
        return self.norm == "layer" and self.norm_biases

    @property
    def workspace_elements(self) -> int:
        """Intermediate results of one token in a layer, at most: hidden states, projections, MLP or experts."""
        routed = self.experts.workspace_elements(self.hidden_size) if self.experts else 0
        return workspace_elements(
            self.hidden_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.intermediate_size,
            routed,
            0 if self.latent is None else self.latent.head_width,
        )

    @property
    def attention_scale(self) -> float:
        """Factor of the query-key products."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def window(self, layer: int) -> int:
        """Keys that a query of this layer sees, itself included; 0: all."""
        return self.sliding_window if not self.sliding_layers or self.sliding_layers[layer] else 0

    @property
    def window_layers(self) -> tuple[bool, ...]:
        """Layers whose cache may keep the window alone: not with ALiBi, which counts positions from the first key."""
        return tuple(self.window(layer) > 0 and self.position != "alibi" for layer in range(self.num_layers))

    def experts_of(self, layer: int) -> Experts | None:
        """The experts of this layer, None where it has a dense MLP."""
        return self.experts if not self.sparse_layers or self.sparse_layers[layer] else None

    def rotates(self, layer: int) -> bool:
        """Whether this layer rotates queries and keys."""
        return self.position == "rope" and (not self.rope_layers or self.rope_layers[layer])

    def uses_local_rope(self, layer: int) -> bool:
        return self.local_rope_theta is not None and self.window(layer) > 0

    def alibi_slopes(self) -> list[float] | None:
        """Slope of the linear bias of every head, None without ALiBi.

        Powers of one base for the largest power of two of heads; the remaining heads take every other power of the
        base for twice as many (Press et al. 2022, "Train Short, Test Long", section 3 and its released code). With
        ``scaled_alibi`` the bias is rounded to bfloat16 in every dtype, by key position, and scaled like the scores:
        so Falcon was published. Unrounded, logits differ by up to 1.5 at 16 heads and 400 tokens.
        """
        if self.position != "alibi":
            return None
        num_heads = self.shard.all_heads if self.shard else self.num_heads
        whole = 2 ** int(math.log2(num_heads))
        slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
        slopes += [2.0 ** (-4.0 * (2 * i + 1) / whole) for i in range(num_heads - whole)]
        return slopes[slice(*self.shard.heads)] if self.shard else slopes
