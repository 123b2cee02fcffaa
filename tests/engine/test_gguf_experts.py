"""Engines over GGUF files with experts: tokens of the weights that the file means, kept in the file's own codes where
a store holds them, wherever they lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType

from flexbatch import LLM, SamplingParams
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.opened import open_model
from flexbatch.models.quantized.scheme import Form
from tests.gguf_writer import of_experts, write_gguf
from tests.tiny_models import greedy_tokens, make_model, make_tokenizer, random_prompts

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 32}
FLOATS = Form(4, 32, floats=True)
FILES: dict[str, tuple[str, dict[str, Any], dict[str, str], dict[str, Form]]] = {
    "gpt-oss": (
        "gpt_oss", {"swiglu_limit": 7.0}, {"": "Q8_0", "exps": "MXFP4", "token_embd": "F16"},
        {"qkv": Form(8, 32), "o": Form(8, 32), "gate_up": FLOATS, "down": FLOATS},
    ),
    "qwen3moe": (
        "qwen3_moe", SPARSE, {"": "F16", "ffn_down_exps": "Q8_0", "ffn_up_exps": "Q4_1", "exps": "Q4_0"},
        {"gate_up": Form(4, 32), "down": Form(8, 32)},
    ),
    "mixed": (
        "qwen3_moe", SPARSE, {"": "MXFP4", "ffn_gate_exps": "MXFP4", "ffn_up_exps": "Q4_0", "attn_k": "F32"},
        {"o": FLOATS, "down": FLOATS},
    ),
    "Mixtral": (
        "mixtral", {"sliding_window": None, "intermediate_size": 96}, {"": "Q5_1", "exps": "Q5_0"},
        {"qkv": Form(8, 32), "o": Form(8, 32), "gate_up": Form(8, 32), "down": Form(8, 32)},
    ),
}  # fmt: skip
"""Name -> case, sizes, types of matrices by the ends of their names, and the forms of the roles that are kept."""
PLACEMENTS = {"gpu": (100, 0), "disk": (0, 0), "cpu": (0, 100), "mixed": (30, 40)}
GREEDY = SamplingParams(max_tokens=8, temperature=0)


@torch.no_grad()
def make_file(folder: Path, name: str, **options: Any) -> tuple[Path, Any]:
    """A file, and the model of transformers with the weights that it means."""
    case, sizes, kinds, _ = FILES[name]
    model = make_model(case, folder / "original", **{**SIZES, **sizes})

    def kind_of(stored: str) -> str:
        return next((kind for end, kind in kinds.items() if end and end in stored), kinds[""])

    def mean(weights: torch.Tensor, stored: str) -> None:
        kind = GGMLQuantizationType[kind_of(stored)]
        values = gguf.quants.dequantize(gguf.quants.quantize(weights.contiguous().numpy(), kind), kind)
        weights.copy_(torch.from_numpy(values.copy()))

    path = folder / "tiny.gguf"
    write_gguf(model, path, kind_of=kind_of, tokenizer=make_tokenizer(), **options)
    architecture = {"gpt_oss": "gpt-oss", "mixtral": "llama"}.get(case, "qwen3moe")
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    table = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    for parameter, weights in model.named_parameters():
        for stored, matrices in of_experts(parameter, weights, architecture):
            if stored.endswith(".weight"):
                mean(matrices, stored)
        if weights.dim() == 2 and not re.search(r"mlp\.(gate|router)|experts", parameter):
            mean(weights, f"{table.get_name(parameter.removesuffix('.weight'))}.weight")
    return path, model


@pytest.mark.parametrize(
    "name, placement",
    [
        pytest.param(
            name, placement, marks=() if (name, placement) in (("gpt-oss", "disk"), ("qwen3moe", "gpu")) else slow
        )
        for slow in (pytest.mark.slow,)
        for name in FILES
        for placement in PLACEMENTS
    ],
)
def test_tokens_equal_transformers(name: str, placement: str, tmp_path: Path) -> None:
    path, model = make_file(tmp_path, name)
    prompts = random_prompts([3, 20, 1, 40])
    wanted = [greedy_tokens(model, prompt, 8) for prompt in prompts]
    engine = {"gpu_batch_size": 2, "num_gpu_batches": 2, "device": "cpu", "gpu_memory": "1GiB", "cpu_memory": "1GiB"}
    percent = PLACEMENTS[placement] + (100, 0, 100, 0)
    with LLM(str(path), percent=percent, offload_dir=str(tmp_path / "off"), **engine) as llm:
        kept = {re.sub(r"experts\.\d+\.", "", role): form for role, form in llm.engine_plan.model.prequantized.items()}
        assert kept == {f"{role}.weight": form for role, form in FILES[name][3].items()}
        assert [completion.token_ids for completion in llm.generate(prompts, GREEDY)] == wanted
        assert llm.generate(["hello there"], GREEDY)[0].text
        llm.weights.check()


def add_other_scoring(writer: gguf.GGUFWriter) -> None:
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def test_what_would_be_computed_otherwise_is_refused(tmp_path: Path) -> None:
    path, _ = make_file(tmp_path / "a", "qwen3moe", more=add_other_scoring)
    with pytest.raises(CheckpointError, match=r"qwen3moe.expert_gating_func=2 is not the scoring .* 1 in llama.cpp"):
        open_model(str(path))
    path, _ = make_file(tmp_path / "b", "gpt-oss")
    data = bytearray(path.read_bytes())
    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == "blk.1.ffn_up_exps.weight")
    data[tensor.data_offset] = 255
    path.write_bytes(data)
    opened = open_model(str(path))
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up_exps.weight has blocks whose scale is 255"):
        list(opened.pieces(set(), 0, torch.float32, packed=True))


@pytest.mark.parametrize("name", ["qwen2", "glm4", "gemma3"])
def test_other_mixtures_of_experts_are_refused_by_name(name: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", name)
    writer.add_expert_count(8)
    writer.add_tensor("token_embd.weight", torch.ones(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=f"x.gguf: {name} with experts is not read .* gpt-oss, llama, olmoe"):
        open_model(str(tmp_path / "x.gguf"))
