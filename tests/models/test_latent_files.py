"""Files of models with latent attention: what they are stored in, published configurations, and refusals."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.models import checkpoint, families
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.expert_arch import Experts
from flexbatch.models.experts import route
from flexbatch.models.inspection import describe_arch
from flexbatch.models.latent_arch import Latent
from flexbatch.models.lora.adapter import read_adapter
from flexbatch.models.lora.request import LoRARequest
from flexbatch.models.shapes import shape
from flexbatch.models.specs import weight_specs
from tests.models.test_arch import configuration
from tests.models.test_quantized import read
from tests.peft_folders import linear_modules, write_adapter
from tests.quantized_writer import KINDS, configure
from tests.tiny_models import make_model

MATRIX = re.compile(r"(self_attn\.\w+_proj\w*|mlp\.(\w+\.)*(\d+\.)?(gate|up|down)_proj)\.weight$")


@pytest.mark.parametrize("kind", ["fp8-blocks", "int4-rows-zeros", "bnb-int8"])
@pytest.mark.parametrize("case", ["deepseek_v3", pytest.param("deepseek_v2", marks=pytest.mark.slow)])
def test_experts_and_projections_in_codes(case, kind, tmp_path):
    """As DeepSeek publishes them, in blocks of which the last are partial. Also the matrix that becomes two here."""
    make_model(case, tmp_path / "codes", tokenizer=False)
    make_model(case, tmp_path / "plain", tokenizer=False)
    tensors, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("codes", "plain"))
    draw, written, sizes = np.random.default_rng(5), 0, KINDS[kind]
    for name in [name for name in tensors if MATRIX.search(name)]:
        stored, meant = sizes.write(*tensors.pop(name).shape, draw)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{suffix}": value.contiguous() for suffix, value in stored.items()}
        plain[name] = meant.float().contiguous()
        written += 1
    save_file(tensors, tmp_path / "codes" / "model.safetensors")
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    configure(tmp_path / "codes", quantization_config=KINDS[kind].config)
    assert written > 60
    wanted = read(tmp_path / "plain", packed=False)
    for packed in (False, True):
        for key, found in read(tmp_path / "codes", packed).items():
            torch.testing.assert_close(
                found, wanted[key], atol=1e-6, rtol=2e-7, msg=lambda text, key=key: f"{key} {text}"
            )


def test_a_head_of_the_stored_matrix_is_cut_where_its_values_begin(tmp_path):
    make_model("deepseek_v3", tmp_path, tokenizer=False)
    arch = checkpoint.read_arch(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["model.layers.1.self_attn.kv_b_proj.weight"]
    stages = checkpoint.load(tmp_path, arch, torch.float32)
    keys, values = stages[1]["k_up.weight"], stages[1]["v_up.weight"]
    assert keys.shape == (6 * 14, 28) and values.shape == (6 * 10, 28)
    assert torch.equal(keys[14:28], stored[24:38]) and torch.equal(values[10:20], stored[38:48])


def test_missing_and_misshaped_tensors_are_named(tmp_path):
    make_model("deepseek_v3", tmp_path, tokenizer=False)
    arch, tensors = checkpoint.read_arch(tmp_path), load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    whole = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"the weight files lack layers\.1\.self_attn\.kv_b_proj\.weight \[144, 28\]$"
    ):
        checkpoint.check(tmp_path, arch)
    save_file({**tensors, name: whole[:-1]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has shape \[143, 28\], wanted \[144, 28\]"):
        checkpoint.check(tmp_path, arch)


BAD = {
    "another router": ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
    "another score": ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' .* known: 'sigmoid'"),
    "normalized shares": ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
    "every second layer": ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
    "uneven groups": ("deepseek_v3", {"n_group": 3}, "n_group=3 groups"),
    "layers of no kind": (
        "glm4_moe_lite",
        {"mlp_layer_types": ["dense", "thin", "sparse"]},
        "must name each of num_hidden_layers=3",
    ),
    "half a rotation": ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, "turns 4 of qk_rope_head_dim=8"),
    "no rank": ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank=0 must be a whole number from 1"),
    "an odd rotation": ("deepseek_v3", {"qk_rope_head_dim": 7}, "must be an even"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_computed_is_refused_by_its_key(kind):
    case, changed, message = BAD[kind]
    full = configuration(case).to_dict()
    if "partial_rotary_factor" in changed:
        full["rope_parameters"] = {**full["rope_parameters"], "partial_rotary_factor": 0.5}
    with pytest.raises(CheckpointError, match=message):
        families.read_arch({**full, **changed})


def test_a_group_may_be_ranked_by_its_best_expert():
    """One group has the best expert, the other the two best together."""
    scores = torch.tensor([[3.0, 0.0, 0.0, 2.5, 2.4, 0.0]])
    for best, wanted in ((1, [0, 1]), (2, [3, 4])):
        experts = Experts(6, 2, 4, groups=2, top_groups=1, group_best=best)
        assert route(experts, {"router.weight": torch.eye(6)}, scores)[0].tolist() == [wanted]


def test_public_shapes():
    """As the papers give them: 671 billion weights, of which a token goes through 37, and 576 numbers of cache."""
    arch = shape("deepseek-v3")
    assert arch.latent == Latent(512, 64, 128, 128, 1536) and (arch.head_dim, arch.num_kv_heads) == (576, 1)
    assert arch.experts is not None and (arch.experts.groups, arch.experts.top_groups) == (8, 4)
    assert [arch.experts_of(layer) is None for layer in range(4)] == [True, True, True, False]
    assert arch.attention_scale == pytest.approx(192**-0.5 * (0.1 * np.log(40) + 1) ** 2) and arch.context == 163840
    told = describe_arch(arch)
    assert round(told["parameters"] / 1e9) == 671 and 36e9 < told["experts"]["active_parameters"] < 38e9
    assert told["latent"] == {"rank": 512, "rotated": 64, "query_rank": 1536, "cached_per_token_and_layer": 576}
    lite = shape("deepseek-ai/DeepSeek-V2-Lite-Chat")
    assert lite.latent == Latent(512, 64, 128, 128) and sum(spec.numel for spec in weight_specs(lite)) // 10**8 == 157
    air = shape("glm-4.5-air")
    assert sum(spec.numel for spec in weight_specs(air)) // 10**9 == 106 and air.rotary_dim == 64 and not air.latent


def test_kimi_is_read_like_deepseek():
    config = configuration("deepseek_v3").to_dict()
    wanted = families.read_arch(config)
    assert dataclasses.replace(families.read_arch({**config, "model_type": "kimi_k2"}), family="deepseek_v3") == wanted


def test_an_update_of_what_leads_out_of_the_latent_is_refused_by_name(tmp_path):
    model = make_model("deepseek_v3", tmp_path / "model", tokenizer=False)
    arch = checkpoint.read_arch(tmp_path / "model")
    every = linear_modules(model)
    assert read_adapter(LoRARequest("a", 1, str(write_adapter(tmp_path / "a", model, every))), arch).updates
    folder = write_adapter(tmp_path / "b", model, [*every, "model.layers.1.self_attn.kv_b_proj"])
    with pytest.raises(CheckpointError, match=r"self_attn\.kv_b_proj cannot have a low-rank update; merge it"):
        read_adapter(LoRARequest("b", 1, str(folder)), arch)
