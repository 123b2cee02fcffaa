"""What is particular to mixtures of experts: routing, layers that differ, and that nothing of a file is passed over."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flexbatch.models import checkpoint, families
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.dummy import dummy
from flexbatch.models.expert_arch import Experts
from flexbatch.models.experts import route
from flexbatch.models.specs import weight_specs
from tests.models.dense import DenseModel
from tests.models.test_arch import configuration
from tests.tiny_models import make_model, random_prompts


@torch.no_grad()
def test_an_expert_that_nobody_chooses_and_one_that_all_do(tmp_path):
    """By corrections of -10 and +10."""
    make_model("glm4_moe-plain", tmp_path, tokenizer=False)

    def correct(tensors):
        for name, tensor in tensors.items():
            if name.endswith("correction_bias"):
                tensor[0], tensor[1] = -10.0, 10.0

    change(tmp_path, correct)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    arch = checkpoint.read_arch(tmp_path)
    stages = checkpoint.load(tmp_path, arch, torch.float32)
    prompts = random_prompts([1, 60, 7])
    for prompt, logits in zip(prompts, DenseModel(arch, stages, 3, 60).step(prompts), strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=1e-5)
    chosen, _ = route(arch.experts, stages[1], torch.randn(50, arch.hidden_size))
    assert 0 not in chosen and (chosen == 1).any(1).all() and len(chosen.unique()) > 4


def router(**fields):
    return Experts(6, 3, 4, **fields)


def test_equal_scores_go_to_the_lowest_numbers():
    """And so a token's experts do not depend on the batch that it is in."""
    weights = {"router.weight": torch.zeros(6, 8)}
    chosen, shares = route(router(), weights, torch.randn(4, 8))
    assert chosen.tolist() == [[0, 1, 2]] * 4 and torch.allclose(shares, torch.tensor(1 / 6))
    tied = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]).diag()
    chosen, _ = route(router(), {"router.weight": tied}, torch.ones(2, 6))
    assert chosen.tolist() == [[1, 3, 2]] * 2


def test_a_correction_counts_for_the_choice_alone():
    weight = torch.eye(6)
    weights = {"router.weight": weight, "router.correction": torch.tensor([0, 0, 0, 0, 0, 9.0])}
    x = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0]])
    chosen, shares = route(router(scoring="sigmoid", correction=True), weights, x)
    assert chosen.tolist() == [[5, 0, 1]]
    torch.testing.assert_close(shares[0], x[0, [5, 0, 1]].sigmoid())


def test_groups_outside_the_best_are_never_chosen_from():
    """Not even where a negative corrected score is all that the best group has left."""
    experts = Experts(6, 3, 4, scoring="sigmoid", correction=True, groups=2, top_groups=1)
    correction = torch.tensor([5.0, 5.0, -7.0, 0.0, 0.0, 0.0])
    chosen, _ = route(experts, {"router.weight": torch.eye(6), "router.correction": correction}, torch.zeros(1, 6))
    assert chosen.tolist() == [[0, 1, 2]]


ROUTERS = {
    "softmax": {"normalize": True},
    "softmax_of_chosen": {},
    "sigmoid": {},
    "sigmoid, corrected, in groups": {
        "scoring": "sigmoid",
        "correction": True,
        "groups": 2,
        "top_groups": 1,
        "top_k": 2,
    },
    "sparsemixer": {"top_k": 2, "margin": 0.02},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scoring", ROUTERS)
def test_scores_that_are_no_numbers_choose_experts_that_there_are(scoring, dtype):
    """Unlike ones: a kernel finds their matrices by these numbers. The other tokens choose as if alone, and an expert
    whose score is minus infinity is left out while there are others."""
    fields = {"count": 6, "top_k": 3, "width": 4, "scoring": scoring.partition(",")[0], **ROUTERS[scoring]}
    weights = {"router.weight": torch.eye(6, dtype=dtype), "router.correction": torch.zeros(6)}
    scores = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    alone = route(Experts(**fields), weights, scores)
    scores[1], scores[3], scores[5] = torch.nan, torch.inf, -torch.inf
    scores[2, 4] = torch.nan
    chosen, shares = route(Experts(**fields), weights, scores)
    assert all(len(set(row)) == len(row) and set(row) <= set(range(6)) for row in chosen.tolist())
    for before, after in zip(alone, (chosen, shares), strict=True):
        assert torch.equal(before[[0, 4, 6]], after[[0, 4, 6]])
    # A product with an identity makes NaN of infinities: here they come as a bias.
    bias = torch.zeros(6, dtype=dtype)
    bias[2] = -torch.inf
    chosen, shares = route(Experts(**fields, router_bias=True), weights | {"router.bias": bias}, scores[[0, 4, 6]])
    assert (chosen != 2).all() and shares.isfinite().all()


def test_routers_that_want_float32_keep_it(tmp_path):
    make_model("glm4_moe", tmp_path, tokenizer=False)
    arch = checkpoint.read_arch(tmp_path)
    stages = checkpoint.load(tmp_path, arch, torch.bfloat16)
    kept = {role for tensors in stages.values() for role, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert kept == {"router.weight", "router.correction"} == {spec.role for spec in weight_specs(arch) if spec.wide}
    stored = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(stages[1]["router.correction"], stored)


def test_layers_may_differ():
    arch = families.read_arch(configuration("qwen3_moe-window").to_dict())
    assert [arch.experts_of(layer) is not None for layer in range(3)] == [False, True, False]
    roles = [{spec.role for spec in weight_specs(arch) if spec.layer == layer} for layer in range(3)]
    assert "gate_up.weight" in roles[0] and "router.weight" not in roles[0]
    assert "gate_up.weight" not in roles[1] and "experts.5.down.weight" in roles[1]
    none = families.read_arch({**configuration("qwen3_moe").to_dict(), "mlp_only_layers": [0, 1, 2]})
    assert none.experts is None and not none.sparse_layers


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UNKNOWN = {
    "a bias of the router": "model.layers.1.mlp.gate.other_bias",
    "an expert too many": "model.layers.1.mlp.experts.8.up_proj.weight",
    "a shared expert": "model.layers.1.mlp.shared_expert.up_proj.weight",
    "a scale": "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv",
    "a layer too many": "model.layers.4.input_layernorm.weight",
    "a sink": "model.layers.0.self_attn.sinks",
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_tensor_that_the_model_does_not_have_is_refused(kind, tmp_path):
    make_model("glm4_moe", tmp_path, tokenizer=False, num_nextn_predict_layers=1)
    change(tmp_path, lambda tensors: tensors.update({UNKNOWN[kind]: torch.ones(3, 4)}))
    # A scale is told as what it is: a part of a matrix in codes.
    told = (
        f"{UNKNOWN[kind]} is in codes"
        if kind == "a scale"
        else f"1 tensors are not part of a glm4_moe.*{UNKNOWN[kind]}"
    )
    with pytest.raises(CheckpointError, match=told):
        checkpoint.check(tmp_path, checkpoint.read_arch(tmp_path))


def test_experts_of_a_dense_layer_are_refused(tmp_path):
    make_model("qwen3_moe", tmp_path, tokenizer=False)
    change(tmp_path, lambda t: t.update({"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(44, 60)}))
    with pytest.raises(CheckpointError, match=r"by its configuration this model has no experts\.0\.gate_up\.weight"):
        checkpoint.check(tmp_path, checkpoint.read_arch(tmp_path))


@pytest.mark.parametrize("case", ["mixtral", "granitemoe", "gpt_oss", "gpt_oss-plain"])
def test_a_missing_expert_is_named(case, tmp_path):
    make_model(case, tmp_path, tokenizer=False)
    name = {
        "mixtral": "layers.2.block_sparse_moe.experts.4.w3.weight",
        "granitemoe": "layers.1.block_sparse_moe.output_linear.weight",
        "gpt_oss": "layers.2.self_attn.sinks",
        "gpt_oss-plain": "layers.0.mlp.experts.gate_up_proj_bias",
    }[case]
    change(tmp_path, lambda tensors: tensors.pop(f"model.{name}"))
    with pytest.raises(CheckpointError, match=rf"the weight files lack {name} \[[\d, ]*\]$"):
        checkpoint.check(tmp_path, checkpoint.read_arch(tmp_path))


def test_one_expert_less_in_a_tensor_of_all_is_refused(tmp_path):
    make_model("granitemoe", tmp_path, tokenizer=False)
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    change(tmp_path, lambda tensors: tensors.update({name: tensors[name][:5].contiguous()}))
    with pytest.raises(CheckpointError, match=r"has shape \[5, 88, 60\], wanted \[6, 88, 60\]"):
        checkpoint.check(tmp_path, checkpoint.read_arch(tmp_path))


def test_layers_that_predict_further_tokens_are_skipped_and_said(tmp_path, caplog):
    model = make_model("glm4_moe", tmp_path, tokenizer=False, num_nextn_predict_layers=1)
    name = "model.layers.3.eh_proj.weight"
    change(tmp_path, lambda tensors: tensors.update({name: torch.ones(2, 3)}))
    arch = checkpoint.read_arch(tmp_path)
    stages = checkpoint.load(tmp_path, arch, torch.float32)
    assert arch.num_layers == 3 and name in caplog.text and "not used" in caplog.text
    (prompt,) = random_prompts([9])
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(DenseModel(arch, stages, 1, 9).step([prompt])[0], wanted, atol=1e-4, rtol=1e-5)


BAD = {
    "more chosen than there are": ("mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok=7 must be at most"),
    "uneven groups": ("glm4_moe", {"n_group": 3}, "n_group=3 groups"),
    "too few in the best groups": ("glm4_moe", {"n_group": 4, "topk_group": 1}, "together num_experts_per_tok=3"),
    "three of a mixer for two": ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok=3: this family's"),
    "negative": ("olmoe", {"num_experts": -1}, "num_experts=-1 must be a whole number"),
    "a layer by its name": ("qwen2_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers=.* must be a list of layers"),
    "another router": ("mixtral", {"router_scoring": "tanh"}, "router_scoring='tanh' is not known of model_type"),
    "a shared expert": ("olmoe", {"num_shared_experts": 2}, "num_shared_experts=2 is not known of model_type 'olmoe'"),
    "a capacity": ("qwen3_moe", {"expert_capacity": 64}, "expert_capacity=64 is not known"),
    "no limit": ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit=0 must be a number above 0"),
    "a shared expert of gpt-oss": ("gpt_oss", {"num_shared_experts": 1}, "num_shared_experts=1 is not known"),
    "linear": ("mixtral", {"model_type": "qwen3_next"}, "'qwen3_next': its linear attention is not supported"),
    "another extension": (
        "phimoe",
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        "rope scaling 'yarn' is not one of PhiMoE's",
    ),
    "no multiplier": (
        "phimoe",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0] * 6}},
        "lacks short_mscale",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_computed_is_refused_by_its_key(kind):
    case, changed, message = BAD[kind]
    with pytest.raises(CheckpointError, match=message):
        families.read_arch({**configuration(case).to_dict(), **changed})


@pytest.mark.parametrize(
    "fields",
    [
        *({"count": 0}, {"width": 0}, {"top_k": 0}, {"top_k": 7}, {"scoring": "tanh"}, {"scoring": "sparsemixer"}),
        *({"groups": 4}, {"groups": 3, "top_groups": 1}, {"groups": 6, "top_groups": 3}),
    ],
    ids=str,
)
def test_experts_that_cannot_be(fields):
    with pytest.raises(ValueError):
        Experts(**{"count": 6, "top_k": 3, "width": 4, **fields})


def test_the_number_of_experts_by_either_name():
    """transformers 5 writes another name than the published files have."""
    config = configuration("qwen3_moe").to_dict()
    count = config.pop("num_local_experts", None) or config.pop("num_experts")
    one, other = (families.read_arch({**config, name: count}) for name in ("num_experts", "num_local_experts"))
    assert one == other and one.experts.count == 6


@torch.no_grad()
def test_phimoe_past_its_factors(tmp_path):
    """Its extended rotation is multiplied by a number of the file."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128, "factor": 4.0}
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.5], "long_factor": [1.0, 2, 4, 8, 8, 16]}
    scales = {"short_mscale": 1.24, "long_mscale": 1.3}
    model = make_model("phimoe", tmp_path, tokenizer=False, rope_parameters={**rope, **factors, **scales})
    arch = checkpoint.read_arch(tmp_path)
    assert arch.max_positions == 128
    (prompt,) = random_prompts([90])
    found = DenseModel(arch, checkpoint.load(tmp_path, arch, torch.float32), 1, 90).step([prompt])[0]
    torch.testing.assert_close(found, model(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=1e-5)


def test_random_weights_reach_every_expert():
    """As `--dummy-weights` makes them: a router of one row for all would be no measurement."""
    arch = families.read_arch(configuration("olmoe").to_dict())
    stages: dict[int, dict[str, torch.Tensor]] = {}
    for piece in dummy(arch):
        stages.setdefault(piece.layer, {})[piece.role] = piece.tensor
    (logits,) = DenseModel(arch, stages, 1, 60).step(random_prompts([60]))
    assert logits.isfinite().all()
    chosen, _ = route(arch.experts, stages[1], torch.randn(60, arch.hidden_size))
    assert len(chosen.unique()) == 11


def test_published_files_are_read():
    """Entries of config.json as the authors published them, beside those that say nothing of what is computed."""
    mixtral = {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    }
    arch = families.read_arch(json.loads(json.dumps(mixtral)))
    assert arch.experts == Experts(8, 2, 14336, normalize=True) and arch.window(0) == 0
    assert arch.rope_theta == 1e6 and arch.dtype == "bfloat16"


def test_gpt_oss_as_it_was_published():
    """Entries of its config.json that say nothing of what is computed are no obstacle; those it leaves out have their
    defaults."""
    published = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 201088,
    }
    arch = families.read_arch(published)
    assert [arch.window(layer) for layer in range(3)] == [128, 0, 128] and arch.max_positions == 131072
    assert (arch.experts.count, arch.experts.top_k, arch.experts.clamp, arch.experts.gain) == (32, 4, 7.0, 1.702)
    left_out = {
        name: published[name] for name in published if name not in ("layer_types", "rope_scaling", "rope_theta")
    }
    assert families.read_arch(left_out) == arch
