"""Configurations as transformers reads them: random keys of both generations, its own rotary modules and windows as the
oracle."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from flexbatch.models import families
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.config_types import KEYS, ROPE_KEYS
from tests.models.dense import rope_tables
from tests.tiny_models import FAMILY_CASES, LLAMA_SIZES, VOCAB

LAYERS, POSITIONS, HEADS = 4, 48, 4
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
}
BASE = {
    **SIZES,
    "vocab_size": 11,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
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
    kinds = {"phi3": ["default", "longrope", "su", "yarn"]}
    kind = draw(st.sampled_from(kinds.get(family, ["default", "linear", "dynamic", "llama3", "yarn", "longrope"])))
    names = draw(st.sampled_from([("rope_type",), ("type",), ("rope_type", "type")]))
    entry = dict.fromkeys(names, kind)
    if kind == "default" and draw(st.booleans()):
        entry = {}
    long = kind in ("longrope", "su") or (family == "phi3" and kind == "yarn")
    if kind != "default" and not long:
        entry["factor"] = draw(FACTOR)
    if kind == "llama3":
        entry |= {
            "low_freq_factor": draw(st.sampled_from([1, 1.5])),
            "high_freq_factor": draw(st.sampled_from([3.0, 4])),
        }
    if kind == "yarn":
        ramp = {
            "beta_fast": st.sampled_from([16, 32.0]),
            "beta_slow": st.sampled_from([1.0, 2]),
            "truncate": st.booleans(),
        }
        entry |= draw(keys(**ramp, attention_factor=st.just(1.3), mscale=st.just(0.7), mscale_all_dim=st.just(1.1)))
    if long:
        draws = st.lists(st.sampled_from([1.0, 1.5, 3, 4.25]), min_size=pairs, max_size=pairs)
        entry |= {"short_factor": draw(draws), "long_factor": draw(draws)} | draw(
            keys(factor=FACTOR, attention_factor=st.just(1.2))
        )
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
        config |= draw(
            keys(
                rope_parameters=nested,
                rope_scaling=entry,
                rope_local_base_freq=THETA,
                sliding_window_pattern=st.integers(1, 5),
            )
        )
    else:
        config |= draw(keys(rope_parameters=entry, rope_scaling=st.one_of(st.none(), st.just({}), entry)))
    if family in WINDOWED:
        config |= draw(
            keys(
                sliding_window=maybe(st.integers(2, 9)),
                use_sliding_window=st.booleans(),
                max_window_layers=st.integers(0, LAYERS),
            )
        )
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
        own = [
            module.sliding_window
            for name, module in model.named_modules()
            if f"layers.{layer}." in name and hasattr(module, "sliding_window")
        ]
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
        # With one table for all layers any of them shows it.
        sliding = [layer for layer in range(LAYERS) if arch.window(layer)]
        layer = next(
            layer
            for layer in range(LAYERS)
            if arch.local_rope_theta is None or (layer in sliding) == (kind == "sliding_attention")
        )
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
    check_many(family, 5, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_configurations_mean_what_transformers_reads(family, tmp_path):
    check_many(family, 100, tmp_path)


BAD_VALUES = (
    3e6,
    3000000,
    -1,
    0,
    1,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    0.5,
    True,
    "8",
    "",
    [1],
    [],
    {},
    {"a": 1},
    ["x"],
    [[1]],
    [None],
)


@pytest.mark.parametrize("case", ["opt", "qwen2-window", "phi3-longrope", "gemma3-linear"])
def test_a_bad_value_of_any_key_is_refused_by_its_name(case):
    refused_by_name(case, every=3)


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILY_CASES)
def test_a_bad_value_of_any_key_of_any_family_is_refused_by_its_name(case):
    refused_by_name(case)


def refused_by_name(case, every=1):
    """Or it is a value that the model can have. Nothing of the size that it names is made.

    ``every``: how many values each key passes over by turns; the next key takes others.
    """
    kind, sizes = FAMILY_CASES[case]
    full = AutoConfig.for_model(kind, **{"vocab_size": VOCAB, **sizes}).to_dict()
    places = [[], *([key] for key in ("rope_parameters", "text_config") if isinstance(full.get(key), dict))]
    places += [
        [*place, key]
        for place in places
        for key, value in at(full, place).items()
        if isinstance(value, dict) and key.endswith("attention")
    ]
    for place in places:
        for turn, key in enumerate({**KEYS, **ROPE_KEYS} if place else KEYS):
            for value in BAD_VALUES[turn % every :: every] if key != "model_type" else ():
                if key == "text_config" and isinstance(value, dict):
                    continue  # the sizes in it are what is missed then
                config = copy.deepcopy(full)
                at(config, place)[key] = value
                try:
                    arch = families.read_arch(config)
                except CheckpointError as error:
                    assert key in str(error), (place, key, value, error)
                    continue
                assert arch.num_layers <= 4096 and arch.max_positions < 2**31
                if arch.position == "rope" and arch.rotary_dim < 2**10 and (place or "ro" in key):
                    tables = rope_tables(arch, num_positions=3)
                    assert tables.cos.isfinite().all() and tables.local_sin.isfinite().all(), (place, key, value)


def at(config, place):
    for key in place:
        config = config[key]
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3e6}, "num_hidden_layers=3000000.0 must be a whole number from 1 to 4,096"),
        ({"num_hidden_layers": 3000000}, "num_hidden_layers=3000000 must be a whole number"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] must be an object"),
        ({"rope_theta": 0}, "rope_theta=0 must be a number from 1"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor=0 must be a number above 0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' lacks factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "rope_scaling of type 'llama3' lacks low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 1e9}}, "rope_scaling.factor=1e.09 makes a context of"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 2]}},
            "rope_scaling.short_factor has 2 numbers, wanted one for each of 6 rotated pairs",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
            "rope_parameters.full_attention: model_type 'llama' has one rotation",
        ),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2}},
            "partial_rotary_factor=0.5 with rope_scaling of type 'linear'",
        ),
        (
            {"head_dim": None, "num_attention_heads": 7, "num_key_value_heads": 7},
            "hidden_size=60 must be a multiple of num_attention_heads=7",
        ),
        ({"eos_token_id": [1, "2"]}, r"eos_token_id=\[1, '2'\] must be a token id or a list of them"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
        ({"vocab_size": 10**30}, r"vocab_size=1000+ must be a whole number from 1 to 16,777,216"),
    ],
)
def test_the_message_says_what_the_key_may_hold(change, message):
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        families.read_arch({"model_type": "llama", "vocab_size": VOCAB, **LLAMA_SIZES, **change})


LLAMA = {"model_type": "llama", "vocab_size": VOCAB, **LLAMA_SIZES}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "sliding_window": 13}


def test_one_entry_takes_the_place_of_the_other():
    """As transformers has it: the base in the entry that gives way goes with it."""
    both = {
        **LLAMA,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    arch = families.read_arch(both)
    assert arch.rope_scaling.kind == "linear" and arch.rope_scaling.factor == 4 and arch.rope_theta == 10000
    assert families.read_arch({**both, "rope_theta": 3e4}).rope_theta == 3e4
    assert families.read_arch({**both, "rope_scaling": {}}).rope_theta == 5e5


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_the_context_of_gemma3_is_what_its_file_says(kind):
    arch = families.read_arch({**GEMMA3, "rope_scaling": {"rope_type": kind, "factor": 8.0}})
    assert arch.max_positions == LLAMA_SIZES["max_position_embeddings"]
    assert (
        families.read_arch({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}).max_positions
        == 8 * LLAMA_SIZES["max_position_embeddings"]
    )


def test_layer_types_of_mistral_say_which_layers_have_the_window():
    types = ["full_attention", "sliding_attention", "full_attention"]
    for family in ("mistral", "ministral"):
        arch = families.read_arch({**LLAMA, "model_type": family, "sliding_window": 9, "layer_types": types})
        assert [arch.window(layer) for layer in range(3)] == [0, 9, 0]
    with pytest.raises(
        CheckpointError, match=r"layer_types names layers with a window, but sliding_window=None gives them none"
    ):
        families.read_arch({**LLAMA, "model_type": "mistral", "sliding_window": None, "layer_types": types})
    with pytest.raises(
        CheckpointError,
        match=r"layer_types names 'chunked_attention'; known: attention, full_attention, sliding_attention",
    ):
        families.read_arch({**LLAMA, "model_type": "mistral", "layer_types": ["chunked_attention"] * 3})


def test_layers_of_gemma3_with_a_window_may_have_an_extension_of_their_own():
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0},
    }
    arch = families.read_arch({**GEMMA3, "rope_parameters": nested})
    assert arch.local_rope_scaling.factor == 2 and arch.rope_scaling.factor == 8 and arch.local_rope_theta == 700
