"""Quantized checkpoints that are damaged, contradict their config.json, or are of a kind that is not known: an error
that names the tensor or the key, and never plain numbers of what are codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexbatch.models import checkpoint
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.quantized.config import read_quantization
from tests.grids import grid
from tests.models.test_quantized import read
from tests.quantized_writer import KINDS, SIZES, Kind, compressed, configure, float8_weights, write_model

SMALL = {**SIZES, "num_hidden_layers": 1}
MODULE = "model.layers.0.self_attn.o_proj"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound folder of every kind that is spoiled below."""
    kinds = {name for name, *_ in SPOILED}
    return {name: made(name, tmp_path_factory.mktemp(name)) for name in sorted(kinds)}


def made(name: str, folder: Path) -> Path:
    write_model(folder, KINDS[name], **SMALL)
    return folder


def spoiled(source: Path, folder: Path, edit: Callable[[Tensors], Any]) -> Path:
    tensors = {key: value.clone() for key, value in load_file(source / "model.safetensors").items()}
    edit(tensors)
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def put(part: str, value: Any) -> Callable[[Tensors], Any]:
    """Replaces a tensor of the module by ``value``, or by what it makes of the old one."""

    def edit(tensors: Tensors) -> None:
        old = tensors[f"{MODULE}.{part}"]
        tensors[f"{MODULE}.{part}"] = value(old) if callable(value) else value

    return edit


def drop(part: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{MODULE}.{part}")


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def changed(old: Tensor) -> Tensor:
        wide = old.float().reshape(-1)
        wide[-1] = value
        return wide.reshape(old.shape).to(old.dtype)

    return changed


def state(**changes: Any) -> Callable[[Tensor], Tensor]:
    def changed(old: Tensor) -> Tensor:
        values = json.loads(bytes(old.tolist())) | changes
        return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    return changed


NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
SPOILED: list[tuple[str, Callable[[Tensors], Any], str]] = [
    ("int4", drop("weight_scale"), r"lack .*o_proj\.weight_scale"),
    ("int4", drop("weight_packed"), r"lack .*o_proj\.weight_packed"),
    ("int4", put("weight_packed", torch.zeros(64, 7, dtype=torch.int32)), r"weight_packed has shape \[64, 7\], wanted"),
    ("int4", put("weight_packed", lambda old: old.long()), r"weight_packed holds I64, wanted I32"),
    ("int4", put("weight_scale", lambda old: old[:, :1]), r"weight_scale has shape \[64, 1\], wanted \[64, 2\]"),
    ("int4", put("weight_scale", with_one(torch.nan)), r"o_proj: weight_scale holds NaN or infinity"),
    ("int4", put("weight_scale", with_one(torch.inf)), r"o_proj: weight_scale holds NaN or infinity"),
    ("int4", put("weight_scale", lambda old: old.int()), r"weight_scale holds I32, wanted F32 or F16 or BF16"),
    ("int4", put("weight_shape", torch.tensor([64, 60])), r"o_proj: weight_shape is \[64, 60\], wanted \[64, 64\]"),
    ("int4", lambda t: t.update({f"{MODULE}.weight": torch.ones(64, 64)}), r"o_proj\.weight does not belong to"),
    ("int4-zeros", drop("weight_zero_point"), r"lack .*o_proj\.weight_zero_point"),
    ("int4-zeros", put("weight_zero_point", lambda old: old.t().contiguous()), r"weight_zero_point has shape \[2, 8\]"),
    ("int4-zeros", put("weight_zero_point", torch.zeros(64, 2, dtype=torch.int32)), r"zero_point holds I32 of shape"),
    ("int4-zeros", put("weight_zero_point", lambda old: old.to(torch.int8)), r"zero_point holds I8 of shape \[8, 2\]"),
    ("int4-ordered", drop("weight_g_idx"), r"lack .*o_proj\.weight_g_idx"),
    ("int4-ordered", put("weight_g_idx", with_one(2)), r"o_proj: weight_g_idx names groups 0 to 2; there are 2"),
    ("int4-ordered", put("weight_g_idx", with_one(-1)), r"o_proj: weight_g_idx names groups -1 to 1; there are 2"),
    ("int4-ordered", put("weight_g_idx", lambda old: old[:9]), r"weight_g_idx has shape \[9\], wanted \[64\]"),
    ("bytes-4-bits", put("weight", with_one(9)), r"o_proj: weight holds numbers that are none of 4 bits"),
    ("bytes-rows", drop("weight_scale"), r"lack .*o_proj\.weight_scale"),
    ("bytes-rows", put("weight", lambda old: old.to(torch.uint8)), r"o_proj\.weight holds U8, wanted I8"),
    ("float8-rows", drop("weight_scale"), r"o_proj\.weight_scale"),
    ("float8-rows", put("weight_scale", with_one(torch.nan)), r"o_proj: weight_scale holds NaN"),
    ("float8-rows", put("weight", lambda old: old[:7]), r"o_proj\.weight has shape \[7, 64\], wanted \[64, 64\]"),
    ("fp8-blocks", drop("weight_scale_inv"), r"o_proj\.weight holds F8_E4M3, and has neither a weight_scale nor a"),
    (
        "fp8-blocks",
        put("weight_scale_inv", lambda old: old[:1]),
        r"weight_scale_inv has shape \[1, 2\], wanted \[2, 2\]",
    ),
    ("fp8-blocks", lambda t: t.update({f"{MODULE}.weight_scale": torch.ones(2, 2)}), r"has both of weight_scale and"),
    ("fp8-blocks", put("weight_scale_inv", with_one(-torch.inf)), r"o_proj: weight_scale_inv holds NaN or infinity"),
    ("fp8-blocks", drop("weight"), r"lack .*o_proj\.weight$"),
    ("nf4", drop(NF4_STATE), r"o_proj\.weight holds U8, wanted floating-point"),
    ("nf4", drop("weight.absmax"), r"lack .*o_proj\.weight\.absmax"),
    ("nf4", put("weight.absmax", with_one(torch.nan)), r"o_proj: weight\.absmax holds NaN"),
    (
        "nf4",
        put("weight.absmax", lambda old: old[:32]),
        r"o_proj: weight\.absmax has 32 scales, wanted one for each 64",
    ),
    ("nf4", put("weight", lambda old: old[:-1]), r"o_proj\.weight has shape \[2047, 1\]"),
    ("nf4", put(NF4_STATE, torch.zeros(40, dtype=torch.uint8)), r"o_proj: its quant_state is no JSON"),
    (
        "nf4",
        put(NF4_STATE, torch.tensor(list(b"[1,2]"), dtype=torch.uint8)),
        r"o_proj: its quant_state is no JSON object",
    ),
    ("nf4", put(NF4_STATE, state(blocksize=0)), r"o_proj: its quant_state has blocksize=0"),
    ("nf4", put(NF4_STATE, state(blocksize="64")), r"o_proj: its quant_state has blocksize='64'"),
    ("nf4", put(NF4_STATE, state(shape=[64, 65])), r"o_proj: its quant_state has the shape \[64, 65\]"),
    ("nf4-double", put(NF4_STATE, state(nested_offset=torch.nan)), r"its quant_state has nested_offset=nan"),
    ("nf4-double", drop("weight.nested_absmax"), r"weight\.absmax is quantized, but nested_absmax is missing"),
    ("nf4-double", put("weight.nested_quant_map", with_one(torch.nan)), r"nested_quant_map holds NaN"),
    ("bnb-int8", drop("SCB"), r"lack .*o_proj\.SCB"),
    ("bnb-int8", put("SCB", with_one(torch.nan)), r"o_proj: SCB holds NaN"),
    ("bnb-int8", put("weight_format", torch.tensor(2, dtype=torch.uint8)), r"o_proj: weight_format is 2"),
    ("gptq-desc-act", drop("g_idx"), r"lack .*o_proj\.g_idx"),
    ("gptq-desc-act", put("g_idx", with_one(7)), r"o_proj: g_idx names groups 0 to 7; there are 2"),
    ("gptq-desc-act", put("scales", with_one(torch.nan)), r"o_proj: scales holds NaN"),
    ("gptq-8", drop("qzeros"), r"lack .*o_proj\.qzeros"),
    ("gptq-8", put("qweight", lambda old: old[:8]), r"o_proj\.qweight has shape \[8, 64\], wanted \[16, 64\]"),
    ("awq-gemv", put("scales", lambda old: old[:, :8]), r"o_proj\.scales has shape \[64, 8\], wanted \[64, 32\]"),
]


@pytest.mark.parametrize("placement", range(len(SPOILED)), ids=lambda placement: f"{placement}-{SPOILED[placement][0]}")
def test_what_is_wrong_is_named(placement: int, folders: dict[str, Path], tmp_path: Path) -> None:
    name, edit, message = SPOILED[placement]
    folder = spoiled(folders[name], tmp_path, edit)
    for packed in (False, True):
        with pytest.raises(CheckpointError, match=message) as error:
            read(folder, packed)
        assert "model.safetensors" in str(error.value) and "o_proj" in str(error.value)


CODED = [name for name in KINDS if not name.startswith(("gptq", "awq"))]


@pytest.mark.parametrize(("name", "left"), grid(CODED, ["none", "null", "empty"]))
def test_codes_without_a_quantization_config_are_no_numbers(name: str, left: str, tmp_path: Path) -> None:
    """Of 8-bit floats the numbers themselves would load, without their scales."""
    write_model(tmp_path, KINDS[name], **SMALL)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("quantization_config")
    changed = {
        "none": config,
        "null": {**config, "quantization_config": None},
        "empty": {**config, "quantization_config": {}},
    }
    (tmp_path / "config.json").write_text(json.dumps(changed[left]))
    arch = checkpoint.read_arch(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\..*no quantization_config of config.json"):
        checkpoint.check(tmp_path, arch)


def test_no_float8_is_read_without_a_scale(tmp_path: Path) -> None:
    """Norms, biases and embeddings neither, with any configuration."""
    write_model(tmp_path / "sound", KINDS["fp8-matrix"], **SMALL)
    for name in ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"):
        folder = spoiled(
            tmp_path / "sound",
            tmp_path / "spoiled",
            lambda t, name=name: t.update({name: t[name].to(torch.float8_e4m3fn)}),
        )
        with pytest.raises(CheckpointError, match=rf"{name} holds F8_E4M3"):
            read(folder, packed=True)


OTHERS = ("int4", "int8", "float8-rows", "fp8-blocks", "nf4", "bnb-int8", "gptq-8", "awq-gemv")


@pytest.mark.parametrize(("name", "said"), grid(OTHERS[::-1], OTHERS))
def test_a_config_of_other_files_is_no_reason_for_wrong_numbers(name: str, said: str, tmp_path: Path) -> None:
    if name == said:
        return
    write_model(tmp_path, KINDS[name], **SMALL)
    configure(tmp_path, quantization_config=KINDS[said].config)
    with pytest.raises(CheckpointError, match=r"layers\.0\."):
        read(tmp_path, packed=True)


def int4(**changes: Any) -> dict[str, Any]:
    return compressed(
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **changes}, "pack-quantized"
    )


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({"quant_method": name}, f"quant_method '{name}' is not supported")
        for name in ("hqq", "aqlm", "quanto", "higgs")
    ),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method 'modelopt' is not supported"),
    ({}, ""),
    *(
        ({**int4(), "format": name}, f"{name}' is not supported; supported: pack-quantized")
        for name in (
            "marlin-24",
            "nvfp4-pack-quantized",
            "mxfp4-pack-quantized",
            "sparse-24-bitmask",
            "mixed-precision",
        )
    ),
    ({**int4(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format"),
    ({**int4(), "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    *((int4(num_bits=bits), "pack-quantized of int with") for bits in (3, 5, 6, 7, 16)),
    (int4(num_bits="4"), "num_bits='4' must be a whole number"),
    (int4(type="float"), "pack-quantized of 4-bit floats"),
    (int4(strategy="tensor_group"), "strategy: 'tensor_group'"),
    (int4(strategy="group", group_size=None), "strategy: 'group'"),
    (int4(strategy="block"), "strategy: 'block'"),
    (int4(group_size=-7), "group_size=-7"),
    ({**int4(), "config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16"),
    ({**int4(), "ignore": ["re:("]}, "ignore: '\\(' is no regular expression"),
    ({**int4(), "ignore": "lm_head"}, "ignore='lm_head' must be a list"),
    (float8_weights(strategy="block", block_structure=[0, 128]), "block_structure"),
    (float8_weights(strategy="block", block_structure="128x128"), "block_structure"),
    ({**KINDS["fp8-blocks"].config, "weight_block_size": [128]}, "weight_block_size"),
    (
        {**KINDS["fp8-blocks"].config, "modules_to_not_convert": ["["]},
        "modules_to_not_convert: .* no regular expression",
    ),
    ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True},
        "both load_in_4bit and load_in_8bit",
    ),
    ({"quant_method": "bitsandbytes", "load_in_4bit": 1}, "load_in_4bit=1 must be true or false"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:(": {}}}, "dynamic: '\\(' is no regular expression"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": {"bits": 5}}}, "5 bits"),
]


@pytest.mark.parametrize("placement", range(len(REFUSED)))
def test_what_is_not_known_is_refused_by_name(placement: int) -> None:
    config, message = REFUSED[placement]
    if not config:
        assert read_quantization({"quantization_config": config}) is None
        return
    with pytest.raises(CheckpointError, match=message) as error:
        read_quantization({"quantization_config": config})
    assert "config.json: " in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, *_ in SPOILED}))
def test_mutations_of_headers_and_codes(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """200 of each kind: an error that says what, or a model."""
    draw = np.random.default_rng(0)
    source = (folders[name] / "model.safetensors").read_bytes()
    header = int.from_bytes(source[:8], "little")
    (tmp_path / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
    refused = 0
    for _ in range(200):
        data = bytearray(source)
        for _ in range(draw.integers(1, 4)):
            # Half of them in the header, whose bytes say shapes and types.
            end = 8 + header if draw.random() < 0.5 else len(data)
            data[draw.integers(8, end)] = draw.integers(0, 256)
        (tmp_path / "model.safetensors").write_bytes(data)
        try:
            read(tmp_path, packed=True)
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_dense_checkpoints_of_compressed_tensors_are_plain(tmp_path: Path) -> None:
    """Calibrated, and saved without compression."""
    kind = Kind(compressed({"num_bits": 4, "strategy": "group", "group_size": 32}, "dense"), KINDS["int4"].write)
    model = write_model(tmp_path, kind, left=tuple(name for name in MODULES), **SMALL)
    found = read(tmp_path, packed=True)
    assert torch.equal(found[0, "o.weight"], model.model.layers[0].self_attn.o_proj.weight.data)


MODULES = [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"] + [
    f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")
]


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_a_pointer_of_git_lfs_is_told(name: str, tmp_path: Path) -> None:
    """What a clone without Git LFS has in a file's stead."""
    write_model(tmp_path, KINDS["int4"], **SMALL)
    arch = checkpoint.read_arch(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n")
    with pytest.raises(CheckpointError, match=rf"{name} .* git lfs pull"):
        checkpoint.check(tmp_path / name if name.endswith(".gguf") else tmp_path, arch)
