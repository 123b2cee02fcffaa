"""Configurations as transformers reads them: random keys of both generations, its own rotary modules and windows as the oracle."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from flexbatch.models import families
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.rope import rope_tables

LAYERS, POSITIONS, HEADS = 4, 48, 4
SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2}
BASE = {**SIZES, "vocab_size": 11, "max_position_embeddings": POSITIONS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GIVEN_HEAD = {"qwen3", "glm", "glm4", "gemma", "gemma2", "gemma3_text", "llama", "mistral", "ministral", "qwen2"}
PARTIAL = {"phi3", "glm", "glm4", "phi", "stablelm", "gpt_neox"}
WINDOWED = {"mistral", "ministral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "starcoder2"}
FAMILIES = sorted(GIVEN_HEAD | PARTIAL | {"starcoder2", "falcon"})


def maybe(strategy):
    """None stands for a key that the file leaves out."""
    return st.one_of(st.none(), strategy)


def keys(**strategies):
    """An object with any of these keys."""
    return st.fixed_dictionaries({}, optional=strategies)


THETA, FACTOR = st.sampled_from([500.0, 10000.0, 25000, 1000000.0]), st.sampled_from([1.0, 2, 2.5, 8.0])


@st.composite
def entries(draw, family, pairs):
    """A rotary entry as either generation writes it."""
    if family == "phi3":
        kinds = ["default", "longrope", "su", "yarn"]
    else:
        kinds = ["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
    kind = draw(st.sampled_from(kinds))
    names = draw(st.sampled_from([("rope_type",), ("type",), ("rope_type", "type")]))
    entry = dict.fromkeys(names, kind)
    if kind == "default" and draw(st.booleans()):
        entry = {}
    long = kind in ("longrope", "su") or (family == "phi3" and kind == "yarn")
    if kind != "default" and not long:
        entry["factor"] = draw(FACTOR)
    if kind == "llama3":
        entry |= {"low_freq_factor": draw(st.sampled_from([1, 1.5])), "high_freq_factor": draw(st.sampled_from([3.0, 4]))}
    if kind == "yarn":
        ramp = {"beta_fast": st.sampled_from([16, 32.0]), "beta_slow": st.sampled_from([1.0, 2]), "truncate": st.booleans()}
        entry |= draw(keys(**ramp, attention_factor=st.just(1.3), mscale=st.just(0.7), mscale_all_dim=st.just(1.1)))
    if long:
        draws = st.lists(st.sampled_from([1.0, 1.5, 3, 4.25]), min_size=pairs, max_size=pairs)
        entry |= {"short_factor": draw(draws), "long_factor": draw(draws)} | draw(keys(factor=FACTOR, attention_factor=st.just(1.2)))
    if kind in ("llama3", "yarn", "longrope", "su"):
        entry |= draw(keys(original_max_position_embeddings=st.sampled_from([12, 24, POSITIONS])))
    return entry | draw(keys(rope_theta=THETA))


@st.composite
def configs(draw, family):
    config = {"model_type": family, **BASE}
    head = draw(st.sampled_from([8, 16])) if family in GIVEN_HEAD else SIZES["hidden_size"] // HEADS
    if family in GIVEN_HEAD:
        config["head_dim"] = head
    share = None
    if family in PARTIAL:
        share = draw(maybe(st.sampled_from([0.25, 0.5, 1.0])))
        if share is not None:
            config["rotary_pct" if family == "gpt_neox" else "partial_rotary_factor"] = share
    usual = {"phi3": 1.0, "glm": 0.5, "glm4": 0.5, "phi": 0.5, "stablelm": 0.25, "gpt_neox": 0.25}.get(family, 1.0)
    pairs = int(head * (usual if share is None else share)) // 2
    config |= draw(keys(rope_theta=THETA, original_max_position_embeddings=st.sampled_from([12, 24])))
    if family == "gpt_neox":
        config |= draw(keys(rotary_emb_base=THETA))
    entry = entries(family, pairs)
    if family == "gemma3_text":
        nested = keys(full_attention=entry, sliding_attention=entry)
        config |= draw(keys(rope_parameters=nested, rope_scaling=entry, rope_local_base_freq=THETA, sliding_window_pattern=st.integers(1, 5)))
    else:
        config |= draw(keys(rope_parameters=entry, rope_scaling=st.one_of(st.none(), st.just({}), entry)))
    if family in WINDOWED:
        config |= draw(keys(sliding_window=maybe(st.integers(2, 9)), use_sliding_window=st.booleans(), max_window_layers=st.integers(0, LAYERS)))
        types = st.sampled_from(["full_attention", "sliding_attention"])
        config |= draw(keys(layer_types=st.lists(types, min_size=LAYERS, max_size=LAYERS)))
    if family == "falcon":
        config |= draw(keys(new_decoder_architecture=st.booleans(), multi_query=st.booleans()))
    return config


def reference(config, folder):
    """(tables by type of layer, window by layer) of transformers, None for what it does not run."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        read = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(read, dtype=torch.float32).eval()
        model(torch.arange(5)[None])
    except Exception:
        return None
    rotary = next(module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding"))
    by_type = isinstance(getattr(rotary, "rope_type", None), dict)
    kinds = sorted(set(read.layer_types)) if by_type else ["full_attention"]
    length = min(POSITIONS, 12)  # the shortest trained context drawn above: beyond it "longrope" takes other factors
    positions = torch.arange(length)[None]
    tables = {kind: rotary(torch.zeros(1), positions, *([kind] if by_type else [])) for kind in kinds}
    windows = []
    for layer in range(LAYERS):
        own = [module.sliding_window for name, module in model.named_modules() if f"layers.{layer}." in name and hasattr(module, "sliding_window")]
        windows.append((own[0] if own else getattr(read, "sliding_window", None)) or 0)
    return tables, windows


def compare(config, folder):
    """Whether the configuration is one that transformers runs, and so one that was compared."""
    wanted = reference(config, folder)
    if wanted is None:
        return False
    tables, windows = wanted
    arch = families.read_arch(config)
    assert [arch.window(layer) for layer in range(LAYERS)] == windows
    found = rope_tables(arch)
    for kind, (cos, sin) in tables.items():
        layer = next((i for i in range(LAYERS) if (arch.window(i) > 0) == (kind == "sliding_attention")), 0) if len(tables) > 1 or kind != "full_attention" else 0
        if kind == "full_attention" and len(tables) == 1 and arch.local_rope_theta is None:
            layer = 0
        ours = found.of(arch, layer)
        pairs = arch.rotary_dim // 2
        for table, wanted_table in zip(ours, (cos, sin), strict=True):
            assert wanted_table.shape[-1] == 2 * pairs
            torch.testing.assert_close(table[: cos.shape[1]], wanted_table[0, :, :pairs], atol=2e-5, rtol=1e-5)
    return True


def check_many(family, examples, folder):
    compared = []

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(configs(family))
    def check(config):
        compared.append(compare(config, folder))
        assume(compared[-1])

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        check()
    finally:
        logging.set_verbosity(verbosity)
    assert sum(compared) >= examples // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_random_configurations_mean_what_transformers_reads(family, tmp_path):
    check_many(family, 12, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_configurations_mean_what_transformers_reads(family, tmp_path):
    check_many(family, 400, tmp_path)
