"""Engines over GGUF files: tokens of the weights that the file means, wherever they lie and however they are stored."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType

from flexbatch import LLM, SamplingParams
from flexbatch.cli.plan import planner_of
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.described import describe
from flexbatch.models.fingerprint import WeightFiles, model_files_digest
from flexbatch.models.opened import open_model, planned_model
from flexbatch.models.quantized.scheme import Form
from flexbatch.models.resolve import load_tokenizer, resolve
from flexbatch.policy.hardware import load_hardware
from flexbatch.run import main
from tests.gguf_writer import write_gguf
from tests.tiny_models import greedy_tokens, make_model, make_tokenizer, random_prompts

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MIXES: dict[str, tuple[dict[str, str], dict[str, Form]]] = {
    "4 bits": (
        {"": "Q4_1", "attn_k": "Q4_0", "token_embd": "Q8_0"},
        dict.fromkeys(("qkv", "o", "gate_up", "down"), Form(4, 32)),
    ),
    "8 bits": ({"": "Q8_0", "token_embd": "F16"}, dict.fromkeys(("qkv", "o", "gate_up", "down"), Form(8, 32))),
    "4 in 8 bits": (
        {"": "Q4_0", "attn_v": "Q8_0", "ffn_down": "Q5_0", "attn_output": "Q5_1", "ffn_gate": "MXFP4"},
        {"qkv": Form(8, 32), "o": Form(8, 32), "down": Form(8, 32)},
    ),
    "none": ({"": "F16", "attn_q": "F32", "attn_k": "BF16", "attn_v": "MXFP4", "ffn_gate": "MXFP4"}, {}),
    "floats": (
        {"": "MXFP4", "token_embd": "F16", "output": "F16"},
        dict.fromkeys(("qkv", "o", "gate_up", "down"), Form(4, 32, floats=True)),
    ),
}
"""Name -> types of matrices, and the (bits, group) of the roles that are kept."""
PLACEMENTS = {"gpu": (100, 0), "cpu": (0, 100), "disk": (0, 0), "mixed": (30, 40)}
GREEDY = SamplingParams(max_tokens=10, temperature=0)
CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "hello there"}]


def make_file(folder: Path, kinds: dict[str, str], family: str = "llama", **options: Any) -> tuple[Path, Any]:
    """A file, and the model of transformers with the weights that it means."""

    def kind_of(name: str) -> str:
        return kinds.get(name.split(".")[-2], kinds[""])

    model = make_model(family, folder / "original", **SIZES)
    path = folder / "tiny.gguf"
    write_gguf(model, path, kind_of=kind_of, tokenizer=make_tokenizer(), chat_template=CHAT, **options)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() < 2:
                continue
            kind = GGMLQuantizationType[kind_of(f"{table.get_name(name.removesuffix('.weight'))}.weight")]
            meant = gguf.quants.dequantize(gguf.quants.quantize(weights.numpy(), kind), kind)
            weights.copy_(torch.from_numpy(meant.copy()))
    return path, model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    return {name: make_file(tmp_path_factory.mktemp("gguf"), kinds) for name, (kinds, _) in MIXES.items()}


def engine(path: Path, folder: Path, placement: str = "mixed", **settings: Any) -> LLM:
    percent = PLACEMENTS[placement] + (100, 0, 100, 0)
    common = {"gpu_batch_size": 3, "num_gpu_batches": 2, "device": "cpu", "gpu_memory": "1GiB", "cpu_memory": "1GiB"}
    return LLM(str(path), percent=percent, offload_dir=str(folder), **{**common, **settings})


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mix", MIXES)
def test_tokens_equal_transformers(
    mix: str, placement: str, made: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, model = made[mix]
    prompts = random_prompts([3, 20, 1, 40, 7])
    wanted = [greedy_tokens(model, prompt, 10) for prompt in prompts]
    formats = {f"{role}.weight": form for role, form in MIXES[mix][1].items()}
    with caplog.at_level(logging.INFO, "flexbatch"), engine(path, tmp_path, placement) as llm:
        assert llm.engine_plan.model.prequantized == formats
        for tensor in llm.engine_plan.weight_plan.all_tensors:
            assert tensor.form == formats.get(tensor.spec.role, Form(16, tensor.group))
        assert [completion.token_ids for completion in llm.generate(prompts, GREEDY)] == wanted
        llm.weights.check()
    [line] = [record.getMessage() for record in caplog.records if "in codes as they are" in record.getMessage()]
    assert ("none kept" in line) == (not formats)
    assert ("MXFP4 expanded" in line) == (mix in ("4 in 8 bits", "none")), line


@pytest.mark.parametrize("asked, stored", [(16, 8), (8, 8), (4, 4)])
def test_fewer_bits_are_only_for_who_asks(
    asked: int, stored: int, made: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Matrices in MXFP4, which no store holds, take the bits that are asked for, those in codes keep theirs unless
    fewer are; what that costs is said."""
    path, _ = made["4 in 8 bits"]
    with caplog.at_level(logging.WARNING, "flexbatch"), engine(path, tmp_path, weight_bits=asked) as llm:
        llm.generate([[5, 6, 7]], GREEDY)
        bits = {tensor.spec.role: tensor.bits for tensor in llm.engine_plan.weight_plan.all_tensors}
    assert (bits["gate_up.weight"], bits["qkv.weight"], bits["down.weight"]) == (asked, stored, stored)
    told = [record.getMessage() for record in caplog.records if "quantized anew" in record.getMessage()]
    assert len(told) == (asked < 16) and all(f"in the {asked} bits of --weight-bits" in line for line in told)


@pytest.mark.parametrize("dtype, warned", [("float16", False), ("bfloat16", True)])
def test_scales_that_lose_bits_are_told(
    dtype: str, warned: bool, made: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = made["4 bits"]
    with caplog.at_level(logging.WARNING, "flexbatch"), engine(path, tmp_path, dtype=dtype) as llm:
        llm.generate([[5, 6, 7]], GREEDY)
    assert any("12 quantized matrices are rounded" in record.getMessage() for record in caplog.records) == warned


def test_the_tokenizer_is_that_of_the_file(made: dict[str, Any], tmp_path: Path) -> None:
    """Not one that lies beside it."""
    path, _ = made["8 bits"]
    original = make_tokenizer()
    beside = tmp_path / "model.gguf"
    beside.write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(
        (path.parent / "original" / "tokenizer.json").read_text().replace("<s>", "<x>")
    )
    (tmp_path / "chat_template.jinja").write_text("another")
    tokenizer = load_tokenizer(beside)
    for text in ("hello there", "ein Hörnchen 🥐\n  x", "<s>abc</s>"):
        assert tokenizer(text).input_ids == original(text).input_ids
        assert tokenizer.decode(original(text).input_ids) == original.decode(original(text).input_ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (original.bos_token_id, original.eos_token_id)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "user: hello there\n"
    again = load_tokenizer(tokenizer.name_or_path, add_bos_token=True)
    assert again("abc").input_ids == [original.bos_token_id, *original("abc").input_ids]
    assert again.chat_template == tokenizer.chat_template
    with engine(beside, tmp_path / "offload") as llm:
        assert llm.engine_plan.arch.eos_token_ids == (original.eos_token_id,)
        [chat] = llm.generate([MESSAGES], GREEDY)
        [text] = llm.generate(["user: hello there\n"], GREEDY)
        assert chat.token_ids == text.token_ids and chat.text == text.text != ""


def test_ends_of_turns_stop_too(tmp_path: Path) -> None:
    path, _ = make_file(tmp_path, {"": "F16"}, more=lambda writer: writer.add_eot_token_id(77))
    assert open_model(str(path)).arch.eos_token_ids == (2, 77)


@pytest.mark.parametrize(
    "more, template, stops",
    [
        (None, "{{ '<end_of_turn>' }}", (2, 80)),
        (lambda writer: writer.add_eot_token_id(77), "{{ '<end_of_turn>' }}", (2, 77)),
        (None, "{{ '<|end|>' + '<|im_end|>' }}", (2, 81)),
        (None, "{{ messages }}", (2,)),
    ],
)
def test_older_files_name_the_end_of_a_turn_in_their_template_alone(
    more: Any, template: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    """Gemma's and Phi's of 2024: their answers would go on to max_tokens."""

    def named(writer: gguf.GGUFWriter) -> None:
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        tokens[80], tokens[81] = "<end_of_turn>", "<|end|>"
        writer.kv_data[0].pop("tokenizer.chat_template")
        writer.add_chat_template(template)
        if more is not None:
            more(writer)

    path, _ = make_file(tmp_path, {"": "F16"}, more=named)
    assert open_model(str(path)).arch.eos_token_ids == stops


def test_folders_and_parts(tmp_path: Path) -> None:
    kinds = {"": "Q8_0"}
    whole, model = make_file(tmp_path / "whole", kinds)
    make_file(tmp_path / "parted", kinds, split=9)
    parts = sorted((tmp_path / "parted").glob("*.gguf"))
    assert len(parts) > 2 and resolve(str(whole.parent)) == whole
    for name in (parts[0].parent, *parts):
        assert resolve(str(name)) == parts[0]
    prompts = random_prompts([5, 11])
    with engine(parts[1], tmp_path / "offload", "disk") as llm:
        tokens = [completion.token_ids for completion in llm.generate(prompts, GREEDY)]
    assert tokens == [greedy_tokens(model, prompt, 10) for prompt in prompts]
    assert set(model_files_digest(parts[0])) == {part.name for part in parts}
    files = WeightFiles(parts[0])
    last = parts[-1].read_bytes()
    parts[-1].write_bytes(last[:-1] + bytes([last[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="changed while it was loaded"):
        files.check()
    assert WeightFiles(parts[0]).identity != files.identity
    parts[1].rename(parts[1].with_suffix(".away"))
    with pytest.raises(CheckpointError, match=rf"lacks {parts[1].name}; the model .* has {len(parts)} parts"):
        open_model(str(parts[0]))
    parts[1].with_suffix(".away").rename(parts[1])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"says split\.no=2 .* but is file 1"):
        open_model(str(parts[0]))


def test_folders_that_say_too_little(tmp_path: Path) -> None:
    path, _ = make_file(tmp_path, {"": "F16"})
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"an image encoder")
    assert resolve(str(tmp_path)) == path
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models \(other\.gguf, tiny\.gguf\)"):
        resolve(str(tmp_path))
    (tmp_path / "original" / "beside.gguf").write_bytes(path.read_bytes())
    assert resolve(str(tmp_path / "original")) == tmp_path / "original", "a folder's own weights come first"
    (tmp_path / "original").rename(tmp_path / "folder.gguf")
    assert open_model(str(tmp_path / "folder.gguf")).prequantized == {}, "a folder may be called so"


def test_plans_need_no_more_than_the_header(made: dict[str, Any]) -> None:
    path, _ = made["4 in 8 bits"]
    planned = planned_model(describe(str(path)))
    assert planned.arch == open_model(str(path)).arch and planned.tokenizer is None
    assert planned.prequantized == {f"{role}.weight": form for role, form in MIXES["4 in 8 bits"][1].items()}
    planner = planner_of(
        EngineConfig(model=str(path)), describe(str(path)), Job((40,) * 10, (30,) * 10), load_hardware("t4")
    )
    assert planner.engine_plan.weight_plan.tier_bytes("gpu") > 0
    bits = {tensor.spec.role: tensor.bits for tensor in planner.engine_plan.weight_plan.all_tensors}
    assert (bits["qkv.weight"], bits["gate_up.weight"]) == (8, 16)


def test_one_file_drafts_for_another(made: dict[str, Any], tmp_path: Path) -> None:
    target, model = made["4 bits"]
    prompts = random_prompts([4, 9])
    with engine(target, tmp_path, draft=(str(made["8 bits"][0]),), tree="<2,1>") as llm:
        tokens = [completion.token_ids for completion in llm.generate(prompts, GREEDY)]
        assert llm.report()["speculation"]["acceptance"]
    assert tokens == [greedy_tokens(model, prompt, 10) for prompt in prompts]


def test_the_command_takes_a_file(made: dict[str, Any], tmp_path: Path) -> None:
    path, model = made["8 bits"]
    (tmp_path / "prompts.txt").write_text("hello\nthere\n")
    words = [
        *("--model", str(path), "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out.jsonl")),
        *("--device", "cpu", "--max-tokens", "4", "--gpu-memory", "1GiB", "--cpu-memory", "1GiB", "--ignore-eos"),
        *("--offload-dir", str(tmp_path / "offload"), "--percent", "100", "0", "100", "0", "100", "0"),
    ]
    assert main(words) == 0
    tokenizer = make_tokenizer()
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, prompt in zip(rows, ("hello", "there"), strict=True):
        assert row["token_ids"] == greedy_tokens(model, tokenizer(prompt).input_ids, 4, eos_token_id=None), row
