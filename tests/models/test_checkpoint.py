"""Real folders in every stored form, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

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


@pytest.mark.parametrize(
    ("case", "old"),
    [("llama", "model."), ("opt", "model.decoder."), ("falcon-40b", "transformer."), ("codegen", "transformer.")],
)
def test_names_without_the_prefix_of_the_base_model(pristine, tmp_path, case, old):
    folder = shutil.copytree(pristine / case, tmp_path / "model")

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix(old)] = tensors.pop(name)

    change(folder, strip)
    assert_same(folder, pristine / case)


def test_opt_names_with_decoder_only(pristine, tmp_path):
    folder = shutil.copytree(pristine / "opt", tmp_path / "model")
    change(
        folder,
        lambda tensors: [tensors.__setitem__(name.removeprefix("model."), tensors.pop(name)) for name in list(tensors)],
    )
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


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
@pytest.mark.parametrize("row", [0, 153, -1])
@torch.no_grad()
def test_weights_called_tied_that_differ_are_two(pristine, tmp_path, caplog, form, row):
    """One row of 307 is enough, wherever it is: fine-tuning that adds a few tokens changes no other.

    The oracle is transformers on the same folder.
    """
    folder = shutil.copytree(pristine / "llama-tied", tmp_path / "model")

    def untie(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        head[row] += 1
        tensors["lm_head.weight"] = head

    change(folder, untie)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if form != "safetensors":
        to_bin(folder, 1) if form == "bin" else shard_safetensors(folder)
    arch, stages = load(folder)
    assert not arch.tie_word_embeddings
    assert torch.equal(stages[3]["head.weight"], wanted.lm_head.weight) and torch.equal(
        stages[-1]["embed.weight"], wanted.model.embed_tokens.weight
    )
    assert not torch.equal(stages[3]["head.weight"], stages[-1]["embed.weight"])
    assert "says tie_word_embeddings, but" in caplog.text and "both are used" in caplog.text


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("names", [["model.norm.weight"], ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"]])
def test_tensors_stored_alike_in_two_shards_are_read_once(folder, pristine, caplog, form, names):
    shard_safetensors(folder) if form == "safetensors" else to_bin(folder, 3)
    store_again(folder, names, lambda tensor: tensor)
    assert_same(folder, pristine / "llama")
    assert f"{len(names)} tensors are stored alike in two files" in caplog.text and all(
        name in caplog.text for name in names
    )


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "change", [lambda t: t.index_fill(0, torch.tensor([t.shape[0] - 1]), 7.0), lambda t: t[:-1], lambda t: t.half()]
)
def test_tensors_stored_differently_in_two_shards_are_refused(folder, form, change):
    shard_safetensors(folder) if form == "safetensors" else to_bin(folder, 3)
    store_again(folder, ["model.layers.1.mlp.up_proj.weight"], change)
    with pytest.raises(
        CheckpointError,
        match=r"model\.layers\.1\.mlp\.up_proj\.weight (stands for the same weights as .*differ|has shape)",
    ):
        load(folder)


def store_again(folder, names, change):
    """Put ``change(tensor)`` of each name into another shard than its own, as the index does not say."""
    index = next(folder.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    for name in names:
        own, other = (
            weight_map[name],
            next(file for file in sorted(set(weight_map.values())) if file != weight_map[name]),
        )
        read, write = (load_file, save_file) if other.endswith("safetensors") else (torch.load, torch.save)
        write({**read(folder / other), name: change(read(folder / own)[name]).contiguous()}, folder / other)


EXTRA = {
    "another module": "model.layers.0.mystery.weight",
    "a layer too many": "model.layers.3.input_layernorm.weight",
    "a layer that predicts further tokens": "model.layers.3.eh_proj.weight",
    "another head": "score.weight",
    "another tower": "vision_model.encoder.layers.0.weight",
    "a number": "logit_scale",
    "an adapter": "model.layers.0.self_attn.q_proj.lora_A.weight",
}


@pytest.mark.parametrize("kind", EXTRA)
def test_tensors_that_the_model_does_not_have_are_left_alone_and_said(folder, pristine, caplog, kind):
    change(
        folder,
        lambda tensors: tensors.update({EXTRA[kind]: torch.tensor(2.0) if kind == "a number" else torch.ones(2, 3)}),
    )
    assert_same(folder, pristine / "llama")
    assert (
        "1 tensors that are not part of a llama model with 3 layers are not used" in caplog.text
        and EXTRA[kind] in caplog.text
    )


def test_many_tensors_that_the_model_does_not_have_are_one_line(folder, caplog):
    change(folder, lambda tensors: tensors.update({f"tower.{i}.weight": torch.ones(2) for i in range(9)}))
    load(folder)
    assert len(caplog.records) == 1 and "9 tensors" in caplog.text and "and 4 more" in caplog.text


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
    "missing": (
        lack("model.layers.1.self_attn.k_proj.weight"),
        r"lack layers\.1\.self_attn\.k_proj\.weight \[24, 60\]",
    ),
    "missing norm": (lack("model.norm.weight"), r"lack norm\.weight \[60\]"),
    "unexpected bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(72)}),
        r"q_proj\.bias \[72\] is not expected",
    ),
    "mis-shaped": (
        lambda t: t.update({"model.layers.2.self_attn.v_proj.weight": torch.ones(25, 60)}),
        r"model\.layers\.2\.self_attn\.v_proj\.weight has shape \[25, 60\], wanted \[24, 60\]",
    ),
    "twice": (
        lambda t: t.update({"layers.0.mlp.up_proj.weight": torch.ones(92, 60)}),
        r"stands for the same weights as",
    ),
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
    with pytest.raises(
        CheckpointError,
        match=r"model-00002-of-00003\.safetensors does not exist; model\.safetensors\.index\.json expects \d+ "
        r"tensors in it",
    ):
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
    torch.save(
        {"model.norm.weight": Exploit(tmp_path / "pwned")},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused: .*nothing in a checkpoint is executed"):
        load(folder)
    assert not (tmp_path / "pwned").exists()


def test_code_beside_the_weights_is_never_executed(folder, tmp_path):
    """auto_map with a known model_type is ignored, with an unknown one it is an error that says so."""
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text()) | {
        "auto_map": {
            "AutoConfig": "evil.Config",
            "AutoModelForCausalLM": "evil.Model",
            "AutoTokenizer": ["evil.T", None],
        }
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
    for name, message in (
        ("absent/at/all", "does not exist"),
        ("./absent", "does not exist"),
        (str(folder / "config.json"), "is a file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resolve.resolve(name)
    with pytest.raises(
        CheckpointError, match=r"'nobody/nothing' is no local folder and cannot be fetched .*--model demo"
    ):
        resolve.resolve("nobody/nothing")
    with pytest.raises(CheckpointError, match=r"has neither config\.json nor a GGUF file"):
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


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ((), "needs sentencepiece and protobuf, which are not"),
        (("sentencepiece",), "needs protobuf, which is not"),
        (("google.protobuf",), "needs sentencepiece"),
    ],
)
def test_a_sentencepiece_model_alone_says_which_packages_are_missing(folder, monkeypatch, name, installed, message):
    monkeypatch.setattr(resolve, "_importable", lambda module: module in installed)
    assert resolve.load_tokenizer(folder)
    (folder / name).write_bytes(b"model")
    assert resolve.load_tokenizer(folder), "tokenizer.json is there and needs neither"
    for file in folder.glob("*token*.json"):
        file.unlink()
    with pytest.raises(
        CheckpointError, match=rf"{name} alone, and reading that {message}.*pip install 'flexbatch\[sentencepiece\]'"
    ):
        resolve.load_tokenizer(folder)
    monkeypatch.setattr(resolve, "_importable", lambda module: True)
    with pytest.raises(CheckpointError, match="has no tokenizer that can be read"):
        resolve.load_tokenizer(folder)


def test_packages_are_found_without_importing_them():
    assert (
        resolve._importable("json")
        and not resolve._importable("no_such_package")
        and not resolve._importable("no_such_package.part")
    )


def test_stop_tokens_of_the_generation_config_win(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert checkpoint.read_arch(folder).eos_token_ids == (5, 7)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_integers_without_an_explanation_are_no_weights(folder, dtype, form):
    """They are codes of a quantizer whose config is lost; taken for numbers they gave text without a word."""
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    if form == "bin":
        to_bin(folder, 1)
    with pytest.raises(CheckpointError, match=f"{name} holds .*, wanted floating-point numbers"):
        load(folder)
