"""Checkpoints that compressed-tensors and bitsandbytes write themselves, read as they read them. Both are optional and
in no extra: their wheels are not needed to read a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.models import checkpoint
from tests.models.test_quantized import read
from tests.quantized_writer import SIZES, configure, float8, write_model
from tests.tiny_models import make_model


def schemes() -> dict[str, dict[str, Any]]:
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    int8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
    float8 = {"num_bits": 8, "type": "float"}
    tokens = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    return {
        "W4A16": {"weights": {**int4, "symmetric": True}},
        "W4A16-zeros": {"weights": {**int4, "symmetric": False}},
        "W8A16-zeros": {"weights": {**int8, "symmetric": False}},
        "W8A8": {"weights": int8, "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True}},
        "float8-rows": {"weights": {**float8, "strategy": "channel"}, "input_activations": tokens},
        "float8-tensor": {"weights": {**float8, "strategy": "tensor"}, "input_activations": tokens},
        "float8-blocks": {
            "weights": {**float8, "strategy": "block", "block_structure": [40, 24]},
            "input_activations": {**tokens, "strategy": "group", "group_size": 24},
        },
    }


@pytest.mark.parametrize("name", schemes())
@torch.no_grad()
def test_what_compressed_tensors_writes(name: str, tmp_path: Path) -> None:
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme

    assert package
    scheme = QuantizationScheme(targets=["Linear"], **schemes()[name])
    form = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(form.value)
    model = make_model("llama", tmp_path, **SIZES)
    tensors = load_file(tmp_path / "model.safetensors")
    meant = dict(tensors)
    for key in [key for key in tensors if ".layers." in key and tensors[key].dim() == 2]:
        weight = tensors.pop(key)
        stored = compressor.compress({"weight": weight, **parameters(weight, scheme.weights)}, scheme)
        meant[key] = compressor.decompress(stored, scheme)["weight"]
        tensors |= {key.replace("weight", suffix): value.contiguous() for suffix, value in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": "compressed-tensors", "format": form.value, "ignore": ["lm_head"]}
    configure(tmp_path, quantization_config={**config, "config_groups": {"group_0": scheme.model_dump(mode="json")}})
    assert model is not None
    assert_like(tmp_path, meant, tmp_path / "plain")


def parameters(weight: torch.Tensor, args: Any) -> dict[str, torch.Tensor]:
    """Scales and zero points from the least and greatest weight of what shares one."""
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, columns = weight.shape
    block = {"tensor": (rows, columns), "channel": (1, columns), "group": (1, args.group_size)}.get(args.strategy)
    height, width = block or args.block_structure
    tall, wide = -(-rows // height), -(-columns // width)
    padded = torch.nn.functional.pad(weight, (0, wide * width - columns, 0, tall * height - rows))
    blocks = padded.view(tall, height, wide, width)
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    return {"weight_scale": scale, "weight_zero_point": zero}


def assert_like(folder: Path, meant: dict[str, torch.Tensor], plain: Path) -> None:
    plain.mkdir()
    save_file({name: value.float().contiguous() for name, value in meant.items()}, plain / "model.safetensors")
    (plain / "config.json").write_bytes((folder / "config.json").read_bytes())
    configure(plain, quantization_config=None)
    wanted = read(plain, packed=False)
    for packed in (False, True):
        for key, value in read(folder, packed).items():
            torch.testing.assert_close(value, wanted[key], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["llama", "gpt2"])
@torch.no_grad()
def test_what_bitsandbytes_writes(options: dict[str, Any], case: str, tmp_path: Path) -> None:
    package = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_model(case, tmp_path / "plain-model", **(SIZES if case == "llama" else {"n_embd": 64, "n_head": 4}))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain-model",
        quantization_config=BitsAndBytesConfig(**options),
        device_map="cpu",
        dtype=torch.float32,
    )
    model.save_pretrained(tmp_path / "codes")
    meant = {name: value for name, value in load_file(tmp_path / "plain-model" / "model.safetensors").items()}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, package.nn.Linear4bit):
            value = package.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, package.nn.Linear8bitLt):
            state = module.state
            value = weight.data.float() * (weight.SCB if weight.SCB is not None else state.SCB).view(-1, 1) / 127
        else:
            continue
        meant[f"{name}.weight"] = value.T if meant[f"{name}.weight"].shape != value.shape or case == "gpt2" else value
    assert_like(tmp_path / "codes", meant, tmp_path / "plain")
    arch = checkpoint.read_arch(tmp_path / "codes")
    assert bool(checkpoint.prequantized(tmp_path / "codes", arch)) is ("load_in_8bit" in options)


@torch.no_grad()
def test_blocks_of_float8_as_transformers_reads_them(tmp_path: Path) -> None:
    """On a CPU it expands them at load; its blocks have to divide the matrices."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    write_model(tmp_path / "codes", float8(config, (32, 32), "weight_scale_inv"), **SIZES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "codes", dtype=torch.float32)
    assert_like(tmp_path / "codes", dict(model.state_dict()), tmp_path / "plain")
