"""Tiny random models of every family, saved as Hugging Face folders with a tokenizer. Sizes are awkward on purpose."""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 307
SPECIAL = ("<pad>", "<s>", "</s>")
PAD, BOS, EOS = 0, 1, 2
TOKENS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}

# Grouped heads, a head size that is no power of two, heads x head size != hidden size.
LLAMA_SIZES = {
    "hidden_size": 60,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FALCON_SIZES = {"hidden_size": 60, "num_hidden_layers": 2, "max_position_embeddings": 512}
GPT_SIZES = {"n_embd": 60, "n_layer": 3, "n_head": 5, "n_positions": 512}
NEOX_SIZES = {
    "hidden_size": 72,
    "intermediate_size": 92,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 512,
}

# name -> (model_type, configuration). The part of the name before "-" is the family.
FAMILY_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "opt",
        {
            "hidden_size": 60,
            "ffn_dim": 92,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "word_embed_proj_dim": 60,
            "max_position_embeddings": 512,
        },
    ),
    "opt-tiny": (
        "opt",
        {
            "hidden_size": 12,
            "ffn_dim": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "word_embed_proj_dim": 12,
            "max_position_embeddings": 512,
        },
    ),
    "llama": ("llama", LLAMA_SIZES),
    "llama-tied": ("llama", {**LLAMA_SIZES, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-single": (
        "llama",
        {**LLAMA_SIZES, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
    ),
    "llama-rope3": ("llama", {**LLAMA_SIZES, "rope_parameters": {"rope_theta": 5000.0, **LLAMA3_SCALING}}),
    "llama-linear": (
        "llama",
        {**LLAMA_SIZES, "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    ),
    "llama-dynamic": (
        "llama",
        {
            **LLAMA_SIZES,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0},
        },
    ),
    "llama-yarn": (
        "llama",
        {
            **LLAMA_SIZES,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "opt-postnorm": (
        "opt",
        {
            "hidden_size": 60,
            "ffn_dim": 92,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "word_embed_proj_dim": 28,
            "do_layer_norm_before": False,
            "max_position_embeddings": 512,
        },
    ),
    "opt-bare": (
        "opt",
        {
            "hidden_size": 60,
            "ffn_dim": 92,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "word_embed_proj_dim": 60,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "max_position_embeddings": 512,
        },
    ),
    "mistral": ("mistral", {**LLAMA_SIZES, "sliding_window": 19}),
    "mistral-full": ("mistral", {**LLAMA_SIZES, "sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**LLAMA_SIZES, "head_dim": 10}),
    "qwen2-window": (
        "qwen2",
        {**LLAMA_SIZES, "head_dim": 10, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**LLAMA_SIZES, "tie_word_embeddings": True}),
    "phi3": ("phi3", {**LLAMA_SIZES, "head_dim": 10, "sliding_window": 21, "original_max_position_embeddings": 512}),
    "phi3-longrope": (
        "phi3",
        {
            **LLAMA_SIZES,
            "head_dim": 10,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.7, 2.5],
                "long_factor": [1.0, 2, 4, 8, 16],
            },
        },
    ),
    "glm": ("glm", LLAMA_SIZES),
    "glm4": ("glm4", LLAMA_SIZES),
    "gemma2": (
        "gemma2",
        {
            **LLAMA_SIZES,
            "query_pre_attn_scalar": 20,
            "sliding_window": 13,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {**LLAMA_SIZES, "query_pre_attn_scalar": 20, "sliding_window": 13, "sliding_window_pattern": 3},
    ),
    "gemma3-linear": (
        "gemma3_text",
        {
            **LLAMA_SIZES,
            "sliding_window": 13,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
            },
        },
    ),
    "gemma3-vision": (
        "gemma3",
        {
            "text_config": {
                **LLAMA_SIZES,
                **TOKENS,
                "vocab_size": VOCAB,
                "sliding_window": 13,
                "sliding_window_pattern": 3,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": VOCAB - 1,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 60, "n_layer": 3, "n_head": 6}),
    "falcon-7b": ("falcon", {**FALCON_SIZES, "num_attention_heads": 5}),
    "falcon-40b": (
        "falcon",
        {**FALCON_SIZES, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon-11b": (
        "falcon",
        {
            **FALCON_SIZES,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 92,
        },
    ),
    "falcon-alibi": (
        "falcon",
        {
            **FALCON_SIZES,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "alibi": True,
        },
    ),
    "falcon-alibi-many": (
        "falcon",
        {
            **FALCON_SIZES,
            "hidden_size": 96,
            "num_attention_heads": 12,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
        },
    ),
    "gpt_bigcode": ("gpt_bigcode", GPT_SIZES),
    "gpt_bigcode-heads": (
        "gpt_bigcode",
        {**GPT_SIZES, "multi_query": False, "n_inner": 92, "activation_function": "gelu"},
    ),
    "gpt_neox": (
        "gpt_neox",
        {**NEOX_SIZES, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 5000.0}},
    ),
    "gpt_neox-serial": (
        "gpt_neox",
        {**NEOX_SIZES, "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "codegen": ("codegen", {**GPT_SIZES, "n_embd": 96, "n_head": 8, "rotary_dim": 8}),
    "gptj": ("gptj", {**GPT_SIZES, "n_embd": 96, "n_head": 6, "rotary_dim": 6}),
    "gpt2": ("gpt2", {**GPT_SIZES, "n_inner": 92}),
    "gemma": ("gemma", {**LLAMA_SIZES, "hidden_act": "gelu"}),
    "phi": ("phi", {**LLAMA_SIZES, "hidden_size": 72, "head_dim": 12}),
    "starcoder2": ("starcoder2", {**LLAMA_SIZES, "head_dim": 10, "sliding_window": 17}),
    "stablelm": ("stablelm", {**LLAMA_SIZES, "hidden_size": 96, "head_dim": 16, "use_qkv_bias": True}),
    "stablelm-parallel": (
        "stablelm",
        {**LLAMA_SIZES, "hidden_size": 96, "head_dim": 16, "use_parallel_residual": True},
    ),
}


# Width of an expert, of a dense MLP and of a shared one all differ; the last layer is not like the first.
EXPERT_SIZES = {**LLAMA_SIZES, "intermediate_size": 44, "num_experts_per_tok": 3, "num_local_experts": 6}
QWEN_MOE_SIZES = {
    **LLAMA_SIZES,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 44,
    "mlp_only_layers": [0],
}
GLM_MOE_SIZES = {
    **LLAMA_SIZES,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 44,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "num_nextn_predict_layers": 0,
}
# Inputs of both matrices in whole blocks of 32, as its packed files have them; limits that are reached.
GPT_OSS_SIZES = {
    **{**LLAMA_SIZES, "hidden_size": 64, "intermediate_size": 96, "num_experts_per_tok": 3, "num_local_experts": 6},
    **{"sliding_window": 13, "swiglu_limit": 2.5},
}
GPT_OSS_ROPE = {
    **{"rope_type": "yarn", "factor": 4.0, "rope_theta": 1500.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"truncate": False, "original_max_position_embeddings": 128},
}
FAMILY_CASES |= {
    "qwen3_moe": ("qwen3_moe", {**QWEN_MOE_SIZES, "norm_topk_prob": True}),
    "qwen3_moe-window": (
        "qwen3_moe",
        {**QWEN_MOE_SIZES, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 11},
    ),
    "mixtral": ("mixtral", {**EXPERT_SIZES, "num_experts_per_tok": 2, "sliding_window": 19}),
    "olmoe": ("olmoe", {**EXPERT_SIZES, "head_dim": 10, "clip_qkv": 0.7, "num_local_experts": 11}),
    "qwen2_moe": (
        "qwen2_moe",
        {**QWEN_MOE_SIZES, "head_dim": 10, "shared_expert_intermediate_size": 36, "use_sliding_window": True}
        | {"sliding_window": 11, "max_window_layers": 2},
    ),
    "granitemoe": (
        "granitemoe",
        {**EXPERT_SIZES, "embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.6}
        | {"logits_scaling": 1.5},
    ),
    "granitemoeshared": ("granitemoeshared", {**EXPERT_SIZES, "shared_intermediate_size": 36, "attention_bias": True}),
    "phimoe": (
        "phimoe",
        {**EXPERT_SIZES, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True}
        | {"router_jitter_noise": 0.4},
    ),
    "glm4_moe": ("glm4_moe", {**GLM_MOE_SIZES, "use_qk_norm": True, "attention_bias": True}),
    "gpt_oss": ("gpt_oss", {**GPT_OSS_SIZES, "rope_parameters": GPT_OSS_ROPE}),
    "gpt_oss-plain": (
        "gpt_oss",
        {**GPT_OSS_SIZES, "attention_bias": False, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}, "swiglu_limit": 1.2, "swiglu_alpha": 0.9},
    ),
    "glm4_moe-plain": ("glm4_moe", {**GLM_MOE_SIZES, "n_group": 1, "norm_topk_prob": False}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {**LLAMA_SIZES, "moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 44, "moe_num_shared_experts": 2},
    ),
    "ernie4_5_moe-bias": (
        "ernie4_5_moe",
        {**LLAMA_SIZES, "num_hidden_layers": 4, "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 44}
        | {"moe_layer_interval": 2, "moe_layer_end_index": 2, "moe_norm_min": 0.9, "use_bias": True},
    ),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        {**LLAMA_SIZES, "intermediate_size": 44, "num_experts": 6, "moe_topk": [2, 2, 2]}
        | {"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4}},
    ),
    "minimax_m2": (
        "minimax_m2",
        {**LLAMA_SIZES, "intermediate_size": 44, "num_local_experts": 6, "num_experts_per_tok": 3, "rotary_dim": 6},
    ),
    "dbrx": (
        "dbrx",
        {"d_model": 60, "n_heads": 6, "n_layers": 3, "max_seq_len": 512}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 0.8, "rope_theta": 5e4}}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
        | {
            "ffn_config": {"ffn_hidden_size": 44, "moe_num_experts": 6, "moe_top_k": 3}
            | {"moe_normalize_expert_weights": 2.0}
        },
    ),
    "llama4_text": (
        "llama4_text",
        {**LLAMA_SIZES, "num_hidden_layers": 4, "intermediate_size": 44, "intermediate_size_mlp": 92}
        | {"num_local_experts": 6, "num_experts_per_tok": 1, "attention_chunk_size": 16, "floor_scale": 4}
        | {"no_rope_layers": [1, 1, 1, 0], "moe_layers": [0, 2, 3], "attn_scale": 0.3},
    ),
    "llama4_text-two": (
        "llama4_text",
        {**LLAMA_SIZES, "intermediate_size": 44, "intermediate_size_mlp": 92, "interleave_moe_layer_step": 2}
        | {"num_local_experts": 6, "num_experts_per_tok": 2, "use_qk_norm": False, "attention_bias": True}
        | {"no_rope_layer_interval": 2, "attention_chunk_size": 7, "attn_temperature_tuning": False},
    ),
}


# Values, unrotated and rotated parts of heads all differ.
LATENT_SIZES = {
    **{name: size for name, size in GLM_MOE_SIZES.items() if name != "head_dim"},
    "num_key_value_heads": 6,
    "kv_lora_rank": 28,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rms_norm_eps": 1e-3,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
FAMILY_CASES |= {
    "deepseek_v2": (
        "deepseek_v2",
        {**LATENT_SIZES, "q_lora_rank": None, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
        | {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}},
    ),
    "deepseek_v2-bias": (
        "deepseek_v2",
        {**LATENT_SIZES, "topk_method": "greedy", "attention_bias": True, "mlp_bias": True},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**LATENT_SIZES, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "attention_bias": True},
    ),
    "deepseek_v3-halves": ("deepseek_v3", {**LATENT_SIZES, "q_lora_rank": None, "rope_interleave": False}),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        {**LATENT_SIZES, "n_group": 1, "v_head_dim": 30, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
}


def make_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows every byte; merges of two letters fill the vocabulary, so that every token id of a
    model decodes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    if vocab_size < len(vocab):
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {len(vocab)}: every byte and {len(SPECIAL)} special tokens"
        )
    merges = list(itertools.islice(itertools.product(string.ascii_lowercase, repeat=2), vocab_size - len(vocab)))
    vocab |= {first + second: len(vocab) + index for index, (first, second) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[PAD], bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS]
    )


def train_tokenizer(
    corpus: list[str], vocab_size: int, special: list[str], bos: bool, **options: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges of ``corpus``: every byte is a token, so that random ids cut characters anywhere.

    ``bos`` prepends ``<s>``, which is the first of ``special``, as Llama does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Random norms and biases too (their defaults of one and zero hide mistakes), and weights large enough that
    logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # Whatever a norm starts from (one, or zero where the model adds one itself) stays its center.
                parameter.copy_(0.3 * noise if name.endswith("bias") else parameter.mean() + 0.3 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


def ignored_by_transformers(kind: str, config: dict[str, Any]) -> str | None:
    """What this version of transformers leaves out of a configuration that later ones, and the published files, mean:
    no oracle for it. Found with 5.17."""
    made = AutoConfig.for_model(kind, **config)
    if kind == "gpt_oss" and not hasattr(type(made)(), "swiglu_limit"):
        return "swiglu_limit of gpt_oss"
    if kind == "minimax_m2" and (made.rope_parameters or {}).get("partial_rotary_factor", 1.0) == 1.0:
        return "rotary_dim of minimax_m2"
    if kind == "gemma" and made.hidden_act == "gelu":
        return "that gelu means gelu_pytorch_tanh in files of Gemma"
    return None


def make_model(
    family: str, folder: Path | str, *, seed: int = 0, tokenizer: bool = True, **overrides: Any
) -> PreTrainedModel:
    """Build the case ``family`` of FAMILY_CASES with ``overrides`` of its configuration, save it to ``folder``, return
    it in float32 (eval mode).

    ``vocab_size`` (default 307), ``pad_token_id``, ``bos_token_id`` and ``eos_token_id`` can be overridden like any
    other key.
    """
    kind, config = FAMILY_CASES[family]
    config = {"vocab_size": VOCAB, **TOKENS, **config, **overrides}
    if ignored := ignored_by_transformers(kind, config):
        pytest.skip(f"transformers {transformers.__version__} ignores {ignored}")
    # Attention of torch caps no logits, and 5.17 calls it for models that ask for a cap.
    attention = {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **config), dtype=torch.float32, **attention
    ).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    randomize(model, seed)
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer(config["vocab_size"]).save_pretrained(folder)
    return model


def random_prompts(lengths: list[int], vocab_size: int = VOCAB, seed: int = 0) -> list[list[int]]:
    """One random prompt for every length, without special tokens, all different."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(SPECIAL), vocab_size, (length,), generator=generator).tolist() for length in lengths]


PROMPT_LENGTHS = [1, 2, 5, 17, 40, 200, 33, 16, 15, 64]
NEW_TOKENS = 12


@dataclass(frozen=True)
class Reference:
    """A model folder, prompts of awkward lengths, and the greedy continuations of transformers, each prompt alone."""

    folder: Path
    prompts: list[list[int]]
    token_ids: list[list[int]]


def greedy_tokens(model: PreTrainedModel, prompt: list[int], new_tokens: int, **options: Any) -> list[int]:
    """Returns what transformers generates after ``prompt``, which it reads alone."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **options
    )
    return out[0, len(prompt) :].tolist()


def make_reference(family: str, folder: Path) -> Reference:
    model = make_model(family, folder)
    prompts = random_prompts(PROMPT_LENGTHS, seed=len(family))
    return Reference(folder, prompts, [greedy_tokens(model, prompt, NEW_TOKENS) for prompt in prompts])
