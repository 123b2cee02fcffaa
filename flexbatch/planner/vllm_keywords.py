"""Keywords of vLLM's `LLM`: those that mean something here as settings of ours, the others as errors that say which
setting to use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from flexbatch.config import EngineConfig
from flexbatch.memory.host_memory import host_memory_bytes
from flexbatch.models.generation_config import GenerationDefaults
from flexbatch.planner.budgets import resolve_device
from flexbatch.policy.suggest import nearest
from flexbatch.policy.units import size_text
from flexbatch.request import SamplingParams
from flexbatch.validation.checks import Unfit, check_keywords, checked, is_one_of, number, short, whole
from flexbatch.validation.errors import ConfigurationError

logger = logging.getLogger("flexbatch")

HARMLESS: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "distributed_executor_backend": ("mp",),
    "enable_prefix_caching": (True,),
    "enable_chunked_prefill": (True,),
    "enforce_eager": (True, False),
    "disable_log_stats": (True, False),
    "disable_custom_all_reduce": (True, False),
    "use_tqdm_on_load": (True, False),
    "skip_tokenizer_init": (False,),
    "tokenizer_mode": ("auto",),
    "revision": ("main",),
    "tokenizer_revision": ("main",),
    "code_revision": ("main",),
    "load_format": ("auto", "safetensors", "pt"),
    "quantization": ("awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors", "gguf"),
    "kv_cache_dtype": ("auto",),
    "block_size": (16,),
    "swap_space": (0, 4, 4.0),
    "cpu_offload_gb": (0,),
    "enable_lora": (True, False),
    "hf_overrides": ({},),
    "override_generation_config": ({},),
    "hf_token": (False,),
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "limit_mm_per_prompt": ({},),
    "use_v2_block_manager": (True, False),
    "enable_sleep_mode": (False,),
    "logprobs_mode": ("raw_logprobs",),
    "config_format": ("auto", "hf"),
    "allowed_local_media_path": ("",),
    "mm_processor_kwargs": ({},),
}
"""Values, beside None, that ask for what happens anyway; graphs are captured where they help, and change no token."""
ONE_GPU = (
    "several GPUs share every layer with tensor_parallel_size, and the layers with pipeline_parallel_size; several "
    "engines share a job with data_parallel_size, or flexbatch batch --ray"
)
REMEDIES = {
    "trust_remote_code": "nothing that lies beside a model is executed; families that are supported need no code of "
    "their own",
    "distributed_executor_backend": ONE_GPU,
    "enable_prefix_caching": "prompts that begin alike always share their cache pages, which changes no token",
    "enable_chunked_prefill": "prompts are read in chunks; prefill_chunk sets their length",
    "skip_tokenizer_init": "give prompts as token ids and SamplingParams(detokenize=False)",
    "tokenizer_mode": "the tokenizer is the one that AutoTokenizer of transformers opens; tokenizer names another one",
    "revision": "download that revision (hf download ID --revision R) and give its folder as model",
    "tokenizer_revision": "download that revision and give its folder as tokenizer",
    "code_revision": "nothing that lies beside a model is executed",
    "load_format": "the files say what they are; dummy_weights=True draws random weights",
    "quantization": "a checkpoint that is quantized says so itself; weight_bits=8 or 4 quantizes one that is not",
    "kv_cache_dtype": "use cache_bits=16, 8 or 4",
    "block_size": "pages of the cache have 16 tokens",
    "swap_space": "the cache lies in host memory too, as far as cpu_memory goes",
    "max_num_seqs": "use gpu_batch_size (sequences of a micro-batch) and num_gpu_batches, or let the plan choose",
    "max_seq_len_to_capture": "graphs are captured where they help; leave it out",
    "compilation_config": "nothing is compiled at start; leave it out",
    "num_gpu_blocks_override": "use gpu_memory",
    "preemption_mode": "which sequences step aside, and whether their cache is moved or read anew, follows from the "
    "machine's rates; leave it out",
    "kv_cache_memory_bytes": "use gpu_memory, for weights, cache and all else together",
    "attention_backend": "the kernels are the engine's own; leave it out",
    "use_v2_block_manager": "leave it out",
    "enable_sleep_mode": "close() frees the memory",
    "logprobs_mode": "log-probabilities are the model's own, before bias, penalties and temperature",
    "config_format": "config.json of transformers, or a GGUF file, is read",
    "chat_template": "give it to chat or generate",
    "allowed_local_media_path": "models read text only",
    "mm_processor_kwargs": "models read text only",
    "speculative_config": 'use draft (a model, or "ngram") and tree="chain:N"',
    "speculative_model": "use draft",
    "num_speculative_tokens": 'use tree="chain:N"',
    "enable_lora": "adapters come by lora={name: folder}, or with a request's lora_request",
    "hf_overrides": "change config.json in a copy of the folder",
    "override_generation_config": "give SamplingParams",
    "hf_token": "set HF_TOKEN, or log in with hf auth login",
    "download_dir": "set HF_HOME",
    "task": "the engine generates and scores text; max_tokens=0 with prompt_logprobs scores",
    "runner": "the engine generates and scores text; max_tokens=0 with prompt_logprobs scores",
    "convert": "the engine generates and scores text",
    "limit_mm_per_prompt": "models read text only",
    "guided_decoding_backend": "forms of answers are compiled by llguidance; leave it out",
    "logits_processors": "no code of the caller runs in a pass; SamplingParams has logit_bias, bad_words and "
    "allowed_token_ids",
    "served_model_name": "there is no server; flexbatch batch answers OpenAI batch files",
    "worker_cls": "passes run in this process",
}
"""What to do instead of the other values, or of the keyword itself."""
DTYPES = {"half": "float16", "float": "float32"}


def _utilization(share: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same share of the GPU's memory; without a GPU of the host's."""
    share = checked("LLM", "gpu_memory_utilization", share, number(lambda part: 0 < part <= 1, "in (0, 1]"))
    device = resolve_device(str(settings.get("device", "auto")))
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else host_memory_bytes()
    return {"gpu_memory": int(total * share)}


def _offload(gigabytes: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    size = checked("LLM", "cpu_offload_gb", gigabytes, number(lambda size: 0 <= size < 2**20, "a size in GiB, >= 0"))
    return {"cpu_memory": int(size * 2**30)}


def _prompt_tokens(count: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"prefill_budget": checked("LLM", "max_num_batched_tokens", count, whole(1, 2**31 - 1))}


def _logprobs(count: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every request may ask for as many as it likes."""
    checked("LLM", "max_logprobs", count, whole(-1))
    return {}


def _unlimited(count: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Adapters may be as many, and have ranks as high, as memory holds."""
    checked("LLM", "max_loras or max_lora_rank", count, whole(1, 2**31 - 1))
    return {}


def _loaded(form: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if form != "dummy":
        raise Unfit(REMEDIES["load_format"])
    return {"dummy_weights": True}


MAPPED: dict[str, Callable[[Any, Mapping[str, Any]], dict[str, Any]]] = {
    "gpu_memory_utilization": _utilization,
    "cpu_offload_gb": _offload,
    "max_num_batched_tokens": _prompt_tokens,
    **dict.fromkeys(("max_loras", "max_lora_rank", "max_cpu_loras"), _unlimited),
    "max_logprobs": _logprobs,
    "load_format": _loaded,
}
"""What a value means as settings of ours."""


def engine_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `LLM` as fields of `EngineConfig`. Raises ConfigurationError that names the setting to use, and
    UnknownKeywordError for what neither library has."""
    known = EngineConfig.__dataclass_fields__
    theirs = {*HARMLESS, *MAPPED, *REMEDIES}
    for name in settings:
        if name not in known and name not in theirs:
            like_it = nearest(name, [*known, *theirs])
            check_keywords("LLM", [name], {"trace", *known, *([like_it] if like_it else [])})
    kept = {name: value for name, value in settings.items() if name in known}
    for name, value in settings.items():
        if name in known or value is None or is_one_of(value, HARMLESS.get(name, ())):
            continue
        try:
            if name not in MAPPED:
                raise Unfit(REMEDIES[name])
            found = MAPPED[name](value, settings)
        except Unfit as problem:
            raise ConfigurationError(f"LLM: {name}={short(value)} is not available: {problem}") from None
        for field, ours in found.items():
            if settings.get(field) is not None:
                raise ConfigurationError(f"LLM: {name} and {field} say the same: leave one out")
            shown = size_text(ours) if field.endswith("_memory") else ours
            logger.info("%s=%s is taken as %s=%s", name, short(value), field, shown)
            kept[field] = ours
    # The spellings of vLLM where a value of ours has another name.
    if isinstance(kept.get("dtype"), str):
        kept["dtype"] = DTYPES.get(kept["dtype"], kept["dtype"])
    if kept.get("generation_config") == "vllm":
        kept["generation_config"] = "none"
    return {name: value for name, value in kept.items() if not (name == "seed" and value is None)}


CALL_KEYWORDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "prompt_adapter_request": ((None,), "lora_request names an adapter of LoRA, the kind that there is"),
    "priority": ((None,), "prompts begin in the order in which they are given"),
    "guided_options_request": ((None,), "SamplingParams(structured_outputs=...) says the form of answers"),
    "tokenization_kwargs": ((None, {}), "SamplingParams(truncate_prompt_tokens=N) cuts prompts"),
    "mm_processor_kwargs": ((None, {}), "models read text only"),
    "chat_template_content_format": ((None, "auto", "string"), "templates get the text of a message"),
    "prompt_token_ids": ((None,), 'give the lists of ids, or {"prompt_token_ids": ids}, as prompts'),
}
"""Keywords of vLLM's `generate` and `chat`: what changes nothing, and what to do instead of other values."""


def check_call(what: str, others: Mapping[str, Any], call: Callable[..., Any]) -> None:
    """Raises ConfigurationError for keywords of a ``call`` that mean nothing here, UnknownKeywordError, a TypeError,
    for what neither library has."""
    for name, value in others.items():
        if name not in CALL_KEYWORDS:
            check_keywords(what, [name], {*call.__annotations__, *CALL_KEYWORDS} - {"return", "others"})
        neutral, remedy = CALL_KEYWORDS[name]
        if not is_one_of(value, neutral):
            raise ConfigurationError(f"{what}: {name}={short(value)} is not available: {remedy}")


NO_POOLING = "the engine generates and scores text; max_tokens=0 with prompt_logprobs scores"
ABSENT: dict[str, str] = {
    **dict.fromkeys(("encode", "embed", "classify", "score", "reward"), NO_POOLING),
    "beam_search": "there is no beam search; n and temperature give several answers",
    **dict.fromkeys(("sleep", "wake_up"), "close() frees the memory; a new LLM takes it again"),
    "reset_prefix_cache": "pages of prefixes that nobody holds go first where memory is needed",
    **dict.fromkeys(("start_profile", "stop_profile"), "LLM(trace=True) records a timeline: llm.tracer.write(FILE)"),
    **dict.fromkeys(("collective_rpc", "apply_model"), "passes run in this process, and no code of the caller in them"),
    "get_metrics": "report() has throughput, placement and bytes",
    "set_tokenizer": "LLM(tokenizer=...) names another one",
    "llm_engine": "this object is the engine: add_request, step, abort, has_unfinished, config, arch",
}
"""Methods and attributes of vLLM's `LLM` without a counterpart, and what there is instead."""


class NamesOfVllm:
    """The names that vLLM's `LLM` has for what ours has too; of the others it says what there is instead."""

    generation: GenerationDefaults
    tokenizer: Any

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where none are given: the model's generation_config.json, read as transformers reads it. Greedy,
        unless it says ``"do_sample": true`` or names a temperature. Raises ConfigurationError for what is unavailable.
        """
        return self.generation.params()

    def get_tokenizer(self) -> Any:
        """The tokenizer of transformers that lies beside the model; None for random weights."""
        return self.tokenizer

    if not TYPE_CHECKING:  # else every name would pass for an attribute

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(
                f"LLM has no {name!r}{': ' * (name in ABSENT)}{ABSENT.get(name, '')}", name=name, obj=self
            )
