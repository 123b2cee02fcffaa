"""Converts settings of lm-evaluation-harness to FlexBatch's: ``--model_args``, and the generation options of
requests."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs

from flexbatch.config import EngineConfig
from flexbatch.models.generation_config import FIELDS, NOTHING, GenerationDefaults
from flexbatch.request import SamplingParams
from flexbatch.validation.errors import ConfigurationError

NEUTRAL_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "backend": ("default", "causal"),
    "revision": ("main", None),
    "subfolder": ("", None),
    "trust_remote_code": (False, None),
    "use_fast_tokenizer": (True, None),
    "logits_cache": (True, False),
    "parallelize": (False, None),
    "peft": (None,),
    "delta": (None,),
    "autogptq": (False, None),
    "gptqmodel": (False, None),
    "gguf_file": (None,),
    "tp_plan": (None,),
}
"""Arguments of ``hf`` that are accepted with a value that asks for what happens anyway."""
NEUTRAL_OPTIONS = {**NOTHING, "num_return_sequences": (1,)}
"""Options of requests that are accepted with a value that asks for what happens anyway."""
BEAM_OPTIONS = ("length_penalty", "early_stopping")
"""Options that change nothing without beams."""
TRANSFORMERS_TOP_K = 50
"""The ``top_k`` of transformers' `generate` where nobody sets one."""
SAMPLING_KEYS = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "min_length",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
)


def sampling_params(
    index: int,
    gen_kwargs: dict[str, Any],
    generation: GenerationDefaults,
    *,
    max_gen_toks: int,
    stop_in_engine: bool = True,
) -> SamplingParams:
    """Returns the parameters of request ``index``: its own, else those of the model's generation_config.json, as with
    ``hf``.

    ``max_gen_toks`` holds where the request names no limit. Without ``stop_in_engine`` the engine gets no stop
    sequences. Raises ValueError for what the engine does not have, such as ``num_beams``.
    """
    options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, max_gen_toks))
    until, max_tokens = options.pop("until"), options.pop("max_gen_toks")
    sample, temperature = options.pop("do_sample"), float(options.pop("temperature", 0.0))
    known = {FIELDS.get(name, name): options.pop(name) for name in SAMPLING_KEYS if name in options}
    neutral = {name for name, value in options.items() if value is None or value in NEUTRAL_OPTIONS.get(name, ())}
    options = {name: value for name, value in options.items() if name not in {*neutral, *BEAM_OPTIONS}}
    if options:
        raise ValueError(
            f"request {index}: generation options {sorted(options)} are not available; the engine has "
            f"{', '.join(SAMPLING_KEYS)}"
        )
    stop = tuple(text for text in until if text) if stop_in_engine else ()
    given = {"max_tokens": max_tokens, "temperature": temperature if sample else 0.0, "stop": stop, **known}
    said = {name: value for name, value in generation.unavailable.items() if name not in neutral}
    generation = dataclasses.replace(generation, unavailable=said)
    if "max_new_tokens" in generation.settings:
        # Of max_new_tokens in the file and the max_length that hf gives, transformers takes the first.
        del given["max_tokens"]
    if given["temperature"] > 0 and generation.settings.get("top_k") is None:
        given.setdefault("top_k", TRANSFORMERS_TOP_K)
    return generation.params(given)


def engine_arguments(engine: dict[str, Any]) -> dict[str, Any]:
    """Returns keywords of `LLM` from ``--model_args``, which knows no lists: ``percent=20 80 0 100 0 100``,
    ``draft=small medium``, ``lora=name=folder``, whose first is for all; None means unset.

    Raises ConfigurationError for a keyword that `LLM` does not have.
    """
    engine = {
        name: value
        for name, value in engine.items()
        if name not in NEUTRAL_ARGUMENTS or value not in NEUTRAL_ARGUMENTS[name]
    }
    if unknown := engine.keys() - {field.name for field in dataclasses.fields(EngineConfig)}:
        raise ConfigurationError(
            f"--model_args: FlexBatch has no {', '.join(sorted(unknown))}; engine settings are the flags of "
            "flexbatch run --help"
        )
    given = {name: value for name, value in engine.items() if value is not None}
    if str(given.get("device")).startswith("cuda") and not torch.cuda.is_available():
        del given["device"]  # the harness gives cuda:0 where the user gives nothing; its hf takes the CPU then
    if isinstance(given.get("percent"), str):
        given["percent"] = tuple(float(number) for number in re.split(r"[\s/:;]+", given["percent"].strip()))
    if isinstance(given.get("draft"), str):
        given["draft"] = tuple(given["draft"].split())
    if isinstance(given.get("lora"), str):
        given["lora"] = tuple(given["lora"].split())
        given.setdefault("lora_default", given["lora"][0].partition("=")[0])
    return given
