"""What is particular to ERNIE 4.5, Hunyuan, MiniMax-M2, DBRX and Llama 4: published files, refusals, tensors beside the
model, and rules of their routers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.kernels.expert_codes import GatedActivation, stacks_of
from flexbatch.kernels.experts import scaled_inputs
from flexbatch.models import checkpoint, families
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.expert_arch import Experts
from flexbatch.models.experts import route
from tests.models.dense import DenseModel
from tests.models.test_arch import configuration
from tests.tiny_models import make_model, random_prompts

BAD = {
    "layers with unlike routers": ("hunyuan_v1_moe", {"moe_topk": [2, 3, 2]}, r"moe_topk gives layers .* \[2, 3\]"),
    "unlike widths": ("hunyuan_v1_moe", {"moe_intermediate_size": [44, 44, 48]}, "must be alike"),
    "experts of another width": ("hunyuan_v1_moe", {"moe_intermediate_size": [48] * 3}, "moe_intermediate_size=48"),
    "two shared MLPs": ("hunyuan_v1_moe", {"num_shared_expert": 2}, "num_shared_expert=2 is not supported"),
    "shared keys": ("hunyuan_v1_moe", {"use_cla": True}, "use_cla=True is not supported"),
    "no expert in first layers": ("hunyuan_v1_moe", {"moe_layer_num_skipped": 1}, "moe_layer_num_skipped=1"),
    "another score": ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func='softmax' .* known: 'sigmoid'"),
    "linear attention": ("minimax_m2", {"attn_type_list": [0, 1, 1]}, r"attn_type_list=\[0, 1, 1\]"),
    "a shared MLP": ("minimax_m2", {"shared_intermediate_size": 44}, "shared_intermediate_size=44"),
    "another gate": ("ernie4_5_moe", {"moe_gate": "top2_fused"}, "moe_gate='top2_fused' is not supported"),
    "more than there are": ("ernie4_5_moe", {"moe_k": 7}, "moe_k=7 must be at most moe_num_experts=6"),
    "layers that nobody knows": (
        "llama4_text",
        {"layer_types": ["full_attention"] * 3},
        "must name each of num_hidden_layers=4 layers",
    ),
    "other layers": ("llama4_text", {"layer_types": ["sliding_attention"] * 4}, "chunked_attention or full_attention"),
    "too few rotations": ("llama4_text", {"no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers"),
    "half a rotation": ("llama4_text", {"no_rope_layers": [1, 0.5, 1, 1]}, "must be a list of 0 and 1"),
    "a list of nothing": ("hunyuan_v1_moe", {"moe_topk": []}, "moe_topk=.* or a list of them"),
    "a count as text": ("dbrx", {"ffn_config": {"moe_num_experts": "6"}}, "num_experts='6' must be a whole number"),
    "an entry as a number": ("dbrx", {"attn_config": 3}, "attn_config=3 must be an object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_computed_is_refused_by_its_key(kind):
    case, changed, message = BAD[kind]
    with pytest.raises(CheckpointError, match=message):
        families.read_arch({**configuration(case).to_dict(), **changed})


def test_keys_about_experts_are_known_inside_a_text_config_too():
    text = configuration("llama4_text").to_dict()
    config = {"model_type": "llama4", "text_config": text}
    assert families.read_arch(config).experts == families.read_arch(text).experts
    with pytest.raises(CheckpointError, match="num_shared_experts=3 is not known of model_type 'llama4'"):
        families.read_arch({**config, "text_config": {**text, "num_shared_experts": 3}})


@pytest.mark.parametrize(
    ("case", "prefix", "extra", "kind"),
    [
        ("ernie4_5_moe", "", "model.mtp_block.0.mlp.up_proj.weight", None),
        ("minimax_m2", "", "model.mtp.layers.0.eh_proj.weight", None),
        ("llama4_text", "language_model.", "vision_model.class_embedding", "llama4"),
    ],
)
@torch.no_grad()
def test_what_lies_beside_the_text_model_is_skipped_and_said(case, prefix, extra, kind, tmp_path, caplog):
    model = make_model(case, tmp_path, tokenizer=False)
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file({**tensors, extra: torch.ones(2, 3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = checkpoint.read_config(tmp_path)
    arch = families.read_arch({"model_type": kind, "text_config": config} if kind else config)
    stages = checkpoint.load(tmp_path, arch, torch.float32)
    assert extra in caplog.text and "not used" in caplog.text
    (prompt,) = random_prompts([40])
    (found,) = DenseModel(arch, stages, 1, 40).step([prompt])
    torch.testing.assert_close(found, model(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=1e-5)


def test_sums_below_the_least_are_not_divided_by():
    experts = Experts(6, 3, 4, normalize=True, normalize_least=0.9, correction=True)
    weights = {"router.weight": torch.eye(6), "router.correction": torch.tensor([0, 0, 0, 9.0, 9.0, 9.0])}
    chosen, shares = route(experts, weights, torch.tensor([[5.0, 0, 0, 0, 0, 0]]))
    assert chosen.tolist() == [[3, 4, 5]] and shares.sum() < 0.1
    torch.testing.assert_close(shares[0], torch.tensor([5.0, 0, 0, 0, 0, 0]).softmax(0)[3:] / 0.9)


def test_sigmoids_that_round_to_one_do_not_tie():
    weights = {"router.weight": torch.tensor([20.0, 30.0, 40.0, 25.0]).diag()}
    chosen, shares = route(Experts(4, 1, 4, scoring="sigmoid"), weights, torch.ones(1, 4))
    assert chosen.tolist() == [[2]] and shares.tolist() == [[1.0]]


def test_shares_may_scale_what_an_expert_is_given():
    """Two experts of a token are given different inputs."""
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(size, generator=generator) for size in ((5, 6), (4, 8, 6), (4, 6, 4)))
    chosen, shares = torch.tensor([[0, 3], [1, 2], [3, 1], [3, 0], [2, 3]]), torch.rand(5, 2, generator=generator)
    found = scaled_inputs(x, chosen, shares, stacks_of([(0, gate_up)]), stacks_of([(0, down)]), GatedActivation("silu"))
    for token in range(5):
        wanted = torch.zeros(6)
        for expert, share in zip(chosen[token], shares[token], strict=True):
            gate, up = (gate_up[expert] @ (share * x[token])).chunk(2)
            wanted += down[expert] @ (torch.nn.functional.silu(gate) * up)
        torch.testing.assert_close(found[token], wanted, atol=1e-5, rtol=1e-5)


HUNYUAN_A13B = {
    "model_type": "hunyuan_v1_moe",
    "architectures": ["HunYuanMoEV1ForCausalLM"],
    "attention_head_dim": 128,
    "cla_share_factor": 2,
    "dense_list": [4096, 0],
    "eos_token_id": 127960,
    "group_limited_greedy": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 3072,
    "kv_lora_rank": None,
    "max_position_embeddings": 32768,
    "moe_drop_tokens": False,
    "moe_intermediate_size": [3072] * 32,
    "moe_layer_num_skipped": 0,
    "moe_random_routing_dropped_token": False,
    "moe_topk": [8] * 32,
    "num_attention_heads": 32,
    "num_experts": 64,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_shared_expert": [1] * 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "alpha": 1000.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "type": "dynamic",
    },
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cla": False,
    "use_mixed_mlp_moe": True,
    "use_qk_norm": True,
    "vocab_size": 128167,
}
MINIMAX_M2 = {
    "model_type": "minimax_m2",
    "attn_type_list": [1] * 62,
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "router_jitter_noise": 0.0,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}
DBRX = {
    "model_type": "dbrx",
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 10752,
        "model_type": "",
        "moe_jitter_eps": 0.01,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
    "max_seq_len": 32768,
    "n_heads": 48,
    "n_layers": 40,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.05,
    "vocab_size": 100352,
}


def test_published_files_are_read():
    """Entries of config.json as the authors published them."""
    arch = families.read_arch(HUNYUAN_A13B)
    assert arch.experts == Experts(64, 8, 3072, normalize=True, float_router=True, shared_width=3072)
    assert arch.rope_theta == 10000.0 * 1000.0 ** (128 / 126) and arch.rope_scaling is None
    arch = families.read_arch(MINIMAX_M2)
    assert (arch.rotary_dim, arch.rope_theta, arch.experts.count) == (64, 5e6, 256) and arch.wide_qk_norm
    arch = families.read_arch(DBRX)
    assert arch.experts == Experts(16, 4, 10752, normalize=True)
    assert (arch.clip_qkv, arch.rope_theta, arch.num_kv_heads, arch.head_dim) == (8, 5e5, 8, 128)
    assert arch.norm == "layer" and not arch.norm_bias
