"""gpt-oss checkpoints as they are published: experts in MXFP4, everything else in numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.tiny_models import make_model, make_tokenizer

LEFT_ALONE = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def pack(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [rows, columns / 32, 16] and scales [rows, columns / 32] of the nearest codes to a matrix."""
    grouped = matrix.float().unflatten(-1, (-1, 32))
    exponents = grouped.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2
    scaled = grouped / torch.exp2(exponents)[..., None]
    codes = (scaled.abs()[..., None] - LEVELS).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8), (exponents + 127).to(torch.uint8)


def plain(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What they mean, written down once more: [..., rows, columns] in float32."""
    table = torch.cat([LEVELS, -LEVELS])
    values = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1).flatten(-2)
    return torch.ldexp(values, (scales.int() - 127)[..., None]).flatten(-2)


def make_packed(folder: Path, expanded: Path | None = None, case: str = "gpt_oss", **overrides) -> PreTrainedModel:
    """A tiny model in MXFP4 in ``folder``, and the same in numbers in ``expanded``; returns transformers' model of
    these."""
    model = make_model(case, folder, **overrides)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        matrices = tensors.pop(name).transpose(1, 2)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack(matrices)
        meant[name] = plain(tensors[f"{name}_blocks"], tensors[f"{name}_scales"]).transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.load_state_dict(meant, strict=False)
    if expanded is not None:
        model.save_pretrained(expanded)
        make_tokenizer(model.config.vocab_size).save_pretrained(expanded)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": LEFT_ALONE}
    (folder / "config.json").write_text(json.dumps(config))
    return model
