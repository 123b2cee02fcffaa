"""gpt-oss in MXFP4: read bit for bit, kept as it is, and never expanded on the way."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.kernels import mxfp4_reference
from flexbatch.models import checkpoint
from flexbatch.models.checkpoint import CheckpointError, QuantizedPiece
from flexbatch.models.described import describe
from flexbatch.models.opened import open_model, planned_model
from flexbatch.models.quantized.mxfp4 import MXFP4
from flexbatch.policy.shapes import SHAPES
from tests.mxfp4_writer import LEFT_ALONE, make_packed


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A packed checkpoint and its expansion. 12 experts: placed in parts of two."""
    packed, expanded = (tmp_path_factory.mktemp(name) for name in ("packed", "expanded"))
    make_packed(packed, expanded, num_local_experts=12)
    return packed, expanded


def change(source, folder, edit):
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    edit(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_equal_their_expansion(dtype, folders):
    arch = checkpoint.read_arch(folders[0])
    packed, expanded = (checkpoint.load(folder, arch, dtype) for folder in folders)
    for layer, tensors in expanded.items():
        for role, tensor in tensors.items():
            assert torch.equal(packed[layer][role], tensor), (layer, role)


def test_codes_are_kept_and_nothing_is_expanded(folders, monkeypatch):
    """Blocks and scales of the file, gates before ups."""
    packed, expanded = folders
    arch = checkpoint.read_arch(packed)
    wanted = checkpoint.load(expanded, arch, torch.float32)
    expand = mxfp4_reference.expand
    monkeypatch.setattr(mxfp4_reference, "expand", None)
    pieces = [piece for piece in checkpoint.stream(packed, arch, packed=True) if piece.role.startswith("experts.")]
    assert all(isinstance(piece, QuantizedPiece) and piece.floats for piece in pieces)
    assert {piece.rows.stop - piece.rows.start for piece in pieces} == {192, 64}, "one expert at a time"
    for piece in pieces:
        assert torch.equal(
            expand(piece.codes, piece.parameters, torch.float32), wanted[piece.layer][piece.role][piece.rows]
        )
    formats = checkpoint.prequantized(packed, arch)
    assert set(formats.values()) == {MXFP4} and len(formats) == 12
    assert planned_model(describe(str(packed / "config.json"))).prequantized == formats


def test_plans_of_public_shapes_count_4_bits_and_a_quarter():
    model = open_model("gpt-oss-20b", dummy_weights=True)
    assert planned_model(describe("gpt-oss-20b")).prequantized == model.prequantized
    assert set(model.prequantized.values()) == {MXFP4} and len(model.prequantized) == 16
    assert SHAPES["gpt-oss-120b"]["quantization_config"]["modules_to_not_convert"] == LEFT_ALONE


def no_scale(tensors, config):
    tensors["model.layers.1.mlp.experts.down_proj_scales"][3, 2, 1] = 255


def short_scales(tensors, config):
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :, :2].contiguous()


def no_scales(tensors, config):
    del tensors["model.layers.0.mlp.experts.gate_up_proj_scales"]


def both(tensors, config):
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(12, 64, 192)


def no_quantization(tensors, config):
    del config["quantization_config"]


def skipped(tensors, config):
    config["quantization_config"]["modules_to_not_convert"] = [*LEFT_ALONE, "model.layers.*.mlp.experts"]


def eleven(tensors, config):
    name = "model.layers.2.mlp.experts.down_proj_blocks"
    tensors[name] = tensors[name][:11].contiguous()


BROKEN = {
    no_scale: "mlp.experts.down_proj: its scales hold 255",
    short_scales: r"down_proj_scales has shape \[12, 64, 2\], wanted \[12, 64, 3\]",
    no_scales: "gate_up_proj_blocks is there, but the weight files lack .*gate_up_proj_scales",
    both: "does not belong to a matrix stored as mxfp4",
    no_quantization: "down_proj_blocks is in codes, whose scales no quantization_config of config.json explains",
    skipped: "is in codes, but quantization_config.modules_to_not_convert of config.json names its module",
    eleven: r"down_proj_blocks has shape \[11, 64, 3, 16\], wanted \[12, 64, 3, 16\]",
}


@pytest.mark.parametrize("edit", BROKEN, ids=lambda edit: edit.__name__)
def test_what_is_wrong_with_a_file_is_named(edit, folders, tmp_path):
    folder = change(folders[0], tmp_path, edit)
    with pytest.raises(CheckpointError, match=BROKEN[edit]):
        list(checkpoint.stream(folder, checkpoint.read_arch(folder), packed=True))
