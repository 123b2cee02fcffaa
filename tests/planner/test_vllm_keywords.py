"""Keywords of vLLM's `LLM`: taken as what they mean here, or refused with what to use instead."""

from __future__ import annotations

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.config import EngineConfig
from flexbatch.planner.vllm_keywords import DTYPES, HARMLESS, MAPPED, REMEDIES, engine_settings
from flexbatch.validation.errors import ConfigurationError
from tests.tiny_models import make_model, make_tokenizer

GIB = 2**30


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"cpu_offload_gb": 10}, {"cpu_memory": 10 * GIB}),
        ({"cpu_offload_gb": 0.5, "dtype": "half"}, {"cpu_memory": GIB // 2, "dtype": "float16"}),
        ({"cpu_offload_gb": 0, "swap_space": 0}, {}),
        ({"max_num_batched_tokens": 2048}, {"prefill_budget": 2048}),
        ({"max_model_len": 4096, "dtype": torch.bfloat16}, {"max_model_len": 4096, "dtype": torch.bfloat16}),
        ({"dtype": "float", "generation_config": "vllm"}, {"dtype": "float32", "generation_config": "none"}),
        ({"load_format": "dummy"}, {"dummy_weights": True}),
        ({"load_format": "safetensors", "max_logprobs": -1, "quantization": "awq"}, {}),
        ({"enforce_eager": True, "trust_remote_code": False}, {}),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, {"tensor_parallel_size": 2}),
        ({"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 2}),
        ({"speculative_config": None, "distributed_executor_backend": None, "seed": None, "revision": None}, {}),
        (
            {"seed": 3, "tokenizer": "folder", "gpu_memory": "1GiB"},
            {"seed": 3, "tokenizer": "folder", "gpu_memory": "1GiB"},
        ),
    ],
    ids=str,
)
def test_what_means_something_here_is_taken(given, wanted):
    assert engine_settings(given) == wanted


def test_a_share_of_the_memory_is_one_of_what_the_machine_has(monkeypatch):
    monkeypatch.setattr("flexbatch.planner.vllm_keywords.host_memory_bytes", lambda: 23 * GIB)
    found = engine_settings({"gpu_memory_utilization": 0.25, "device": "cpu"})
    assert found == {"device": "cpu", "gpu_memory": int(0.25 * 23 * GIB)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 80 * GIB))
    assert engine_settings({"gpu_memory_utilization": 0.5}) == {"gpu_memory": 40 * GIB}, "of all, not of what is free"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"trust_remote_code": True}, "trust_remote_code=True is not available: nothing .* is executed"),
        ({"distributed_executor_backend": "ray"}, "tensor_parallel_size, .* --ray"),
        ({"data_parallel_size": True}, "data_parallel_size=True"),
        ({"max_num_seqs": 256}, "use gpu_batch_size .* num_gpu_batches"),
        ({"kv_cache_dtype": "fp8"}, "use cache_bits"),
        ({"quantization": "fp8"}, "weight_bits"),
        ({"speculative_config": {"model": "m"}}, 'use draft .* tree="chain:N"'),
        ({"swap_space": 8}, "cpu_memory"),
        ({"enable_prefix_caching": False}, "always share"),
        ({"revision": "abc"}, "give its folder as model"),
        ({"load_format": "gguf"}, "dummy_weights=True"),
        ({"gpu_memory_utilization": 90}, r"gpu_memory_utilization=90 must be in \(0, 1\]"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization='0.9' must be a number"),
        ({"cpu_offload_gb": -1}, "cpu_offload_gb=-1 must be a size in GiB"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0 must be >= 1"),
        ({"gpu_memory_utilization": 0.5, "gpu_memory": "1GiB"}, "gpu_memory_utilization and gpu_memory say the same"),
        ({"cpu_offload_gb": 1, "cpu_memory": "1GiB"}, "cpu_offload_gb and cpu_memory say the same"),
    ],
    ids=str,
)
def test_the_others_are_refused_with_what_to_use(given, problem):
    with pytest.raises(ConfigurationError, match=problem):
        LLM("demo", **given)


def test_every_keyword_has_a_remedy_and_none_hides_a_setting():
    assert not {*HARMLESS, *REMEDIES, *MAPPED} & EngineConfig.__dataclass_fields__.keys()
    nothing_to_say = {"enforce_eager", "disable_log_stats", "disable_custom_all_reduce", "use_tqdm_on_load"}
    assert {*HARMLESS} - {*MAPPED} - {*REMEDIES} == nothing_to_say
    for name in REMEDIES:
        with pytest.raises(ConfigurationError, match=rf"LLM:? {name}"):
            engine_settings({name: object()})
    assert all(value in ("float16", "float32") for value in DTYPES.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keywords") / "model"
    make_model("opt", folder)  # positions are a table of weights, which a limit of the context leaves as it is
    return folder


FIXED = {"device": "cpu", "percent": (100, 0, 100, 0, 100, 0), "gpu_batch_size": 4, "num_gpu_batches": 1}


def test_max_model_len_limits_prompts_and_answers_and_changes_no_token(folder):
    prompt = [5, 6, 7] * 4
    params = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
    with LLM(str(folder), max_model_len=20, **FIXED) as llm, LLM(str(folder), **FIXED) as free:
        (found,), (whole,) = llm.generate([prompt], params), free.generate([prompt], params)
        assert (len(found.token_ids), found.finish_reason, len(whole.token_ids)) == (8, "length", 500)
        assert found.token_ids == whole.token_ids[:8]
        with pytest.raises(ConfigurationError, match="has 20 tokens; the model's context of 20 allows 19"):
            llm.generate([[5] * 20], params)
    with pytest.raises(ConfigurationError, match=r"max_model_len=513 must be at most 512, the context of"):
        LLM(str(folder), max_model_len=513, **FIXED)


def test_another_tokenizer_may_stand_in(folder, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "lower")
    with LLM(str(folder), tokenizer=tmp_path / "lower", **FIXED) as llm:
        (found,) = llm.generate("ABC", SamplingParams(max_tokens=1))
        assert found.prompt_token_ids == make_tokenizer()("abc")["input_ids"]
    with pytest.raises(ValueError, match="nowhere"):
        LLM(str(folder), tokenizer="/nowhere/at/all", **FIXED)
