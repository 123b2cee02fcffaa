"""AWQ and GPTQ checkpoints, packed here by hand from explicit codes, zero points and scales."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch import LLM, SamplingParams
from flexbatch.models import checkpoint
from flexbatch.models.checkpoint import CheckpointError, QuantizedPiece
from flexbatch.models.quantized.config import read_quantization
from flexbatch.models.quantized.scheme import Form
from flexbatch.models.quantized.words import AWQ, GPTQ
from flexbatch.models.specs import weight_specs
from tests.models.dense import DenseModel
from tests.tiny_models import make_model, random_prompts

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
GROUP = 32
# AutoAWQ packs the outputs of a word in this order.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
METHODS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
    "gptq_v2": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
    },
}


def words(fields):
    """int32 from [..., 8] four-bit fields, lowest first, by plain arithmetic."""
    total = sum(fields[..., i].long() << (4 * i) for i in range(8))
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def pack_outputs(values, order):
    """[inputs, outputs] -> [inputs, outputs / 8]."""
    eights = values.unflatten(-1, (-1, 8))
    return words(torch.stack([eights[..., output] for output in order], dim=-1))


def quantize(rows, columns, method, group, generator):
    """Stored tensors of a random matrix, and the matrix [rows, columns] that they mean."""
    groups = columns // group
    codes = torch.randint(0, 16, (columns, rows), generator=generator)
    zeros = torch.randint(1, 16, (groups, rows), generator=generator)
    scales = (0.02 + 0.02 * torch.rand(groups, rows, generator=generator)).half()
    meant = torch.stack([scales[k // group].float() * (codes[k] - zeros[k // group]) for k in range(columns)], dim=1)
    if method == "awq":
        return {
            "qweight": pack_outputs(codes, AWQ_ORDER),
            "qzeros": pack_outputs(zeros, AWQ_ORDER),
            "scales": scales,
        }, meant
    stored_zeros = zeros if method == "gptq_v2" else zeros - 1
    qweight = words(codes.unflatten(0, (-1, 8)).movedim(1, -1))
    g_idx = torch.arange(columns, dtype=torch.int32) // group
    return {"qweight": qweight, "qzeros": pack_outputs(stored_zeros, range(8)), "scales": scales, "g_idx": g_idx}, meant


def make(folder, method, case="llama", group=GROUP, tokenizer=False, **overrides):
    """Replace the matrices of the blocks in a tiny model by quantized ones. Returns the torch model with what they
    mean."""
    model = make_model(case, folder, tokenizer=tokenizer, **overrides)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(5)
    for name in list(tensors):
        # Quantizers leave routers alone.
        if tensors[name].dim() == 2 and (".layers." in name or ".h." in name) and not name.endswith(".gate.weight"):
            packed, meant = quantize(*tensors.pop(name).shape, method, group, generator)
            tensors |= {name.replace("weight", suffix): tensor.contiguous() for suffix, tensor in packed.items()}
            weight_of(model, name).copy_(meant)
    save_file(tensors, folder / "model.safetensors")
    configure(folder, quantization_config={**METHODS[method], "group_size": group})
    return model


def weight_of(model, name):
    """The weight that a file's name stands for: transformers keeps those of all experts in one tensor."""
    found = EXPERT.fullmatch(name)
    if found is None:
        return model.get_parameter(name).data
    layer, expert, matrix = found.groups()
    experts = model.get_submodule(f"{layer}.mlp.experts")
    if matrix == "w2":
        return experts.down_proj.data[int(expert)]
    return experts.gate_up_proj.data[int(expert)].chunk(2)[matrix == "w3"]


EXPERT = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w\d)\.weight")


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def read(folder, packed=False):
    arch = checkpoint.read_arch(folder)
    stages = {}
    for spec in weight_specs(arch):
        stages.setdefault(spec.layer, {})[spec.role] = torch.full(spec.shape, float("nan"))
    for piece in checkpoint.stream(folder, arch, packed=packed):
        if isinstance(piece, QuantizedPiece):
            assert (
                piece.codes.dtype == torch.uint8
                and piece.codes.shape[1] * 2 == stages[piece.layer][piece.role].shape[1]
            )
            piece = piece.dense()
        stages[piece.layer][piece.role][piece.rows or slice(None)] = piece.tensor.float()
    return arch, stages


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_packed_weights_mean_what_was_packed(method, tmp_path):
    model = make(tmp_path, method, **SIZES)
    arch, stages = read(tmp_path, packed=True)
    prompts = random_prompts([7, 1, 30])
    for prompt, logits in zip(prompts, DenseModel(arch, stages, 3, 32).step(prompts), strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([prompt])).logits[0], atol=5e-5, rtol=1e-5)
    # Expanded to 16 bits: each weight within half a unit in the last place of float16.
    for layer, tensors in read(tmp_path)[1].items():
        for role, tensor in tensors.items():
            torch.testing.assert_close(tensor, stages[layer][role], atol=1e-7, rtol=2**-11)


@pytest.mark.parametrize("method", ["awq", "gptq"])
@torch.no_grad()
def test_interleaved_projections_stay_packed(method, tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True}
    model = make(tmp_path, method, "falcon-40b", **sizes)
    arch, stages = read(tmp_path, packed=True)
    (prompt,) = random_prompts([20])
    torch.testing.assert_close(
        DenseModel(arch, stages, 1, 32).step([prompt])[0], model(torch.tensor([prompt])).logits[0], atol=5e-5, rtol=1e-5
    )


@pytest.mark.parametrize("method", ["awq", "gptq"])
@torch.no_grad()
def test_experts_stay_packed(method, tmp_path):
    """Every expert's codes and scales are its own; the router is not quantized."""
    sizes = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 96}
    model = make(tmp_path, method, "mixtral", tokenizer=True, **{**SIZES, **sizes})
    arch, stages = read(tmp_path, packed=True)
    formats = checkpoint.prequantized(tmp_path, arch)
    assert formats["experts.0.gate_up.weight"] == formats["experts.4.down.weight"] == Form(4, GROUP)
    assert "router.weight" not in formats
    prompts = random_prompts([7, 1, 30])
    for prompt, logits in zip(prompts, DenseModel(arch, stages, 3, 32).step(prompts), strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([prompt])).logits[0], atol=5e-5, rtol=1e-5)
    settings = {"percent": (30, 40, 0, 100, 100, 0), "gpu_memory": "1GiB", "cpu_memory": "1GiB"}
    with LLM(str(tmp_path), device="cpu", gpu_batch_size=3, offload_dir=str(tmp_path / "offload"), **settings) as llm:
        completions = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
        placed = llm.engine_plan.weight_plan.all_tensors
        assert {t.bits for t in placed if t.spec.role.startswith("experts.")} == {4}
        assert llm.planner.problem.shape.total_bytes(4) == sum(tensor.num_bytes for tensor in placed)
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert completion.token_ids == wanted[0, len(prompt) :].tolist()


def test_one_group_for_a_whole_row(tmp_path):
    make(tmp_path, "gptq", group=64, **{**SIZES, "intermediate_size": 64})
    configure(tmp_path, quantization_config={**METHODS["gptq"], "group_size": -1})
    assert {piece.group for piece in packed_pieces(tmp_path)} == {64}


@pytest.mark.parametrize(
    ("method", "weight_bits", "percent"),
    [
        ("awq", 16, None),
        ("awq", 4, (0, 0, 100, 0, 100, 0)),
        ("gptq", 16, (0, 100, 30, 40, 50, 50)),
        ("gptq_v2", 4, (30, 40, 0, 100, 100, 0)),
    ],
    ids=str,
)
@torch.no_grad()
def test_engine_runs_packed_weights_as_they_are(method, weight_bits, percent, tmp_path):
    """Their own bits win over --weight-bits; in float32 the parameters are exact, so the tokens are those of the
    meant matrices. A second start reuses them."""
    model = make(tmp_path, method, tokenizer=True, **SIZES)
    prompts, read = random_prompts([3, 20]), []
    for _ in range(2):
        settings = {
            "weight_bits": weight_bits,
            "percent": percent,
            "gpu_memory": "1GiB",
            "cpu_memory": "1GiB",
            "offload_dir": str(tmp_path / "offload"),
        }
        with LLM(str(tmp_path), device="cpu", gpu_batch_size=1, num_gpu_batches=2, **settings) as llm:
            completions = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
            assert {
                t.bits for t in llm.engine_plan.weight_plan.all_tensors if t.spec.role in ("qkv.weight", "down.weight")
            } == {4}
            read.append(llm.report()["loaded_bytes"])
        for prompt, completion in zip(prompts, completions, strict=True):
            wanted = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
            assert completion.token_ids == wanted[0, len(prompt) :].tolist()
    assert read[1] < read[0]


def test_roles_that_are_packed_everywhere(tmp_path):
    make(tmp_path, "awq", **SIZES)
    arch = checkpoint.read_arch(tmp_path)
    assert checkpoint.prequantized(tmp_path, arch) == dict.fromkeys(
        ("qkv.weight", "o.weight", "gate_up.weight", "down.weight"), Form(4, GROUP)
    )

    def leave_alone(tensors):
        for suffix in ("qweight", "qzeros", "scales"):
            tensors.pop(f"model.layers.1.mlp.down_proj.{suffix}")
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 96)

    change(tmp_path, leave_alone)
    assert "down.weight" not in checkpoint.prequantized(tmp_path, arch)


@pytest.mark.parametrize("group", [32, 8])
@pytest.mark.parametrize("weight_bits", [16, 4])
def test_the_plan_has_the_bytes_of_the_checkpoint(group, weight_bits, tmp_path):
    """Its own groups, a matrix that one layer has unquantized and so all have at --weight-bits, norms: as stored,
    byte for byte."""
    make(tmp_path, "gptq", group=group, tokenizer=True, **SIZES)

    def leave_alone(tensors):
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"model.layers.1.mlp.down_proj.{suffix}")
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 96)

    change(tmp_path, leave_alone)
    with LLM(
        str(tmp_path),
        device="cpu",
        weight_bits=weight_bits,
        gpu_memory="1GiB",
        cpu_memory="1GiB",
        offload_dir=str(tmp_path / "offload"),
    ) as llm:
        stored = llm.engine_plan.weight_plan.all_tensors
        assert {tensor.spec.role: tensor.group for tensor in stored}["o.weight"] == group
        assert [tensor.bits for tensor in stored if tensor.spec.role == "down.weight"] == [weight_bits] * 2
        assert llm.planner.problem.shape.total_bytes(4) == sum(tensor.num_bytes for tensor in stored)
        assert llm.policy.weight_bits == 4
        (need,) = (
            row["num_bytes"]
            for row in llm.plan(llm.config, llm.planner.problem.job)["memory"]
            if row["what"] == "weights"
        )
        assert llm.weights.plan == llm.engine_plan.weight_plan
        assert need == sum(size for name, size in llm.tiers.gpu.used_bytes.items() if name.startswith("weights "))


def packed_pieces(folder):
    arch = checkpoint.read_arch(folder)
    return [piece for piece in checkpoint.stream(folder, arch, packed=True) if isinstance(piece, QuantizedPiece)]


def test_groups_split_without_change(tmp_path):
    make(tmp_path, "awq", **SIZES)
    piece = next(piece for piece in packed_pieces(tmp_path) if piece.role == "o.weight")
    assert piece.group == GROUP and piece.parameters.shape[1] == 64 // GROUP
    for bits, group in ((4, 16), (8, 32), (8, 8)):
        stored = piece.stored_as(bits, group)
        assert stored.parameters.shape[1] == 64 // group and stored.codes.shape[1] == 8 * bits
        assert torch.equal(stored.dense().tensor, piece.dense().tensor)
    with pytest.raises(ValueError, match="4 bits in groups of 32 inputs cannot be stored as 4 bits in groups of 64"):
        piece.stored_as(4, 64)


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "eetq", "bits": 8}, {"quant_method": "gptq", "bits": 5}, {"quant_method": None}],
)
def test_other_quantizations_are_refused(tmp_path, quantization):
    make(tmp_path, "gptq", **SIZES)
    configure(tmp_path, quantization_config=quantization)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: .* is not supported; supported: "):
        packed_pieces(tmp_path)


@pytest.mark.parametrize(("method", "added"), [("awq", 0), ("gptq", 1), ("gptq_v2", 0)])
def test_every_stored_zero_point_means_what_the_format_says(method, added):
    """All 16 stored values and all 16 codes, by the published formula: the sum has four bits, like what is stored."""
    codes, stored = torch.arange(16)[:, None].expand(16, 16), torch.arange(16)[None].contiguous()
    scales = torch.linspace(0.5, 2, 16)[None].half()
    words_of = {"awq": lambda: pack_outputs(codes.contiguous(), AWQ_ORDER)}.get(
        method, lambda: words(codes.unflatten(0, (-1, 8)).movedim(1, -1))
    )
    tensors = {
        "qweight": words_of(),
        "qzeros": pack_outputs(stored, AWQ_ORDER if method == "awq" else range(8)),
        "scales": scales,
    }
    quantization = read_quantization({"quantization_config": {**METHODS[method], "group_size": 16}})
    packed, parameters = quantization.schemes[0][1].codes(tensors, 16, 16)
    found = QuantizedPiece(0, "o.weight", None, packed, parameters, 4, 16).dense().tensor
    wanted = [[scales[0, n].item() * (k - (n + added) % 16) for k in range(16)] for n in range(16)]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("key", ["checkpoint_format", "format", "version"])
@pytest.mark.parametrize(
    ("method", "spelling", "offset"),
    [
        ("gptq", "gptq", 1),
        ("gptq", "GPTQ", 1),
        ("gptq", "gptq_v2", 0),
        ("gptq", "GPTQ_V2", 0),
        ("awq", "gemm", 0),
        ("awq", "GEMM", 0),
    ]
    + [
        ("gptq", name, None)
        for name in ("gemm", "marlin", "gptq-v2", "gptq_v3", "v2", "", " gptq", "bitblas", 1, 2, ["gptq"], True)
    ]
    + [("awq", name, None) for name in ("gptq", "gptq_v2", "gemv_fast", "exllama", "llm-awq", "", 1)],
)
def test_every_spelling_of_a_layout_means_one_thing_or_is_refused(method, spelling, offset, key):
    for quant_method in (method, method.upper()):
        config = {"quantization_config": {"quant_method": quant_method, "bits": 4, "group_size": 32, key: spelling}}
        if offset is None:
            with pytest.raises(CheckpointError, match="quantization_config"):
                read_quantization(config)
        else:
            wanted = AWQ(4, 32) if method == "awq" else GPTQ(4, 32, offset)
            again = {"quantization_config": {**config["quantization_config"], "version": None, key: spelling}}
            for found in (read_quantization(config), read_quantization(again)):
                assert [scheme for _, scheme in found.schemes] == [wanted]


@pytest.mark.parametrize(
    "change",
    [
        *({"bits": bits} for bits in (True, "4", 4.0, 5, 16, None, [4])),
        *({"group_size": group} for group in (0, -2, "128", 64.0, True, [32], 2**40)),
        {"is_marlin_format": True},
        {"is_marlin_format": "no"},
        {"pack_dtype": "int64"},
        {"checkpoint_format": "gptq", "format": "gptq_v2"},
        {"bits": 4, "w_bit": 8},
        {"group_size": 32, "q_group_size": 64},
    ],
    ids=str,
)
def test_what_the_packing_cannot_be_is_refused(change):
    with pytest.raises(CheckpointError, match="quantization_config"):
        read_quantization({"quantization_config": {**METHODS["gptq"], **change}})


@pytest.mark.parametrize("value", [[1], "gptq", 4, True])
def test_a_quantization_config_is_an_object(value):
    with pytest.raises(CheckpointError, match=r"quantization_config=.* must be an object"):
        read_quantization({"quantization_config": value})


def test_other_layouts_are_refused(tmp_path):
    make(tmp_path, "awq", **SIZES)
    configure(tmp_path, quantization_config={**METHODS["awq"], "version": "gemv_fast"})
    with pytest.raises(CheckpointError, match=r"awq layout 'gemv_fast' is not supported"):
        packed_pieces(tmp_path)


SPOILED = {
    "no scales": (
        lambda t: t.pop("model.layers.0.self_attn.o_proj.scales"),
        r"o_proj\.\w+ is there, but the weight files lack model\.layers\.0\.self_attn\.o_proj\.scales",
    ),
    "shape": (
        lambda t: t.update({"model.layers.0.self_attn.o_proj.qweight": torch.zeros(9, 64, dtype=torch.int32)}),
        r"o_proj\.qweight has shape \[9, 64\], wanted \[8, 64\]",
    ),
    "bias": (
        lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}),
        r"o_proj\.bias \[64\] is not expected",
    ),
    "all": (
        lambda t: [t.pop(f"model.layers.0.self_attn.o_proj.{s}") for s in ("qweight", "qzeros", "scales", "g_idx")],
        r"lack layers\.0\.self_attn\.o_proj\.weight",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_packed_weights_are_named(tmp_path, kind):
    make(tmp_path, "gptq", **SIZES)
    edit, message = SPOILED[kind]
    change(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        packed_pieces(tmp_path)


def test_zero_biases_that_quantizers_add_are_skipped(tmp_path):
    make(tmp_path, "gptq", **SIZES)
    change(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(64)}))
    assert packed_pieces(tmp_path)
