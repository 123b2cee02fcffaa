"""Tiny random models of every family, saved as Hugging Face folders with a tokenizer. Sizes are awkward on purpose."""

from __future__ import annotations

import itertools
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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
LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# name -> (model_type, configuration). The part of the name before "-" is the family.
FAMILY_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "opt",
        {"hidden_size": 60, "ffn_dim": 92, "num_hidden_layers": 3, "num_attention_heads": 5, "word_embed_proj_dim": 60, "max_position_embeddings": 512},
    ),
    "opt-tiny": (
        "opt",
        {"hidden_size": 12, "ffn_dim": 20, "num_hidden_layers": 1, "num_attention_heads": 1, "word_embed_proj_dim": 12, "max_position_embeddings": 512},
    ),
    "llama": ("llama", LLAMA_SIZES),
    "llama-tied": ("llama", {**LLAMA_SIZES, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-single": ("llama", {**LLAMA_SIZES, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "llama-rope3": ("llama", {**LLAMA_SIZES, "rope_parameters": {"rope_theta": 5000.0, **LLAMA3_SCALING}}),
    "llama-linear": ("llama", {**LLAMA_SIZES, "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}),
    "llama-dynamic": (
        "llama",
        {**LLAMA_SIZES, "max_position_embeddings": 256, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0}},
    ),
    "llama-yarn": (
        "llama",
        {**LLAMA_SIZES, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}},
    ),
}


def make_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows every byte; merges of two letters fill the vocabulary, so that every token id of a model decodes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    if vocab_size < len(vocab):
        raise ValueError(f"vocab_size={vocab_size} must be at least {len(vocab)}: every byte and {len(SPECIAL)} special tokens")
    merges = list(itertools.islice(itertools.product(string.ascii_lowercase, repeat=2), vocab_size - len(vocab)))
    vocab |= {first + second: len(vocab) + index for index, (first, second) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[PAD], bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS])


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Random norms and biases too (their defaults of one and zero hide mistakes), and weights large enough that logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # Whatever a norm starts from (one, or zero where the model adds one itself) stays its centre.
                parameter.copy_(0.3 * noise if name.endswith("bias") else parameter.mean() + 0.3 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)


def make_model(family: str, folder: Path | str, *, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> PreTrainedModel:
    """Build the case ``family`` of FAMILY_CASES with ``overrides`` of its configuration, save it to ``folder``, return it in float32 (eval mode).

    ``vocab_size`` (default 307), ``pad_token_id``, ``bos_token_id`` and ``eos_token_id`` can be overridden like any other key.
    """
    kind, config = FAMILY_CASES[family]
    config = {"vocab_size": VOCAB, **TOKENS, **config, **overrides}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32).eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer(config["vocab_size"]).save_pretrained(folder)
    return model


def random_prompts(lengths: list[int], vocab_size: int = VOCAB, seed: int = 0) -> list[list[int]]:
    """One random prompt for every length, without special tokens, all different."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(SPECIAL), vocab_size, (length,), generator=generator).tolist() for length in lengths]
