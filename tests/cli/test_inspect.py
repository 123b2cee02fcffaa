"""`flexbatch inspect`: facts about models of every format, told without reading their weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flexbatch.apps.inspect_model import main
from flexbatch.models import checkpoint, source
from flexbatch.models.gguf import blocks
from flexbatch.models.resolve import resolve
from flexbatch.validation.errors import CheckpointError
from tests.gguf_writer import write_gguf
from tests.peft_folders import linear_modules, write_adapter
from tests.quantized_writer import KINDS, configure, write_model
from tests.tiny_models import make_model, make_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
CHAT = "{{ messages }}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inspected")
    model = make_model("llama", folder / "folder", **SIZES)
    make_model("llama", folder / "without", tokenizer=False, **SIZES)
    kinds = {"ffn_down": "MXFP4", "ffn_up": "Q8_0", "token_embd": "F16", "output": "F16"}
    write_gguf(
        model,
        folder / "x.gguf",
        kind_of=lambda name: kinds.get(name.split(".")[-2], "Q4_0"),
        tokenizer=make_tokenizer(),
        chat_template=CHAT,
    )
    return {"folder": folder / "folder", "without": folder / "without", "gguf": folder / "x.gguf"}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a tensor may be read."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a tensor was read")

    for module, name in (
        (source, "read_tensors"),
        (checkpoint, "stream"),
        (blocks, "raw_rows"),
        (torch.Tensor, "copy_"),
    ):
        monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def told(capsys: pytest.CaptureFixture, tmp_path: Path, unread: None) -> Callable[..., tuple[int, str]]:
    def run(*words: str) -> tuple[int, str]:
        code = main([*words, "--device", "cpu", "--offload-dir", str(tmp_path)])
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_facts_equal_those_of_the_files(
    kind: str, models: dict[str, Path], told: Callable[..., tuple[int, str]]
) -> None:
    code, out = told(str(models[kind]), "--json", "--gpu-memory", "1GiB", "--cpu-memory", "1GiB")
    found = json.loads(out)
    config = AutoConfig.from_pretrained(models["folder"])
    assert code == 0 and found["fits"]
    assert (found["family"], found["layers"], found["hidden_size"]) == ("llama", config.num_hidden_layers, 64)
    assert (found["heads"], found["kv_heads"], found["head_dim"]) == (4, config.num_key_value_heads, 16)
    assert (found["vocab_size"], found["context"], found["stop_tokens"]) == (307, 512, [2])
    assert found["parameters"] == sum(entry["bytes"] for entry in found["stored"]) // 4 or kind == "gguf"
    files = [models["gguf"]] if kind == "gguf" else [models["folder"] / "model.safetensors"]
    assert (found["files"], found["bytes"]) == ([files[0].name], files[0].stat().st_size)
    assert found["tokenizer"]["tokens"] == 307 and found["tokenizer"]["special"]["eos"] == "</s>"
    assert found["tokenizer"]["chat_template"] == (CHAT if kind == "gguf" else None)
    assert "weights 100 % gpu" in found["plan"] and "\n" not in found["plan"]
    if kind == "gguf":
        assert found["format"] == "GGUF version 3, architecture llama"
        assert found["tensor_types"] == {"Q4_0": 15, "F32": 7, "Q8_0": 3, "MXFP4": 3, "F16": 2}
        forms = {entry["form"]: (entry["tensors"], entry["roles"]) for entry in found["stored"]}
        assert forms["4 bits in groups of 32"] == (6, ["qkv", "o"])
        assert forms["8 bits in groups of 32"] == (3, ["gate_up"])
        assert forms["MXFP4"] == (3, ["down"])
    else:
        assert (found["format"], set(found["tensor_types"])) == ("safetensors", {"F32"})


def test_text_is_a_line_for_each_matter(models: dict[str, Path], told: Callable[..., tuple[int, str]]) -> None:
    code, out = told("--model", str(models["gguf"]), "--weight-bits", "4")
    names = [line.split(":")[0] for line in out.splitlines()]
    wanted = "model, format, files, family, sizes, context, stops at, tokenizer, chat template, stored as, codes, plan"
    assert code == 0 and names == wanted.split(", ")
    assert "14 characters" in out and "4 bits in groups of 32" in out
    assert "\ncodes:         12 in Q4_0, 3 in MXFP4 kept in codes as they are, 3 in " in out


@pytest.mark.parametrize(
    ("kind", "format", "stored", "codes"),
    [
        (
            "int4",
            "compressed-tensors int4 by groups of 32",
            "4 bits in groups of 32",
            "14 in compressed-tensors int4 by",
        ),
        ("fp8-blocks", "float8 by blocks of 48 x 40", "32-bit floats", "none kept in codes as they are, 14 in float8"),
        ("nf4", "bitsandbytes in 4 bits", "32-bit floats", "none kept in codes as they are, 14 in bitsandbytes in 4"),
        (
            "gptq-8",
            "gptq in 8 bits and groups of 32",
            "8 bits in groups of 32",
            "14 in gptq in 8 bits and groups of 32",
        ),
    ],
)
def test_quantized_folders(
    kind: str, format: str, stored: str, codes: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    write_model(tmp_path, KINDS[kind], **sizes, head_dim=8, num_hidden_layers=2)
    assert main([str(tmp_path), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == f"safetensors, {format}"
    assert found["codes"].startswith(codes)
    assert [role for entry in found["stored"] for role in entry["roles"] if role in ("qkv", "o")] == ["qkv", "o"]
    assert {entry["form"] for entry in found["stored"] if "qkv" in entry["roles"]} == {stored}


def test_what_does_not_fit_is_told_in_one_line(models: dict[str, Path], told: Callable[..., tuple[int, str]]) -> None:
    """The rest is told all the same, and the exit code says it."""
    code, out = told(str(models["gguf"]), "--gpu-memory", "10KB", "--cpu-memory", "10KB")
    assert code == 4 and "chat template:" in out and "8 bits in groups of 32" in out
    assert out.splitlines()[-1].startswith("plan:") and "does not fit" in out.splitlines()[-1]


def test_a_model_without_tokenizer(models: dict[str, Path], told: Callable[..., tuple[int, str]]) -> None:
    code, out = told(str(models["without"]))
    assert code == 0 and "tokenizer:     none: " in out and "stored as:" in out


def test_what_could_not_run_is_an_error(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Weights that the configuration does not explain, and an adapter of another model."""
    write_model(tmp_path / "codes", KINDS["gptq-sym"], **SIZES)
    configure(tmp_path / "codes", quantization_config=None)
    other = make_model("llama", tmp_path / "other", tokenizer=False, **{**SIZES, "intermediate_size": 64})
    adapter = write_adapter(tmp_path / "adapter", other, linear_modules(other))
    words = (str(models["folder"]), "--device", "cpu", "--lora")
    for arguments, said in (
        ((str(tmp_path / "codes"), "--device", "cpu"), "is in codes"),
        ((*words, f"a={adapter}"), "does not fit the model"),
        ((str(adapter),), "it holds an adapter, which --lora NAME=FOLDER adds"),
    ):
        assert main([*arguments]) == 2
        told = capsys.readouterr()
        assert said in told.err and not told.out


def test_names_that_are_nearly_right(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "sha256-77").write_bytes(models["gguf"].read_bytes())
    with pytest.raises(CheckpointError, match=r"it holds a GGUF model: give it a name that ends in \.gguf"):
        resolve(str(tmp_path / "sha256-77"))
    with pytest.raises(CheckpointError, match="did you mean smollm2"):
        resolve("smolm2")


def test_random_weights(told: Callable[..., tuple[int, str]]) -> None:
    code, out = told("opt-125m", "--dummy-weights", "--json", "--gpu-memory", "4GiB", "--cpu-memory", "4GiB")
    found = json.loads(out)
    assert code == 0 and (found["format"], found["path"], found["family"]) == ("random weights", None, "opt")


@pytest.mark.parametrize(
    "words, said", [(("absent/model/here",), "does not exist"), (("demo", "--model", "demo-draft"), "leave one out")]
)
def test_what_is_wrong_is_said(
    words: tuple[str, ...], said: str, told: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture
) -> None:
    assert main([*words]) == 2
    assert said in capsys.readouterr().err
