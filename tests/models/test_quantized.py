"""compressed-tensors, FP8, bitsandbytes, and the further forms of GPTQ and AWQ, against arithmetic from their published
formats (tests/quantized_writer.py)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.models import checkpoint
from flexbatch.models.checkpoint import CheckpointError, QuantizedPiece
from flexbatch.models.fingerprint import WeightFiles, model_files_digest
from flexbatch.models.quantized.decoding import planned_formats
from flexbatch.models.quantized.scheme import Form
from flexbatch.models.specs import weight_specs
from tests.grids import grid
from tests.quantized_writer import KINDS, SIZES, Kind, configure, write_model
from tests.tiny_models import FAMILY_CASES

MATRICES = ("qkv.weight", "o.weight", "gate_up.weight", "down.weight")
FORMS: dict[str, Form | None] = {
    **dict.fromkeys(("int4", "int4-zeros", "int2"), Form(4, 32)),
    "int8": Form(8, 32),
    "bytes-4-bits": Form(4, 16),
    "bytes-blocks": Form(8, 32),
    **dict.fromkeys(("gptq-3", "gptq-2", "gptq-static-groups", "gptq-sym", "gptq-no-zeros", "awq-gemv"), Form(4, 32)),
    "gptq-short-group": Form(4, 40),
    "gptq-8": Form(8, 32),
}
"""What the matrices are kept in. Others are expanded, or have a scale for a row."""
BY_ROWS = {
    **dict.fromkeys(("int4-rows", "int4-rows-zeros", "int4-tensor-zeros"), 4),
    **dict.fromkeys(("int8-rows-zeros", "bytes-rows", "bytes-rows-zeros", "bytes-tensor", "bnb-int8"), 8),
    "gptq-8-rows-v2": 8,
}


def read(folder: Path, packed: bool) -> dict[tuple[int, str], torch.Tensor]:
    """Every canonical tensor; each row is delivered once."""
    arch = checkpoint.read_arch(folder)
    found = {(spec.layer, spec.role): torch.full(spec.shape, torch.nan) for spec in weight_specs(arch)}
    stream = checkpoint.stream(folder, arch, packed=True) if packed else checkpoint.stream(folder, arch)
    for piece in stream:
        if isinstance(piece, QuantizedPiece):
            piece = piece.dense()
        target = found[piece.layer, piece.role][piece.rows or slice(None)]
        assert target.isnan().all()
        target.copy_(piece.tensor)
    return found


def assert_read_as_meant(folder: Path, model: torch.nn.Module, plain: Path) -> None:
    """Like the same model in plain float32."""
    model.save_pretrained(plain)
    meant = read(plain, packed=False)
    for packed in (False, True):
        for key, tensor in read(folder, packed).items():
            torch.testing.assert_close(
                tensor, meant[key], atol=1e-6, rtol=2e-7, msg=lambda text, key=key: f"{key} {text}"
            )


@pytest.mark.parametrize("name, file", [("gptq-8", "quantize_config.json"), ("awq-gemv", "quant_config.json")])
def test_older_folders_tell_it_in_a_file_beside(name: str, file: str, tmp_path: Path) -> None:
    """AutoGPTQ and AutoAWQ did, with keys of their own and no quant_method."""
    model = write_model(tmp_path / "codes", KINDS[name], **{**SIZES, "num_hidden_layers": 1})
    before = WeightFiles(tmp_path / "codes").identity
    configure(tmp_path / "codes", quantization_config=None)
    told = {key: value for key, value in KINDS[name].config.items() if key != "quant_method"}
    if name.startswith("awq"):
        told = {"zero_point": True, "q_group_size": told["group_size"], "w_bit": told["bits"], "version": "GEMV"}
    (tmp_path / "codes" / file).write_text(json.dumps({**told, "model_file_base_name": None}))
    assert_read_as_meant(tmp_path / "codes", model, tmp_path / "plain")
    assert checkpoint.prequantized(tmp_path / "codes", checkpoint.read_arch(tmp_path / "codes"))
    found = WeightFiles(tmp_path / "codes").identity
    (tmp_path / "codes" / file).write_text(json.dumps({**told, "group_size": 64}))
    assert len({before, found, WeightFiles(tmp_path / "codes").identity}) == 3
    assert file in model_files_digest(tmp_path / "codes")


@pytest.mark.parametrize("name", KINDS)
def test_codes_mean_what_the_format_says(name: str, tmp_path: Path) -> None:
    """And without the files, the configuration tells how they would be kept."""
    model = write_model(tmp_path / "codes", KINDS[name], **{**SIZES, "num_hidden_layers": 1})
    arch = checkpoint.read_arch(tmp_path / "codes")
    found = checkpoint.prequantized(tmp_path / "codes", arch)
    if name in BY_ROWS:
        assert found == {role: Form(BY_ROWS[name], 96 if role == "down.weight" else 64) for role in MATRICES}
    else:
        assert found == (dict.fromkeys(MATRICES, FORMS[name]) if name in FORMS else {})
    quantization = checkpoint.quantization_of(tmp_path / "codes")
    assert quantization is not None and planned_formats(quantization, arch) == found
    assert_read_as_meant(tmp_path / "codes", model, tmp_path / "plain")


@pytest.mark.parametrize("name", ["int4-ordered", "bytes-rows", "fp8-exponents", "nf4-in-bfloat16", "gptq-3"])
def test_pytorch_files_are_read_alike(name: str, tmp_path: Path) -> None:
    write_model(tmp_path, KINDS[name], **{**SIZES, "num_hidden_layers": 1})
    wanted = read(tmp_path, packed=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    found = read(tmp_path, packed=True)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


FUSED = ("int4-rows-zeros", "float8-blocks", "nf4-double", "bnb-int8")


CASES = sorted({name.partition("-")[0] for name in FAMILY_CASES} - {"falcon"} | {"falcon-40b"})


@pytest.mark.parametrize(("case", "name"), grid(CASES, FUSED))
def test_every_family_at_awkward_sizes(case: str, name: str, tmp_path: Path) -> None:
    """Fused, grouped and turned projections; sizes that no word, block or group divides."""
    model = write_model(tmp_path / "codes", KINDS[name], case)
    assert_read_as_meant(tmp_path / "codes", model, tmp_path / "plain")


DOWN = "model.layers.0.mlp.down_proj"
LISTS = [
    ("int4", "ignore", entry)
    for entry in (DOWN, "re:.*layers[.]0[.]mlp[.]down_proj$", "re:model.layers.0.mlp.down", "layers.0.mlp.down_proj")
] + [
    ("fp8-blocks", key, entry)
    for key, entry in (
        ("modules_to_not_convert", DOWN),
        ("modules_to_not_convert", "layers.0.mlp.down_proj"),
        ("modules_to_not_convert", r"model\.layers\.0\.mlp\.d(own|ense)_proj"),
        ("ignored_layers", DOWN),
    )
]


@pytest.mark.parametrize(("kind", "key", "entry"), LISTS)
def test_modules_that_were_left_alone(
    kind: str, key: str, entry: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Plain numbers there, and codes of a module that a list names are no plain numbers."""
    config = {**KINDS[kind].config, key: ["lm_head", entry]}
    model = write_model(tmp_path / "codes", KINDS[kind], left=(DOWN,), **SIZES)
    configure(tmp_path / "codes", quantization_config=config)
    with caplog.at_level(logging.INFO, "flexbatch"):
        assert_read_as_meant(tmp_path / "codes", model, tmp_path / "plain")
    found = checkpoint.prequantized(tmp_path / "codes", checkpoint.read_arch(tmp_path / "codes"))
    assert set(found) == (set(MATRICES) - {"down.weight"} if kind == "int4" else set())
    if kind == "int4":
        assert "down.weight is expanded in all 2: layers 1 have it in codes" in caplog.text
    write_model(tmp_path / "all", KINDS[kind], **SIZES)
    configure(tmp_path / "all", quantization_config=config)
    with pytest.raises(CheckpointError, match=rf"{DOWN}\.\w+ .*quantization_config\.{key} .* names its module"):
        read(tmp_path / "all", packed=True)


def test_groups_of_modules_have_their_own_schemes(tmp_path: Path) -> None:
    """Names count more than regular expressions, these more than classes. One form holds 4 and 8 bits of a role."""
    kinds = {"int4": ["Linear"], "int8": ["re:.*(q|down)_proj"], "float8-rows": ["model.layers.1.self_attn.o_proj"]}
    stored, groups = {}, {}
    for name, targets in kinds.items():
        write_model(tmp_path / name, KINDS[name], **SIZES)
        stored[name] = load_file(tmp_path / name / "model.safetensors")
        config = KINDS[name].config
        groups[name] = {**config["config_groups"]["group_0"], "targets": targets, "format": config["format"]}

    def kind_of(tensor: str) -> str:
        if tensor.startswith("model.layers.1.self_attn.o_proj"):
            return "float8-rows"
        return "int8" if "q_proj" in tensor or "down_proj" in tensor else "int4"

    mixed = {key: value for name, tensors in stored.items() for key, value in tensors.items() if kind_of(key) == name}
    save_file(mixed, tmp_path / "int4" / "model.safetensors")
    config = {**KINDS["int4"].config, "format": "mixed-precision", "config_groups": groups}
    configure(tmp_path / "int4", quantization_config=config)
    arch = checkpoint.read_arch(tmp_path / "int4")
    assert checkpoint.prequantized(tmp_path / "int4", arch) == {
        "qkv.weight": Form(8, 32),
        "gate_up.weight": Form(4, 32),
        "down.weight": Form(8, 32),
    }
    alone = {name: read(tmp_path / name, packed=False) for name in ("int8", "float8-rows")}
    for packed in (False, True):
        found = read(tmp_path / "int4", packed)
        assert torch.equal(found[1, "o.weight"], alone["float8-rows"][1, "o.weight"])
        torch.testing.assert_close(found[0, "down.weight"], alone["int8"][0, "down.weight"])
        torch.testing.assert_close(found[0, "qkv.weight"][:64], alone["int8"][0, "qkv.weight"][:64])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["int4-rows", "fp8-matrix", "nf4", "gptq-8"])
def test_a_head_in_codes_is_expanded(name: str, tied: bool, tmp_path: Path) -> None:
    """Of a model with one table for both, it is the table."""
    sizes = {**SIZES, "vocab_size": 320, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    lists = {"ignore": [], "llm_int8_skip_modules": []}
    kind = Kind({**KINDS[name].config, **lists}, KINDS[name].write)
    model = write_model(tmp_path / "codes", kind, **sizes)
    tensors = load_file(tmp_path / "codes" / "model.safetensors")
    tensors.pop("model.embed_tokens.weight" if tied else "lm_head.weight")
    stored, meant = kind.write(320, 64, np.random.default_rng(1))
    tensors |= {f"lm_head.{suffix}": value for suffix, value in stored.items()}
    save_file(tensors, tmp_path / "codes" / "model.safetensors")
    model.lm_head.weight.data = meant
    if tied:
        model.model.embed_tokens.weight = model.lm_head.weight
    arch = checkpoint.read_arch(tmp_path / "codes")
    assert "head.weight" not in checkpoint.prequantized(tmp_path / "codes", arch)
    assert_read_as_meant(tmp_path / "codes", model, tmp_path / "plain")
