"""Whole models in GGUF files, written as the converters of llama.cpp write them, against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexbatch.models import checkpoint
from tests.gguf_writer import write_gguf
from tests.models.dense import DenseModel
from tests.tiny_models import make_model, random_prompts

LENGTHS = [1, 37, 5, 90]
CASES = {
    "llama": {},
    "llama-tied": {},
    "llama-single": {},
    "llama-rope3": {},
    "llama-linear": {},
    "llama-yarn": {},
    "mistral-full": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3": {"sliding_window_pattern": 6, "num_hidden_layers": 7},
    "gemma3-linear": {
        "layer_types": None,
        "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "phi": {},
    "phi3": {},
    "phi3-longrope": {},
    "glm4": {},
    "starcoder2": {"sliding_window": None},
    "stablelm": {},
    "stablelm-parallel": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_neox-serial": {},
    "bloom": {},
    "falcon-7b": {},
    "falcon-40b": {},
    "falcon-11b": {},
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "qkv_bias": True},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "olmoe": {},
    "gpt_oss": {"swiglu_limit": 7.0},
    "gpt_oss-plain": {"layer_types": None, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
}
"""Cases of FAMILY_CASES, with changes: what a file cannot say is as llama.cpp takes it."""


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    model = make_model(case, tmp_path, tokenizer=False, **CASES[case])
    path = tmp_path / "model.gguf"
    write_gguf(model, path)
    arch = checkpoint.read_arch(path)
    own = checkpoint.read_arch(tmp_path)
    assert (arch.num_layers, arch.max_positions, arch.rotary_dim) == (own.num_layers, own.max_positions, own.rotary_dim)
    stages = checkpoint.load(path, arch, torch.float32)
    prompts = random_prompts(LENGTHS)
    found = DenseModel(arch, stages, len(prompts), max(LENGTHS)).step(prompts)
    for prompt, logits in zip(prompts, found, strict=True):
        wanted = model(torch.tensor([prompt])).logits[0]
        assert wanted.std() > 0.3, "logits without gaps would prove nothing"
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-5)
