"""Checkpoints in codes, written from the published formats with numpy; nothing here comes from the product."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.tiny_models import make_model

Matrix = tuple[dict[str, Tensor], Tensor]
"""Stored tensors by what follows the module's name, and the matrix [rows, columns] that they mean, in float32."""
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}


def bit_words(values: np.ndarray, bits: int) -> Tensor:
    """[rows, n] of numbers of so many bits -> [rows, ceil(n * bits / 32)] int32: one stream of bits for a row, the
    lowest of the first number first."""
    stream = ((values[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(len(values), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view(np.int32).copy())


def tensor(values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def spread(grid: np.ndarray, rows: int, columns: int, block: tuple[int, int]) -> np.ndarray:
    """A scale for every weight, of a scale for every block."""
    return grid[np.arange(rows)[:, None] // block[0], np.arange(columns)[None] // block[1]]


@dataclass(frozen=True)
class Kind:
    """config: the quantization_config. write: sizes and a source of numbers -> a stored matrix."""

    config: dict[str, Any]
    write: Callable[[int, int, np.random.Generator], Matrix]


def scales(shape: tuple[int, ...], draw: np.random.Generator, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return tensor(draw.uniform(0.01, 0.03, shape)).to(dtype)


# compressed-tensors


def integers(bits: int, block: str | int | tuple[int, int], packed: bool, symmetric: bool, order: str = "") -> Kind:
    """block: "tensor", "channel", a group, or rows and columns of a block. order: "" or "group", with g_idx."""

    def write(rows: int, columns: int, draw: np.random.Generator) -> Matrix:
        size = {"tensor": (rows, columns), "channel": (1, columns)}.get(str(block)) or (
            block if isinstance(block, tuple) else (1, int(block))
        )
        shape = (-(-rows // size[0]), -(-columns // size[1]))
        low = -(1 << (bits - 1))
        values = draw.integers(low, -low, (rows, columns))
        zero = np.zeros(shape, int) if symmetric else draw.integers(low, -low, shape)
        scale = scales(shape, draw)
        group = draw.permutation(columns) // size[1] if order else np.arange(columns) // size[1]
        row = np.arange(rows)[:, None] // size[0]
        meant = (values - zero[row, group[None]]) * scale.float().numpy()[row, group[None]]
        stored = {"weight_scale": scale}
        if packed:
            stored |= {
                "weight_packed": bit_words(values - low, bits),
                "weight_shape": torch.tensor([rows, columns]),
            }
        else:
            stored["weight"] = tensor(values, torch.int8)
        if not symmetric:
            words = packed and block != "tensor"  # compressed-tensors packs those of groups and rows alone
            stored["weight_zero_point"] = (
                bit_words((zero - low).T, bits).T.contiguous() if words else tensor(zero, torch.int8)
            )
        if order:
            stored["weight_g_idx"] = tensor(group, torch.int32)
        if block == "tensor":
            stored["weight_scale"] = scale.reshape(1)
        return stored, tensor(meant)

    strategy: dict[str, Any] = {"strategy": block, "group_size": None}
    if isinstance(block, int):
        strategy = {"strategy": "group", "group_size": block}
    if isinstance(block, tuple):
        strategy = {"strategy": "block", "block_structure": list(block)}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "actorder": order or None, **strategy}
    return Kind(compressed({**weights}, "pack-quantized" if packed else "int-quantized"), write)


def compressed(weights: dict[str, Any], form: str, **more: Any) -> dict[str, Any]:
    """The quantization_config, as llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **more,
    }


def float8(
    config: dict[str, Any],
    block: tuple[int, int] | str,
    name: str = "weight_scale",
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
) -> Kind:
    """block: "tensor", "scalar" (with no dimension), "channel", or rows and columns."""

    def write(rows: int, columns: int, draw: np.random.Generator) -> Matrix:
        size = {"tensor": (rows, columns), "scalar": (rows, columns), "channel": (1, columns)}.get(str(block)) or block
        assert not isinstance(size, str)
        shape = (-(-rows // size[0]), -(-columns // size[1]))
        values = tensor(draw.normal(0, 20, (rows, columns))).to(dtype)
        if scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
            exponent = draw.integers(-12, -8, shape)
            meant_scale = 2.0**exponent
            scale = tensor(exponent + 127, torch.uint8)
            scale = scale if scale_dtype == torch.uint8 else scale.view(torch.float8_e8m0fnu)
        else:
            scale = scales(shape, draw, scale_dtype)
            meant_scale = scale.float().numpy()
        meant = values.float().numpy() * spread(meant_scale, rows, columns, size)
        stored = scale.reshape({"tensor": (1,), "scalar": ()}.get(str(block), shape))
        return {"weight": values, name: stored}, tensor(meant)

    return Kind(config, write)


def float8_weights(**strategy: Any) -> dict[str, Any]:
    return compressed({"num_bits": 8, "type": "float", "symmetric": True, **strategy}, "float-quantized")


# bitsandbytes


def levels(kind: str) -> np.ndarray:
    if kind == "fp4":
        # A sign, two bits of exponent with bias 2, one of mantissa; subnormal below; the largest is 1.
        half = [0, 0.0625, 8, 12, 4, 6, 2, 3]
        return np.array([*half, *(-x for x in half)], np.float32) / np.float32(12)
    values = (
        "-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
        "-0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
        "0.44070982933044434 0.5626170039176941 0.7229568362236023 1"
    )
    return np.array(values.split(), np.float32)


def blocks4(kind: str, nested: bool, block: int = 64, storage: torch.dtype = torch.uint8) -> Kind:
    def write(rows: int, columns: int, draw: np.random.Generator) -> Matrix:
        count = rows * columns
        codes, blocks = draw.integers(0, 16, count), -(-count // block)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [rows, columns]}
        stored = {"weight.quant_map": tensor(levels(kind))}
        if nested:
            table = np.sort(draw.uniform(-1, 1, 256)).astype(np.float32)
            largest, outer = draw.integers(0, 256, blocks), draw.uniform(0.1, 0.2, -(-blocks // 256)).astype(np.float32)
            absmax = table[largest] * outer[np.arange(blocks) // 256] + np.float32(0.5)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
            stored |= {
                "weight.absmax": tensor(largest, torch.uint8),
                "weight.nested_absmax": tensor(outer),
                "weight.nested_quant_map": tensor(table),
            }
        else:
            absmax = draw.uniform(0.1, 0.5, blocks).astype(np.float32)
            stored["weight.absmax"] = tensor(absmax)
        stored[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        )
        padded = np.pad(codes, (0, count % 2))
        octets = tensor(padded[0::2] << 4 | padded[1::2], torch.uint8)
        stored["weight"] = octets.view(storage).reshape(-1, 1)
        meant = levels(kind)[codes] * absmax[np.arange(count) // block]
        return stored, tensor(meant.reshape(rows, columns))

    config = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind}
    return Kind({"quant_method": "bitsandbytes", **config, "llm_int8_skip_modules": ["lm_head"]}, write)


def int8_rows(rows: int, columns: int, draw: np.random.Generator) -> Matrix:
    values, largest = draw.integers(-127, 128, (rows, columns)), draw.uniform(1, 3, rows).astype(np.float32)
    meant = values * largest[:, None] / 127
    stored = {"weight": tensor(values, torch.int8), "SCB": tensor(largest)}
    return {**stored, "weight_format": torch.tensor(0, dtype=torch.uint8)}, tensor(meant, torch.float32)


# GPTQ and AWQ


def gptq(bits: int, group: int, version: str = "gptq", order: str = "", sym: bool = False, zeros: bool = True) -> Kind:
    """order: "" or "desc_act" (groups out of order) or "static" (desc_act with groups in order)."""

    def write(rows: int, columns: int, draw: np.random.Generator) -> Matrix:
        size = group if group > 0 else columns
        groups = -(-columns // size)
        codes = draw.integers(0, 1 << bits, (rows, columns))
        zero = np.full((rows, groups), 1 << (bits - 1)) if sym else draw.integers(1, 1 << bits, (rows, groups))
        scale = scales((rows, groups), draw, torch.float16)
        index = np.arange(columns) // size
        index = draw.permutation(index) if order == "desc_act" else index
        meant = (codes - zero[:, index]) * scale.float().numpy()[:, index]
        stored = {
            "qweight": bit_words(codes, bits).T.contiguous(),
            "scales": scale.T.contiguous(),
            "g_idx": tensor(index, torch.int32),
        }
        if zeros:
            stored["qzeros"] = bit_words((zero - (version == "gptq")).T, bits)
        return stored, tensor(meant)

    config = {
        "bits": bits,
        "group_size": group,
        "desc_act": bool(order),
        "static_groups": order == "static",
        "sym": sym,
    }
    return Kind({"quant_method": "gptq", **config, "checkpoint_format": version}, write)


def awq_gemv(group: int) -> Kind:
    def write(rows: int, columns: int, draw: np.random.Generator) -> Matrix:
        groups = columns // group
        # calculate_zeros_width of AutoAWQ.
        step = {128: 1, 64: 2, 32: 4}[group]
        width = math.ceil(math.ceil(groups / 8) / step) * step
        codes, zero = draw.integers(0, 16, (rows, columns)), draw.integers(0, 16, (rows, groups))
        scale = scales((rows, groups), draw, torch.float16)
        index = np.arange(columns) // group
        padded = torch.zeros(rows, 8 * width, dtype=torch.float16)
        padded[:, :groups] = scale
        stored = {
            "qweight": bit_words(codes, 4),
            "qzeros": bit_words(np.pad(zero, ((0, 0), (0, 8 * width - groups))), 4),
            "scales": padded,
        }
        return stored, tensor((codes - zero[:, index]) * scale.float().numpy()[:, index])

    return Kind({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemv"}, write)


BLOCK_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
INT4 = integers(4, 32, packed=True, symmetric=True)
KINDS: dict[str, Kind] = {
    "int4": INT4,
    "int4-zeros": integers(4, 32, packed=True, symmetric=False),
    "int4-rows": integers(4, "channel", packed=True, symmetric=True),
    "int4-rows-zeros": integers(4, "channel", packed=True, symmetric=False),
    "int4-tensor-zeros": integers(4, "tensor", packed=True, symmetric=False),
    "int8": integers(8, 32, packed=True, symmetric=True),
    "int8-rows-zeros": integers(8, "channel", packed=True, symmetric=False),
    "int2": integers(2, 32, packed=True, symmetric=False),
    "int4-ordered": integers(4, 32, packed=True, symmetric=True, order="group"),
    "bytes-rows": integers(8, "channel", packed=False, symmetric=True),
    "bytes-rows-zeros": integers(8, "channel", packed=False, symmetric=False),
    "bytes-tensor": integers(8, "tensor", packed=False, symmetric=True),
    "bytes-4-bits": integers(4, 16, packed=False, symmetric=False),
    "bytes-blocks": integers(8, (16, 32), packed=False, symmetric=True),
    "float8-tensor": float8(float8_weights(strategy="tensor"), "tensor"),
    "float8-rows": float8(float8_weights(strategy="channel"), "channel", scale_dtype=torch.bfloat16),
    "float8-groups": float8(float8_weights(strategy="group", group_size=16), (1, 16)),
    "float8-blocks": float8(float8_weights(strategy="block", block_structure=[16, 32]), (16, 32)),
    "fp8-blocks": float8({**BLOCK_CONFIG, "weight_block_size": [48, 40]}, (48, 40), "weight_scale_inv"),
    "fp8-exponents": float8(
        {**BLOCK_CONFIG, "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}, (32, 32), "weight_scale_inv",
        scale_dtype=torch.uint8,
    ),
    "fp8-e8m0": float8(
        {**BLOCK_CONFIG, "weight_block_size": [32, 32]}, (32, 32), "weight_scale_inv", scale_dtype=torch.float8_e8m0fnu
    ),
    "fp8-matrix": float8(BLOCK_CONFIG, "scalar"),
    "fp8-matrix-inv": float8(BLOCK_CONFIG, "tensor", "weight_scale_inv"),
    "fp8-e5m2": float8({**BLOCK_CONFIG, "fmt": "e5m2"}, "scalar", dtype=torch.float8_e5m2),
    "fbgemm": float8({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, "channel"),
    "nf4": blocks4("nf4", nested=False),
    "nf4-double": blocks4("nf4", nested=True),
    "fp4": blocks4("fp4", nested=False, block=128),
    "nf4-in-bfloat16": blocks4("nf4", nested=True, block=32, storage=torch.bfloat16),
    "bnb-int8": Kind({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, int8_rows),
    "gptq-8": gptq(8, 32),
    "gptq-3": gptq(3, 32),
    "gptq-2": gptq(2, 32, "gptq_v2"),
    "gptq-8-rows-v2": gptq(8, -1, "gptq_v2"),
    "gptq-desc-act": gptq(4, 32, order="desc_act"),
    "gptq-desc-act-8": gptq(8, 32, "gptq_v2", order="desc_act"),
    "gptq-static-groups": gptq(4, 32, order="static"),
    "gptq-sym": gptq(4, 32, sym=True),
    "gptq-no-zeros": gptq(4, 32, sym=True, zeros=False),
    "gptq-short-group": gptq(4, 40),
    "awq-gemv": awq_gemv(32),
}  # fmt: skip


def linear_modules(model: nn.Module, kind: Kind) -> dict[str, nn.Module]:
    """Those that quantizers convert: linear maps within the layers."""
    classes = (nn.Linear, Conv1D) if kind.config["quant_method"] in ("bitsandbytes", "gptq") else (nn.Linear,)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, classes) and any(part.isdigit() for part in name.split("."))
    }


def write_model(
    folder: Path, kind: Kind, case: str = "llama", left: tuple[str, ...] = (), **overrides: Any
) -> nn.Module:
    """A tiny model whose matrices are stored as ``kind``, but for the modules in ``left``. Returns the torch model with
    what they mean."""
    model = make_model(case, folder, **overrides)
    tensors, draw = load_file(folder / "model.safetensors"), np.random.default_rng(5)
    for name, module in linear_modules(model, kind).items():
        if name in left or f"{name}.weight" not in tensors:
            continue
        turned = isinstance(module, Conv1D)
        rows, columns = tensors.pop(f"{name}.weight").shape[:: -1 if turned else 1]
        stored, meant = kind.write(rows, columns, draw)
        tensors |= {f"{name}.{suffix}": value.contiguous() for suffix, value in stored.items()}
        module.weight.data = (meant.T if turned else meant).contiguous().clone()
    save_file(tensors, folder / "model.safetensors")
    configure(folder, quantization_config=kind.config)
    return model


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
