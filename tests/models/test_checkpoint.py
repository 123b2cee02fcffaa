"""Real folders in every stored form, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.models import checkpoint, resolve, source
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.specs import weight_specs
from tests.tiny_models import make_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """One small Llama and one small OPT, never changed."""
    root = tmp_path_factory.mktemp("models")
    for case in ("llama", "llama-tied", "opt", "falcon-40b", "codegen"):
        make_model(case, root / case, tokenizer=case == "llama")
    return root


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of the Llama to spoil."""
    return shutil.copytree(pristine / "llama", tmp_path / "model")


def load(folder):
    arch = checkpoint.read_arch(folder)
    return arch, checkpoint.load(folder, arch, torch.float32)


def assert_same(folder, original):
    stages, wanted = load(folder)[1], load(original)[1]
    assert stages.keys() == wanted.keys()
    for layer, tensors in wanted.items():
        assert stages[layer].keys() == tensors.keys()
        for role, tensor in tensors.items():
            assert torch.equal(stages[layer][role], tensor), (layer, role)


def change(folder, edit):
    """Rewrite model.safetensors after ``edit(dict)``."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def to_bin(folder, shards):
    """The same tensors as .bin files, with an index when there are several."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard_safetensors(folder, shards=3):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_give_the_same_weights(folder, pristine, shards):
    to_bin(folder, shards)
    assert_same(folder, pristine / "llama")


def test_sharded_safetensors_give_the_same_weights(folder, pristine):
    shard_safetensors(folder)
    assert_same(folder, pristine / "llama")


def test_bin_of_the_format_before_torch_1_6(folder, pristine):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(folder, pristine / "llama")


@pytest.mark.parametrize(("case", "old"), [("llama", "model."), ("opt", "model.decoder."), ("falcon-40b", "transformer."), ("codegen", "transformer.")])
def test_names_without_the_prefix_of_the_base_model(pristine, tmp_path, case, old):
    folder = shutil.copytree(pristine / case, tmp_path / "model")

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix(old)] = tensors.pop(name)

    change(folder, strip)
    assert_same(folder, pristine / case)


def test_opt_names_with_decoder_only(pristine, tmp_path):
    folder = shutil.copytree(pristine / "opt", tmp_path / "model")
    change(folder, lambda tensors: [tensors.__setitem__(name.removeprefix("model."), tensors.pop(name)) for name in list(tensors)])
    assert_same(folder, pristine / "opt")


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_tied_weights_stored_once_or_twice(pristine, tmp_path, stored):
    folder = shutil.copytree(pristine / "llama-tied", tmp_path / "model")

    def store(tensors):
        table = tensors.pop("model.embed_tokens.weight")
        tensors.pop("lm_head.weight", None)
        if stored != "head":
            tensors["model.embed_tokens.weight"] = table
        if stored != "embedding":
            tensors["lm_head.weight"] = table.clone()

    change(folder, store)
    assert_same(folder, pristine / "llama-tied")


def test_weights_called_tied_that_differ_are_refused(pristine, tmp_path):
    folder = shutil.copytree(pristine / "llama-tied", tmp_path / "model")
    change(folder, lambda tensors: tensors.__setitem__("lm_head.weight", tensors["model.embed_tokens.weight"] + 1))
    with pytest.raises(CheckpointError, match=r"config\.json says tie_word_embeddings, but .*lm_head\.weight"):
        load(folder)


def test_buffers_of_old_versions_are_skipped(folder, pristine):
    change(folder, lambda tensors: tensors.__setitem__("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(6)))
    assert_same(folder, pristine / "llama")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pieces_keep_the_dtype_of_the_file(folder, dtype):
    change(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    arch = checkpoint.read_arch(folder)
    assert {piece.tensor.dtype for piece in checkpoint.stream(folder, arch)} == {dtype}


def test_pieces_cover_every_row_once(pristine):
    for case in ("llama", "opt", "falcon-40b", "codegen"):
        arch = checkpoint.read_arch(pristine / case)
        rows = {(spec.layer, spec.role): torch.zeros(spec.shape[0]) for spec in weight_specs(arch)}
        for piece in checkpoint.stream(pristine / case, arch):
            rows[piece.layer, piece.role][slice(None) if piece.rows is None else piece.rows] += 1
            assert piece.tensor.shape[0] == rows[piece.layer, piece.role][piece.rows or slice(None)].numel()
        assert all((count == 1).all() for count in rows.values())


@pytest.mark.parametrize("shards", [0, 2])
def test_mapping_the_file_anew_changes_nothing(folder, pristine, monkeypatch, shards):
    """A mapping is dropped after so many bytes, lest every page of the file stays resident."""
    if shards:
        to_bin(folder, shards)
    opened = []
    monkeypatch.setattr(source, "REMAP_BYTES", 1)
    monkeypatch.setattr(source, "_open", lambda file, real=source._open: opened.append(file) or real(file))
    assert_same(folder, pristine / "llama")
    assert len(opened) > len(source.list_tensors(folder))


def test_hub_repositories_are_fetched_with_safetensors_or_bin(pristine, tmp_path, monkeypatch):
    """Every file of the repository that the patterns of a call let through arrives."""
    remote, local, calls = shutil.copytree(pristine / "llama", tmp_path / "remote"), tmp_path / "local", []

    def snapshot_download(name, allow_patterns):
        calls.append(name)
        for file in remote.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    local.mkdir()
    assert load(resolve.resolve("some/llama")) and calls == ["some/llama"]
    shutil.rmtree(local)
    local.mkdir()
    to_bin(remote, 2)
    assert load(resolve.resolve("some/llama")) and len(calls) == 3


def lack(name):
    return lambda tensors: tensors.pop(name)


SPOILED = {
    "missing": (lack("model.layers.1.self_attn.k_proj.weight"), r"lack layers\.1\.self_attn\.k_proj\.weight \[24, 60\]"),
    "missing norm": (lack("model.norm.weight"), r"lack norm\.weight \[60\]"),
    "extra": (
        lambda t: t.update({"model.layers.0.mystery.weight": torch.ones(2, 3)}),
        r"model\.safetensors: tensor model\.layers\.0\.mystery\.weight \[2, 3\] is not part of",
    ),
    "layer too many": (
        lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.ones(60)}),
        r"model\.layers\.3\.input_layernorm\.weight .* with 3 layers",
    ),
    "unexpected bias": (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(72)}), r"q_proj\.bias \[72\] is not expected"),
    "mis-shaped": (
        lambda t: t.update({"model.layers.2.self_attn.v_proj.weight": torch.ones(25, 60)}),
        r"model\.layers\.2\.self_attn\.v_proj\.weight has shape \[25, 60\], wanted \[24, 60\]",
    ),
    "twice": (lambda t: t.update({"layers.0.mlp.up_proj.weight": torch.ones(92, 60)}), r"stands for the same weights as"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_weights_are_named(folder, kind):
    edit, message = SPOILED[kind]
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_errors_come_before_the_first_piece(folder):
    arch = checkpoint.read_arch(folder)
    change(folder, lack("model.norm.weight"))
    with pytest.raises(CheckpointError):
        checkpoint.stream(folder, arch)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_truncated_file_is_named(folder, form):
    if form == "bin":
        to_bin(folder, 1)
    file = next(f for f in folder.iterdir() if f.name in ("model.safetensors", "pytorch_model.bin"))
    os.truncate(file, file.stat().st_size * 2 // 3)
    with pytest.raises(CheckpointError, match=rf"{file.name} is (damaged or truncated|refused: it is damaged)"):
        load(folder)


def test_absent_shard_is_named(folder):
    shard_safetensors(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors does not exist; model\.safetensors\.index\.json expects \d+ tensors in it"):
        load(folder)


def test_index_that_points_elsewhere_is_refused(folder):
    shard_safetensors(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00003", "../../model-00002-of-00003"))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        load(folder)


class Exploit:
    """A pickle that would make a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_bin_is_never_executed(folder, tmp_path, zipped):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Exploit(tmp_path / "pwned")}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused: .*nothing in a checkpoint is executed"):
        load(folder)
    assert not (tmp_path / "pwned").exists()


def test_code_beside_the_weights_is_never_executed(folder, tmp_path):
    """auto_map with a known model_type is ignored, with an unknown one it is an error that says so."""
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text()) | {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    }
    (folder / "config.json").write_text(json.dumps(config))
    load(folder)
    resolve.load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(CheckpointError, match=r"model_type 'evil' is unknown; known: bloom, .*never executed"):
        load(folder)
    assert not (tmp_path / "pwned").exists()


def test_folders_that_are_no_models(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, message in (("absent/at/all", "does not exist"), ("./absent", "does not exist"), (str(folder / "config.json"), "is a file")):
        with pytest.raises(CheckpointError, match=message):
            resolve.resolve(name)
    with pytest.raises(CheckpointError, match=r"'nobody/nothing' is no local folder and cannot be fetched .*--model demo"):
        resolve.resolve("nobody/nothing")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve.resolve(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        checkpoint.read_config(tmp_path)
    assert resolve.resolve(str(folder)) == folder
    (folder / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        checkpoint.read_config(folder)
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(CheckpointError, match=f"{folder}: config.json: model_type 'mamba' is unknown"):
        checkpoint.read_arch(folder)


def test_folder_without_weights_or_tokenizer(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights; looked for model\.safetensors"):
        source.weight_files(folder)
    assert resolve.load_tokenizer(folder).decode([5, 6, 7])
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        resolve.load_tokenizer(folder)


def test_stop_tokens_of_the_generation_config_win(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert checkpoint.read_arch(folder).eos_token_ids == (5, 7)
