"""PEFT folders: what is read of them, and what is refused by name before any weight is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.models.lora.adapter import adapter_digest, read_adapter
from flexbatch.models.lora.adapter_set import AdapterSet
from flexbatch.models.lora.peft_config import read_peft_config
from flexbatch.models.lora.request import LoRARequest
from flexbatch.models.opened import open_model
from flexbatch.planner.adapters import checked
from flexbatch.validation.errors import CheckpointError
from tests.peft_folders import embedding, linear_modules, write_adapter
from tests.tiny_models import make_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return make_model("llama", folder), open_model(str(folder))


@pytest.fixture
def folder(llama, tmp_path):
    """An adapter of all linear modules with rank 4."""
    return write_adapter(tmp_path / "adapter", llama[0], linear_modules(llama[0]))


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def change_tensors(folder, changes):
    """changes: of the dict of tensors, in place."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    changes(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def refused(folder, llama, *words):
    with pytest.raises(CheckpointError) as error:
        read_adapter(LoRARequest("sql", 1, str(folder)), llama[1].arch)
    for word in (str(folder), *words):
        assert word in str(error.value), str(error.value)


KINDS = {
    "peft_type": ("LOHA", "peft_type 'LOHA' is not supported; supported: LORA"),
    "task_type": ("SEQ_CLS", "task_type 'SEQ_CLS'"),
    "use_dora": (True, "DoRA"),
    "bias": ("lora_only", "bias='lora_only'"),
    "lora_bias": (True, "lora_bias=True"),
    "modules_to_save": (["lm_head"], "lacks tensors of lm_head, which adapter_config.json says were trained"),
    "use_qalora": (True, "QA-LoRA"),
    "alora_invocation_tokens": ([5, 6], "activated LoRA"),
    "trainable_token_indices": ({"embed_tokens": [1]}, "lacks tensors of embed_tokens"),
    "target_parameters": (["experts.w"], "target_parameters"),
    "layer_replication": ([[0, 2]], "layer_replication"),
    "init_lora_weights": ("pissa_niter_4", "init_lora_weights='pissa_niter_4'"),
    "of_next_year": ({"x": 1}, "of_next_year"),
    "r": ("four", "r='four'"),
    "lora_alpha": (None, "lora_alpha=None"),
    "rank_pattern": ({"q_proj": 0}, "q_proj=0"),
    "alpha_pattern": ({"(": 1}, "no regular expression"),
    "target_modules": ("(", "no regular expression"),
    "layers_to_transform": (["a"], "layers_to_transform=['a']"),
}


@pytest.mark.parametrize("key", KINDS)
def test_other_kinds_are_refused_by_name(key, folder, llama):
    value, message = KINDS[key]
    change(folder, **{key: value})
    refused(folder, llama, "adapter_config.json", message)


def test_what_only_training_needs_is_passed_over(folder, llama):
    more = {"lora_dropout": 0.1, "peft_version": "0.99", "loftq_config": {"a": 1}, "init_lora_weights": "gaussian"}
    change(folder, **more, fan_in_fan_out=True, megatron_core="megatron.core", runtime_config={"ephemeral": False})
    assert len(read_adapter(LoRARequest("sql", 1, str(folder)), llama[1].arch).updates) == 21


Q1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
TENSORS = {
    "another width": (
        lambda tensors: tensors.update({f"{Q1}A.weight": torch.zeros(4, 64)}),
        ("layers.1.self_attn.q_proj.lora_A.weight has shape [4, 64], wanted [4, 60]",),
    ),
    "another output": (
        lambda tensors: tensors.update({f"{Q1}B.weight": torch.zeros(80, 4)}),
        ("lora_B.weight has shape [80, 4], wanted [72, 4]", "60 inputs and 72 outputs"),
    ),
    "another rank": (
        lambda tensors: tensors.update({f"{Q1}A.weight": torch.zeros(8, 60), f"{Q1}B.weight": torch.zeros(72, 8)}),
        ("has shape [8, 60], wanted [4, 60]", "rank 4 by adapter_config.json"),
    ),
    "more layers": (
        lambda tensors: tensors.update({Q1.replace(".1.", ".3.") + "A.weight": torch.zeros(4, 60)}),
        ("another model", "layers.3.self_attn.q_proj.lora_A.weight [4, 60]", "a llama model with 3 layers"),
    ),
    "another family": (
        lambda tensors: tensors.update(
            {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(4, 60)}
        ),
        ("transformer.h.0.attn.c_attn.lora_A.weight [4, 60] belongs to no module",),
    ),
    "a norm": (
        lambda tensors: tensors.update({"base_model.model.model.norm.lora_A.weight": torch.ones(4, 60)}),
        ("final_norm cannot have a low-rank update",),
    ),
    "one factor": (lambda tensors: tensors.pop(f"{Q1}B.weight"), ("not the other factor of model.layers.1",)),
    "no module": (
        lambda tensors: [tensors.pop(f"{Q1}{factor}.weight") for factor in "AB"],
        ("lacks tensors of model.layers.1.self_attn.q_proj, which its target_modules name",),
    ),
    "nothing": (lambda tensors: tensors.clear() or tensors.update(a=torch.ones(1)), ("tensor a [1]",)),
    "magnitudes": (
        lambda tensors: tensors.update({Q1.replace("lora_", "lora_magnitude_vector"): torch.ones(72)}),
        ("DoRA is not supported",),
    ),
    "whole numbers": (
        lambda tensors: tensors.update({f"{Q1}A.weight": torch.zeros(4, 60, dtype=torch.int32)}),
        ("of I32, wanted floating-point numbers",),
    ),
    "another vocabulary": (
        lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(311, 60)}),
        ("lm_head.weight of shape [311, 60], the model's is [307, 60]",),
    ),
}


@pytest.mark.parametrize("what", TENSORS)
def test_an_adapter_of_another_model_is_refused(what, folder, llama):
    changes, words = TENSORS[what]
    change_tensors(folder, changes)
    refused(folder, llama, "adapter 'sql'", *words)


def test_missing_and_damaged_files(folder, llama, tmp_path):
    (folder / "adapter_model.safetensors").write_bytes(b"1234")
    refused(folder, llama, "damaged")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, llama, "holds no weights; looked for adapter_model.safetensors, adapter_model.bin")
    (folder / "adapter_config.json").write_text("[]")
    refused(folder, llama, "wanted an object")
    (folder / "adapter_config.json").unlink()
    refused(folder, llama, "adapter_config.json does not exist")
    refused(tmp_path / "nowhere", llama, "does not exist")


TARGETS = {
    "list": (["q_proj", "down_proj"], {}, lambda name: name.endswith(("q_proj", "down_proj"))),
    "full names": (["model.layers.0.mlp.up_proj"], {}, lambda name: name == "model.layers.0.mlp.up_proj"),
    "regex": (r".*layers\.[12]\..*(k|v)_proj", {}, lambda name: re.search(r"\.[12]\..*\.[kv]_proj", name)),
    "all-linear": ("all-linear", {}, lambda name: True),
    "layers": (["o_proj"], {"layers_to_transform": [0, 2]}, lambda name: re.search(r"\.[02]\..*o_proj", name)),
    "one layer": (
        ["o_proj", "v_proj"],
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        lambda name: re.search(r"\.1\..*[ov]_proj", name),
    ),
    "all but": ("all-linear", {"exclude_modules": ["q_proj"]}, lambda name: not name.endswith("q_proj")),
}


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("what", TARGETS)
def test_modules_that_were_trained(what, binary, llama, tmp_path):
    """Exactly these have tensors, and one that lacks some is noticed."""
    targets, settings, wanted = TARGETS[what]
    names = [name for name in linear_modules(llama[0]) if wanted(name)]
    config = {"target_modules": targets, **settings}
    folder = write_adapter(tmp_path / "a", llama[0], names, binary=binary, **config)
    adapter = read_adapter(LoRARequest("a", 1, str(folder)), llama[1].arch)
    assert {update.down.name for update in adapter.updates} == {f"base_model.model.{n}.lora_A.weight" for n in names}
    if len(names) > 1:
        write_adapter(tmp_path / "b", llama[0], names[1:], **config)
        refused(tmp_path / "b", llama, f"lacks tensors of {names[0]}")


def test_ranks_and_scales(llama, tmp_path):
    patterns = {
        "rank_pattern": {r".*\.1\.mlp\.up_proj": 9},
        "alpha_pattern": {"k_proj": 3, "layers.2.self_attn.q_proj": 5},
    }
    names = linear_modules(llama[0])
    folder = write_adapter(tmp_path / "a", llama[0], names, rank=4, alpha=6, use_rslora=True, **patterns)
    updates = read_adapter(LoRARequest("a", 1, str(folder)), llama[1].arch).updates
    scales = {(update.layer, update.role, update.part): (update.rank, update.scale) for update in updates}
    assert scales[1, "gate_up", "up"] == (9, 2.0) and scales[0, "gate_up", "up"] == (4, 3.0)
    assert scales[0, "qkv", "k"] == (4, 1.5) and scales[2, "qkv", "q"] == (4, 2.5) and scales[1, "qkv", "q"] == (4, 3.0)
    change(folder, use_rslora=False)
    assert read_peft_config(folder).scale_of("model.layers.0.mlp.down_proj") == 1.5


def test_names_of_a_state_that_was_saved_as_it_is(folder, llama):
    def renamed(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    change_tensors(folder, renamed)
    assert len(read_adapter(LoRARequest("a", 1, str(folder)), llama[1].arch).updates) == 21


@pytest.mark.parametrize("case", ["llama", "llama-tied"])
def test_copies_of_the_embedding_have_to_be_the_models_own(case, tmp_path):
    """PEFT saves the table beside its update."""
    model = make_model(case, tmp_path / "model")
    opened, name = open_model(str(tmp_path / "model")), embedding(model)
    folder = write_adapter(tmp_path / "a", model, [name, "lm_head"])
    own = model.get_submodule(name).weight.data
    copies = {f"base_model.model.{name}.base_layer.weight": own, "base_model.model.lm_head.base_layer.weight": None}
    copies["base_model.model.lm_head.base_layer.weight"] = model.lm_head.weight.data.clone()
    for dtype in (torch.float32, torch.bfloat16):
        change_tensors(folder, lambda tensors, dtype=dtype: tensors.update({k: v.to(dtype) for k, v in copies.items()}))
        adapter = checked(LoRARequest("a", 1, str(folder)), opened)
        assert adapter.roles == {(-1, "embed"), (3, "head")}
        assert adapter.mergeable == (case == "llama")
    change_tensors(folder, lambda tensors: tensors[f"base_model.model.{name}.base_layer.weight"][5, 7].add_(1.0))
    with pytest.raises(CheckpointError, match=r"embed_tokens.base_layer.weight that is not the model's own"):
        checked(LoRARequest("a", 1, str(folder)), opened)


def test_the_tensor_of_all_adapters(llama, tmp_path):
    """Segments lie one after another without gaps, and hold the factors."""
    model, opened = llama
    names = [linear_modules(model)[::2], linear_modules(model)[1::3], linear_modules(model)]
    adapters = AdapterSet(opened.arch)
    for i, chosen in enumerate(names):
        path = write_adapter(tmp_path / f"{i}", model, chosen, seed=i, rank=3 + i)
        adapters = adapters.adding(read_adapter(LoRARequest(f"{i}", 1, str(path)), opened.arch))
    assert {spec.role for spec in adapters.specs} == {"adapters.qkv", "adapters.o", "adapters.gate_up", "adapters.down"}
    for matrix in adapters.matrices.values():
        tensor = adapters.tensor((matrix.layer, matrix.tensor_role), torch.float32)
        assert len(tensor) == matrix.elements
        down, row, element = tensor[: matrix.rows * matrix.inputs].view(-1, matrix.inputs), 0, 0
        up = tensor[matrix.rows * matrix.inputs :]
        for parts, positions in zip(matrix.updates, matrix.segments(), strict=True):
            for update, position, width in zip(parts, positions, matrix.widths, strict=True):
                rank = 0 if update is None else update.rank
                assert position == (row, rank, element)
                if update is not None:
                    first, second = update.factors(opened.arch)
                    assert torch.equal(down[row : row + rank], first)
                    assert torch.equal(up[element : element + rank * width].view(rank, width), second.t())
                row, element = row + rank, element + rank * width
        assert (row, element) == (matrix.rows, len(up))
    assert [adapters.id_of(name) for name in (None, "0", "2")] == [0, 1, 3]
    assert replace(adapters, default="1").id_of(None) == 2


@pytest.mark.parametrize("first, second", [(1, 1), (1e6, 1e-6), (1e-7, 1e7), (3e4, 3e-5), (1, 1e-6), (1, 0)])
def test_no_factor_leaves_the_range_of_float16(first, second, folder, llama):
    """One that is small beside a large one keeps its bits: their product is what counts."""

    def scaled(tensors):
        for name, tensor in tensors.items():
            tensor.mul_(first if "lora_A" in name else second)

    change_tensors(folder, scaled)
    adapters = AdapterSet(llama[1].arch, (read_adapter(LoRARequest("a", 1, str(folder)), llama[1].arch),))
    for matrix in adapters.matrices.values():
        tensor = adapters.tensor((matrix.layer, matrix.tensor_role), torch.float16).double()
        down, up = tensor[: matrix.rows * matrix.inputs].view(-1, matrix.inputs), tensor[matrix.rows * matrix.inputs :]
        for update, (row, rank, element), width in zip(
            matrix.updates[0], matrix.segments()[0], matrix.widths, strict=True
        ):
            found = up[element : element + rank * width].view(rank, width).t() @ down[row : row + rank]
            left, right = (factor.double() for factor in update.factors(llama[1].arch))
            wanted, most = right @ left, right.abs() @ left.abs()
            assert (found - wanted).abs().max() <= 2**-9 * most.max()
            assert down[row : row + rank].abs().max() <= 1.001 * max(1, left.abs().max()), "inner products have 16 bits"


def test_the_digest_is_of_the_content(folder):
    before = adapter_digest(folder)
    change_tensors(folder, lambda tensors: tensors[f"{Q1}A.weight"][0, 0].add_(1e-3))
    changed = adapter_digest(folder)
    change(folder, lora_alpha=9)
    assert len({before, changed, adapter_digest(folder)}) == 3
