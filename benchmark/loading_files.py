"""Checkpoints of random weights in each of the formats that are read, of one shape: what `benchmark.loading` opens.

Values are as likely as trained ones where that matters for time: codes are random, and scales give weights of about the
usual size. Shapes of Llama, Mistral and Qwen 2 only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from flexbatch.models.resolve import DEMO

GROUP = 128
"""Numbers that share a scale in the 4-bit checkpoints."""
BLOCK = 128
"""Rows and columns that share one in FP8."""
GGUF_TYPES = {"gguf-q4_0": ("Q4_0", 32, 18), "gguf-q8_0": ("Q8_0", 32, 34), "gguf-q4_k": ("Q4_K", 256, 144)}
"""Type, numbers and bytes of a block. Two are kept in their codes, the third is expanded."""
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

Matrix = Callable[[int, int, str], dict[str, Tensor]]
"""Rows, columns and device -> the tensors of a matrix, by what follows its module's name."""


def projections(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the linear modules of a layer."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, config["num_key_value_heads"] * head
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def drawn_codes(rows: int, columns: int, device: str) -> Tensor:
    """Eight 4-bit codes in every number."""
    return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32, device=device).cpu()


def drawn_scales(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(*shape) * 0.01 + 0.001).to(dtype)


def bf16_matrix(rows: int, columns: int, device: str) -> dict[str, Tensor]:
    return {"weight": (torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02).cpu()}


def gptq_matrix(rows: int, columns: int, device: str) -> dict[str, Tensor]:
    return {
        "qweight": drawn_codes(columns // 8, rows, device),
        "qzeros": drawn_codes(columns // GROUP, rows // 8, device),
        "scales": drawn_scales(columns // GROUP, rows),
        "g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
    }


def awq_matrix(rows: int, columns: int, device: str) -> dict[str, Tensor]:
    return {
        "qweight": drawn_codes(columns, rows // 8, device),
        "qzeros": drawn_codes(columns // GROUP, rows // 8, device),
        "scales": drawn_scales(columns // GROUP, rows),
    }


def packed_matrix(rows: int, columns: int, device: str) -> dict[str, Tensor]:
    return {
        "weight_packed": drawn_codes(rows, columns // 8, device),
        "weight_scale": drawn_scales(rows, columns // GROUP, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }


def fp8_matrix(rows: int, columns: int, device: str) -> dict[str, Tensor]:
    weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16).to(torch.float8_e4m3fn).cpu()
    scales = drawn_scales(-(-rows // BLOCK), -(-columns // BLOCK), dtype=torch.float32)
    return {"weight": weight, "weight_scale_inv": scales}


FOUR_BITS = {"bits": 4, "group_size": GROUP}
PACKED = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": GROUP, "strategy": "group"}
SAFETENSORS: dict[str, tuple[Matrix, dict[str, Any] | None]] = {
    "bf16": (bf16_matrix, None),
    "gptq": (gptq_matrix, {"quant_method": "gptq", **FOUR_BITS, "desc_act": False, "sym": False}),
    "awq": (awq_matrix, {"quant_method": "awq", **FOUR_BITS, "zero_point": True, "version": "gemm"}),
    "compressed-tensors": (
        packed_matrix,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": PACKED}},
            "ignore": ["lm_head"],
        },
    ),
    "fp8": (
        fp8_matrix,
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"},
    ),
}
"""The matrices of a format, and its quantization_config."""
FORMATS = (*SAFETENSORS, *GGUF_TYPES)
BITS = {"bf16": 16, "fp8": 8, "gguf-q8_0": 8}
"""Of a number; of the other formats 4."""


def write_checkpoint(config: dict[str, Any], form: str, folder: Path, device: str) -> Path:
    """Returns what is opened: the folder, or its GGUF file."""
    folder.mkdir(parents=True)
    if form in GGUF_TYPES:
        return write_gguf(config, GGUF_TYPES[form], folder / "model.gguf")
    write_safetensors(config, *SAFETENSORS[form], folder, device)
    return folder


def write_safetensors(
    config: dict[str, Any], matrix: Matrix, quantization: dict[str, Any] | None, folder: Path, device: str
) -> None:
    """One file a layer, and one for embedding, last norm and head."""
    weights: dict[str, str] = {}
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    for layer in range(-1, config["num_hidden_layers"]):
        if layer < 0:
            tensors = {
                "model.embed_tokens.weight": bf16_matrix(vocabulary, hidden, device)["weight"],
                "lm_head.weight": bf16_matrix(vocabulary, hidden, device)["weight"],
                "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            }
        else:
            prefix = f"model.layers.{layer}"
            tensors = {
                f"{prefix}.{name}.{part}": tensor
                for name, sizes in projections(config).items()
                for part, tensor in matrix(*sizes, device).items()
            }
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        file = f"model-{layer + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weights |= dict.fromkeys(tensors, file)
    written = {"torch_dtype": "bfloat16", **config}
    if quantization is not None:
        written["quantization_config"] = quantization
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def write_gguf(config: dict[str, Any], blocks: tuple[str, int, int], path: Path) -> Path:
    from gguf import GGMLQuantizationType, GGUFWriter

    name, elements, size = blocks
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    writer = GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or hidden // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, 256, (1 << 22) + 7, dtype=np.uint8)

    def coded(rows: int, columns: int) -> np.ndarray:
        data = np.resize(drawn, (rows, columns // elements, size))
        scale = np.array([0.002, 0.002], dtype=np.float16).view(np.uint8)
        data[:, :, : 4 if name == "Q4_K" else 2] = scale[: 4 if name == "Q4_K" else 2]
        return data.reshape(rows, -1)

    def table() -> np.ndarray:
        values = generator.standard_normal(1 << 22, dtype=np.float32) * 0.02
        return np.resize(values.astype(np.float16), (vocabulary, hidden))

    ones = np.ones(hidden, dtype=np.float32)
    writer.add_tensor("token_embd.weight", table())
    writer.add_tensor("output.weight", table())
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(config["num_hidden_layers"]):
        for module, (rows, columns) in projections(config).items():
            kind = GGMLQuantizationType[name]
            writer.add_tensor(f"blk.{layer}.{GGUF_NAMES[module]}.weight", coded(rows, columns), raw_dtype=kind)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
