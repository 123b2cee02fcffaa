"""Configurations of every age, positions beyond the trained context, public shapes and dummy weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from flexbatch.models import checkpoint, families
from flexbatch.models.arch import Arch
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.dummy import dummy
from flexbatch.models.shapes import SHAPES, shape
from flexbatch.models.specs import weight_specs
from tests.models.dense import DenseModel, rope_tables
from tests.tiny_models import FAMILY_CASES, LLAMA_SIZES, VOCAB, make_model, random_prompts

REQUIRED = {
    *(
        "hidden_size",
        "n_embd",
        "num_hidden_layers",
        "n_layer",
        "num_attention_heads",
        "n_head",
        "vocab_size",
        "intermediate_size",
        "ffn_dim",
        "word_embed_proj_dim",
    ),
    *(
        "max_position_embeddings",
        "n_positions",
        "num_key_value_heads",
        "head_dim",
        "text_config",
        "model_type",
        "layer_types",
    ),
}


def configuration(case):
    """With the special tokens of the family itself."""
    kind, config = FAMILY_CASES[case]
    return AutoConfig.for_model(kind, **{"vocab_size": VOCAB, **config})


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_keys_left_out_have_the_defaults_of_transformers(case):
    """Files hold what differs from the defaults, and hand-made ones less than that."""
    full = configuration(case).to_dict()
    defaults = type(configuration(case))().to_dict()
    sparse = {key: value for key, value in full.items() if key in REQUIRED or value != defaults.get(key)}
    assert len(sparse) < len(full)
    assert families.read_arch(sparse) == families.read_arch(full)


ROTARY = [
    case
    for case in FAMILY_CASES
    if not case.startswith(("opt", "bloom", "gpt_big", "gpt2", "gptj", "codegen", "gemma3", "gpt_oss-plain"))
]
"""Without gpt-oss whose rotation is not extended: a ``rope_scaling`` of null means its default extension."""


@pytest.mark.parametrize("case", ROTARY)
def test_rope_keys_of_transformers_4(case):
    full = configuration(case).to_dict()
    rope = dict(full["rope_parameters"])
    old = {key: value for key, value in full.items() if key not in ("rope_parameters", "dtype")} | {
        "torch_dtype": "float32"
    }
    theta, fraction = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    names = (
        ("rotary_emb_base", "rotary_pct")
        if full["model_type"] == "gpt_neox"
        else ("rope_theta", "partial_rotary_factor")
    )
    old |= {names[0]: theta} | ({} if fraction is None else {names[1]: fraction})
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    assert families.read_arch(old) == families.read_arch(full)


def test_rope_keys_of_gemma3_in_transformers_4():
    full = configuration("gemma3-linear").to_dict()
    old = {key: value for key, value in full.items() if key != "rope_parameters"}
    old |= {"rope_theta": 3000.0, "rope_local_base_freq": 700.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert families.read_arch(old) == families.read_arch(full)


@pytest.mark.parametrize("case", ["qwen2-window", "gemma2", "gemma3"])
def test_windows_without_layer_types(case):
    """Files of transformers 4 give the rule, not the layers."""
    full = configuration(case).to_dict()
    assert 0 < sum(families.read_arch(full).sliding_layers) < full["num_hidden_layers"]
    assert families.read_arch(
        {key: value for key, value in full.items() if key != "layer_types"}
    ) == families.read_arch(full)


def test_mistral_files_without_a_window_have_that_of_the_first_release():
    full = configuration("mistral").to_dict()
    del full["sliding_window"]
    assert families.read_arch(full).window(0) == 4096
    assert families.read_arch({**full, "sliding_window": None}).window(0) == 0


def test_special_tokens_beside_a_text_config_win():
    full = configuration("gemma3-vision").to_dict()
    full["text_config"]["eos_token_id"] = 2
    assert families.read_arch(full).eos_token_ids == (2,)
    assert families.read_arch({**full, "eos_token_id": [1, 106]}).eos_token_ids == (1, 106)
    assert families.read_arch({**full, "eos_token_id": None}).eos_token_ids == (2,)


@torch.no_grad()
def test_dynamic_rope_past_the_trained_context_equals_generate(tmp_path):
    """One sequence alone: the prompt fits the trained context, the generated tokens do not."""
    model = make_model("llama-dynamic", tmp_path, max_position_embeddings=40, tokenizer=False)
    arch = checkpoint.read_arch(tmp_path)
    assert arch.max_positions == 120
    (prompt,), new = random_prompts([38]), 30
    wanted = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    dense = DenseModel(arch, checkpoint.load(tmp_path, arch, torch.float32), 1, 128)
    chunk = prompt
    for step in range(new):
        logits = dense.step([chunk])[0][-1]
        torch.testing.assert_close(logits, wanted.logits[step][0], atol=5e-5, rtol=1e-5)
        chunk = [logits.argmax().item()]
        assert chunk == wanted.sequences[0, len(prompt) + step : len(prompt) + step + 1].tolist()
    plain = rope_tables(
        families.read_arch({**checkpoint.read_config(tmp_path), "rope_parameters": {"rope_theta": 10000.0}})
    )
    assert not torch.allclose(dense.rope.cos[60], plain.cos[39])


def test_rope_tables_can_be_cut_short_and_cast():
    arch = families.read_arch(configuration("llama-rope3").to_dict())
    whole, part = rope_tables(arch), rope_tables(arch, dtype=torch.bfloat16, num_positions=9)
    assert whole.cos.shape == (arch.max_positions, arch.rotary_dim // 2)
    assert torch.equal(part.sin, whole.sin[:9].bfloat16())


@pytest.mark.parametrize("heads", [1, 2, 5, 8, 12, 71, 112])
def test_alibi_slopes(heads):
    arch = Arch("bloom", 1, 2 * heads, heads, heads, 2, 4, 10, 10, position="alibi")
    # Of two positions: the second one's bias is the slope itself.
    slopes = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(arch.alibi_slopes()), slopes)


BAD_CONFIGS = {
    "unknown": ({"model_type": "mamba"}, "model_type 'mamba' is unknown; known: bloom, codegen"),
    "no type": ({"model_type": None}, "model_type None is unknown"),
    "no size": ({"hidden_size": None}, "lacks hidden_size"),
    "activation": ({"hidden_act": "swoosh"}, "activation 'swoosh' is unknown; known: gelu"),
    "heads": ({"num_key_value_heads": 4}, "num_attention_heads=6 must be a multiple of num_key_value_heads=4"),
    "odd rotation": ({"head_dim": 9}, "rotary_dim=9 must be even"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers=-1 must be a whole number from 1 to 4,096"),
    "text": ({"hidden_size": "big"}, "config.json: hidden_size='big' must be a whole number from 1 to 1,048,576"),
    "rope": ({"rope_parameters": {"rope_type": "spiral"}}, "rope scaling 'spiral' is unknown; known: linear"),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_bad_configs_are_named(kind):
    change, message = BAD_CONFIGS[kind]
    with pytest.raises(CheckpointError, match=message):
        families.read_arch({"model_type": "llama", "vocab_size": VOCAB, **LLAMA_SIZES, **change})


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("opt-125m", 0.125),
        ("opt-350m", 0.331),
        ("opt-30b", 29.97),
        ("opt-175b", 174.6),
        ("llama-2-70b", 68.98),
        ("llama-3-8b", 8.03),
        ("qwen3-30b-a3b", 30.53),
        ("qwen3-235b-a22b", 235.1),
        ("mixtral-8x7b", 46.7),
        ("mixtral-8x22b", 140.6),
        ("olmoe-1b-7b", 6.92),
        ("gpt-oss-20b", 20.9),
        ("gpt-oss-120b", 116.8),
    ],
)
def test_public_shapes_have_their_published_size(name, billions):
    assert sum(spec.numel for spec in weight_specs(shape(name))) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_type_of_their_checkpoints(name):
    """A GPU computes in it: what is measured with random weights is what the real ones would take."""
    older = name.startswith(("opt-", "llama-2-", "starcoder"))
    assert SHAPES[name]["dtype"] == shape(name).dtype == ("float16" if older else "bfloat16")


@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes_equal_transformers_parameter_counts(name):
    """Independent of our table of roles: the same configuration built by transformers without memory."""
    config = dict(SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    wanted = sum(parameter.numel() for parameter in model.parameters())
    # What corrects a router's choice is trained in another way, and no parameter there.
    wanted += sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("correction_bias"))
    assert sum(spec.numel for spec in weight_specs(shape(name))) == wanted


def test_shape_names():
    assert shape("facebook/OPT-30B") == shape("opt-30b")
    part = shape("opt-30b-24-layers")
    assert (part.num_layers, replace(part, num_layers=48)) == (24, shape("opt-30b"))
    assert shape("starcoder-3-layers").num_layers == 3
    for layers in (0, 49):
        with pytest.raises(CheckpointError, match="opt-30b has 48 layers"):
            shape(f"opt-30b-{layers}-layers")
    with pytest.raises(CheckpointError, match=r"known: opt-125m, .*starcoder"):
        shape("grok-1")


@pytest.mark.parametrize("case", ["opt-postnorm", "gemma2", "falcon-40b", "qwen2_moe", "glm4_moe"])
def test_dummy_weights_fill_everything_with_different_numbers(case):
    arch = families.read_arch(configuration(case).to_dict())
    pieces = list(dummy(arch, seed=3))
    assert [(piece.layer, piece.role, tuple(piece.tensor.shape)) for piece in pieces] == [
        (spec.layer, spec.role, spec.shape) for spec in weight_specs(arch)
    ]
    assert len({tuple(piece.tensor.flatten()[:4].tolist()) for piece in pieces}) == len(pieces)
    again, other = list(dummy(arch, seed=3)), list(dummy(arch, seed=4))
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(pieces, again, strict=True))
    assert not any(torch.equal(a.tensor, b.tensor) for a, b in zip(pieces, other, strict=True))
    for piece in pieces:
        if piece.role.endswith("norm.weight"):
            assert abs(piece.tensor.mean() + arch.norm_offset - 1) < 0.1
        elif piece.tensor.numel() > 500:
            assert 0.002 < piece.tensor.std() < 0.025


def test_large_dummy_tensors_come_in_row_pieces_that_differ():
    pieces = [piece for piece in dummy(shape("opt-125m"), dtype=torch.float16) if piece.role == "embed.weight"]
    assert len(pieces) > 1 and pieces[0].rows.start == 0 and pieces[-1].rows.stop == 50272
    assert all(a.rows.stop == b.rows.start for a, b in pairwise(pieces))
    assert not torch.equal(pieces[0].tensor[0], pieces[1].tensor[0])
