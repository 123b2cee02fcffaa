"""Sampling parameters: what is out of range is named, and what is in range is kept as it is."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import tracemalloc
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch import LLM
from flexbatch.config import EngineConfig
from flexbatch.request import Completion, SamplingParams
from flexbatch.validation.checks import UnknownKeywordError
from flexbatch.validation.errors import ConfigurationError
from flexbatch.validation.sampling_fields import MOST_SAMPLES, OTHER_NAMES, UNAVAILABLE

BAD = {
    "max_tokens": (-1,),
    "temperature": (-0.1, math.nan, math.inf),
    "top_p": (0.0, 1.1, math.nan),
    "top_k": (-2,),
    "min_p": (-0.1, 1.1, math.nan),
    "repetition_penalty": (0.0, -1.0, math.inf, math.nan),
    "presence_penalty": (-2.1, 2.1, math.nan),
    "frequency_penalty": (-2.1, 2.1, math.nan),
    "logit_bias": ({3: math.nan}, {3: 1.0, 4: math.inf}),
    "n": (0,),
    "logprobs": (-2,),
    "prompt_logprobs": (-2,),
    "truncate_prompt_tokens": (0, -2),
    "allowed_token_ids": ([], [-1]),
    "bad_words": ("", ["a", ""]),
    "prompt_logprobs_start": (0,),
    "stop": ("", ["a", ""]),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=str
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"sampling parameter {name}=.* must be "):
        SamplingParams(**{name: value})


def test_the_ends_of_the_ranges_are_in_them():
    params = SamplingParams(
        max_tokens=0,
        temperature=0,
        top_p=1,
        top_k=-1,
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={3: -math.inf},
        seed=-1,
    )
    assert params.greedy and params.logit_bias == {3: -math.inf}


def test_fields_may_be_set_and_are_checked_when_a_request_comes():
    params = SamplingParams()
    params.min_tokens = 20  # more than max_tokens for a moment
    params.max_tokens = 30
    params.stop, params.logit_bias = "x", {3: 1.0}
    params.check()
    assert (params.min_tokens, params.stop) == (20, ("x",))
    kept = params.within(99)
    params.max_tokens, params.logit_bias[3] = 25, 2.0
    assert (kept.max_tokens, kept.logit_bias) == (30, {3: 1.0}), "a request keeps what the fields were when it came"
    params.logit_bias[4] = "much"
    with pytest.raises(ConfigurationError, match=r"logit_bias=.* must be a number"):
        params.within(99)
    params.logit_bias = None
    for name, value, wrong in (
        ("max_tokens", 3, "min_tokens=20 must be"),
        ("detokenize", False, "stop needs the text"),
    ):
        changed = copy.copy(params)
        setattr(changed, name, value)
        with pytest.raises(ConfigurationError, match=wrong):
            changed.within(99)


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="ab").stop == ("ab",) and SamplingParams(
        stop=["a", "b"], stop_token_ids=[3]
    ).stop_token_ids == (3,)


NO_WHOLE = (1.5, 2.0, "2", b"2", True, np.float32(2), [2], (), {}, Decimal(2), Fraction(5, 2), object)
NO_NUMBER = ("hot", "0.5", True, [0.5], {}, b"1", Decimal("0.5"), 1j, np.array([0.5]))
NO_IDS = (5, "not_a_list", b"ab", {5: 6}, [5.0], ["x"], [[13013]], [True], [None], [5, "6"], object)
NO_WORDS = (5, "ab", [5], ["ab"], [[5.5]], [[-1]], [[]], [[5], [True]], {5: 6})
WRONG_TYPES = {
    **dict.fromkeys(
        ("top_k", "n", "prompt_logprobs_start", "min_tokens", "min_length", "no_repeat_ngram_size"),
        (*NO_WHOLE, None),
    ),
    **dict.fromkeys(
        ("max_tokens", "seed", "logprobs", "prompt_logprobs", "forced_bos_token_id", "truncate_prompt_tokens"), NO_WHOLE
    ),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        (*NO_NUMBER, None),
    ),
    **dict.fromkeys(("stop", "bad_words"), (123, 1.5, True, [5], ["a", None], {"a": 1}, b"ab", [["a"]], object)),
    "allowed_token_ids": NO_IDS,
    **dict.fromkeys(("stop_token_ids", "suppress_tokens", "begin_suppress_tokens"), NO_IDS),
    "forced_eos_token_id": ("x", True, 2.0, [2.0], ["x"], -1, [-1]),
    "logit_bias": (
        [1],
        "ab",
        5,
        {"5": 1.0},
        {5.0: 1.0},
        {True: 1.0},
        {5: "1"},
        {5: None},
        {5: True},
        [(5, 1.0)],
        {5: 1e31},
    ),
    "bad_words_ids": NO_WORDS,
    "sequence_bias": (
        5,
        "ab",
        [[1, 2]],
        [[[1], "2"]],
        [[[1.5], 2.0]],
        [[[], 2.0]],
        [[[1], 2.0, 3]],
        {"(5,)": 1.0},
        [[[1], math.nan]],
    ),
    **dict.fromkeys(
        ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"),
        (0, 1, "true", None, [], 1.0),
    ),
    "structured_outputs": (5, "json", ["yes"], {1: 2}),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG_TYPES.items() for value in values],
    ids=lambda x: repr(x)[:30],
)
def test_wrong_types_are_named(name, value):
    with pytest.raises(ConfigurationError, match=rf"sampling parameter {name}=.* must be "):
        SamplingParams(**{name: value})
    with pytest.raises(ConfigurationError, match=f"sampling parameter {name}="):
        dataclasses.replace(SamplingParams(), **{name: value})
    params = SamplingParams()
    with pytest.raises(ConfigurationError, match=f"sampling parameter {name}="):
        setattr(params, name, value)
    assert params == SamplingParams()


def test_every_field_has_its_wrong_types():
    assert WRONG_TYPES.keys() == {field.name for field in dataclasses.fields(SamplingParams)}


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers() | st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(WRONG_TYPES)), value=ANYTHING)
def test_any_value_is_kept_or_named(name, value):
    """Never another error, and what is kept is what a second look keeps."""
    try:
        params = SamplingParams(**{name: value})
    except ConfigurationError as error:
        assert f"sampling parameter {name}=" in str(error) and len(str(error)) < 500
    else:
        assert SamplingParams(**dataclasses.asdict(params)) == params


def test_numpy_counts_and_everything_is_kept_in_plain_types():
    params = SamplingParams(
        max_tokens=np.int64(5), temperature=np.float32(0.5), top_p=1, stop_token_ids=np.array([1, 2]),
        logit_bias={np.int32(3): np.float16(1)}, stop={"a"},
        forced_eos_token_id=np.int64(5), sequence_bias=[[np.array([1, 2]), -3]], bad_words_ids=[(1,), [2, 3]],
        ignore_eos=np.bool_(True), seed=-(2**70),
    )  # fmt: skip
    kept = (
        params.max_tokens,
        params.temperature,
        params.top_p,
        params.stop_token_ids,
        params.logit_bias,
        params.stop,
        params.ignore_eos,
    )
    assert kept == (5, 0.5, 1.0, (1, 2), {3: 1.0}, ("a",), True) and [type(value) for value in kept[:3]] == [
        int,
        float,
        float,
    ]
    assert (params.forced_eos_token_id, params.sequence_bias, params.bad_words_ids) == (
        (5,),
        (((1, 2), -3.0),),
        ((1,), (2, 3)),
    )
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == dataclasses.replace(params) == params
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
    bias = {3: 1.0}
    kept = SamplingParams(logit_bias=bias)
    bias[4] = 2.0
    assert kept.logit_bias == {3: 1.0}


HUGE = (
    {"n": 100_000_000}, {"n": MOST_SAMPLES + 1}, {"logprobs": 10**9}, {"prompt_logprobs": 10**9},
    {"max_tokens": 10**12}, {"top_k": 10**30},
    {"stop": ["x"] * 2000}, {"stop": "x" * 10_000}, {"stop_token_ids": range(10**12)},
    {"suppress_tokens": range(10**30)},
    {"logit_bias": {i: 1.0 for i in range(10_000)}, "n": 16_000}, {"temperature": 10**400},
    {"bad_words_ids": [range(10**12)]},
)  # fmt: skip


@pytest.mark.parametrize("settings", HUGE, ids=lambda settings: ",".join(settings))
def test_no_single_request_takes_much_memory(settings):
    tracemalloc.start()
    try:
        with pytest.raises(ConfigurationError, match=r"sampling parameter .* must be "):
            SamplingParams(**settings)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SamplingParams(max_token=5), "SamplingParams has no keyword 'max_token'; did you mean 'max_tokens'?"),
        (lambda: dataclasses.replace(SamplingParams(), temprature=5), "did you mean 'temperature'?"),
        (lambda: SamplingParams(zzz=5), "SamplingParams has no keyword 'zzz'; known are "),
        (lambda: setattr(SamplingParams(), "max_token", 5), "no keyword 'max_token'; did you mean 'max_tokens'?"),
        (
            lambda: SamplingParams(logits_processors=[print]),
            "no keyword 'logits_processors': no code of the caller runs",
        ),
        (lambda: SamplingParams(use_beam_search=True), "no keyword 'use_beam_search': there is no beam search"),
        (lambda: SamplingParams(max_new_tokens=5), "no keyword 'max_new_tokens'; did you mean 'max_tokens'?"),
        (lambda: SamplingParams(max_length=5), "no keyword 'max_length'; did you mean 'max_tokens'?"),
        (lambda: SamplingParams(stop_strings="a"), "no keyword 'stop_strings'; did you mean 'stop'?"),
        (lambda: SamplingParams(stop_sequences="a"), "no keyword 'stop_sequences'; did you mean 'stop'?"),
        (lambda: SamplingParams(num_return_sequences=2), "no keyword 'num_return_sequences'; did you mean 'n'?"),
        (lambda: SamplingParams(do_sample=False), "no keyword 'do_sample'; did you mean 'temperature'?"),
        (lambda: LLM("demo", gpu_batchsize=4), "LLM has no keyword 'gpu_batchsize'; did you mean 'gpu_batch_size'?"),
        (lambda: LLM("demo", tracing=True), "LLM has no keyword 'tracing'"),
        (
            lambda: LLM("demo", zzz=True),
            "LLM has no keyword 'zzz'; known are allow_bits, async_scheduling, cache_bits,",
        ),
        (
            lambda: LLM("demo", max_model_length=9),
            "LLM has no keyword 'max_model_length'; did you mean 'max_model_len'?",
        ),
        (lambda: LLM("demo", gpu_memory_utilisation=0.9), "did you mean 'gpu_memory_utilization'?"),
    ],
)
def test_unknown_keywords_come_with_a_suggestion(make, text):
    with pytest.raises(UnknownKeywordError) as error:
        make()
    assert (
        text in str(error.value) and isinstance(error.value, ConfigurationError) and isinstance(error.value, TypeError)
    )


def test_the_bare_error_of_a_completion():
    errors = {"prompt 3: bad": "bad", "prompt 3, sample 12: bad: prompt 4": "bad: prompt 4", "bad": "bad", "": ""}
    assert [Completion((), error=error).bare_error for error in errors] == list(errors.values())


def test_names_of_other_libraries_lead_to_fields():
    assert set(OTHER_NAMES.values()) <= SamplingParams.__dataclass_fields__.keys()
    assert not {*OTHER_NAMES, *UNAVAILABLE} & SamplingParams.__dataclass_fields__.keys()


SETTINGS = {
    **dict.fromkeys(
        (
            *("gpu_batch_size", "num_gpu_batches", "prefill_chunk", "prefill_budget", "max_model_len", "weight_bits"),
            *("cache_bits", "piece_tokens", "seed"),
        ),
        (1.5, "4", True, 16.0, [4], object, math.nan),
    ),
    **dict.fromkeys(("overlap", "recalibrate", "compare_plain", "dummy_weights"), (0, 1, "no", None, [])),
    "async_scheduling": (0, 1, "no", []),
    **dict.fromkeys(("cpu_attention", "cpu_experts", "simulate_acceptance"), ("a", "0.5", True, math.nan, [0.5])),
    **dict.fromkeys(("model", "device", "dtype", "hardware"), (5, None, b"cpu", ["cpu"], float)),
    **dict.fromkeys(("tree", "offload_dir", "tokenizer", "generation_config", "draft_sampling"), (5, b"a", ["a"])),
    "reserve": (5, None, "some", b"all", ["all"]),
    **dict.fromkeys(("gpu_memory", "cpu_memory"), (1.5e9, -1, True, [5], "much")),
    "percent": ("100", (100, 0, "a", 0, 100, 0), (math.nan, 0, 0, 0, 0, 0), {100: 0}, (True,) * 6, [1, 2]),
    "allow_bits": ("8", ["8"], [8.0], [7], {8: 4}),
    "draft": (5, [5], [None], "", b"demo-draft"),
    "lora": (5, "a", [5], {"a": 5}, {5: "a"}, ["a"]),
    "lora_default": (5, b"a", ["a"]),
    "parallel": (5, "some", b"auto", ["auto"]),
    **dict.fromkeys(
        ("data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size"), (0, -2, "two", 1.5, [2], None)
    ),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in SETTINGS.items() for value in values], ids=repr
)
def test_settings_of_a_wrong_type_are_named(name, value):
    with pytest.raises(ConfigurationError, match=f"{name}|not a size in bytes"):
        LLM(**{"model": "demo", name: value})


def test_every_setting_has_its_wrong_types_and_good_ones_are_kept_plain(tmp_path):
    assert SETTINGS.keys() == {field.name for field in dataclasses.fields(EngineConfig)}
    config = EngineConfig(
        model=tmp_path,
        offload_dir=tmp_path,
        gpu_batch_size=np.int64(4),
        percent=np.array([100, 0, 100, 0, 100, 0]),
        overlap=np.bool_(False),
        cpu_attention=np.float32(0.5),
        gpu_memory=np.int64(10**9),
        seed=np.uint8(7),
        allow_bits=8,
    )
    kept = (config.model, config.offload_dir, config.gpu_batch_size, config.overlap, config.cpu_attention, config.seed)
    assert kept == (str(tmp_path), str(tmp_path), 4, False, 0.5, 7)
    assert [type(value) for value in kept] == [str, str, int, bool, float, int]
    assert config.percent == (100.0, 0.0, 100.0, 0.0, 100.0, 0.0) and config.allow_bits == (8,)
    assert type(config.gpu_memory) is int
