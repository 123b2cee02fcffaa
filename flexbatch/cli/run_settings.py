"""The settings of `flexbatch run` beside the engine's: what goes in, what comes out, and how tokens are drawn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexbatch.config import option

if TYPE_CHECKING:
    from flexbatch.models.generation_config import GenerationDefaults
    from flexbatch.request import SamplingParams

SYNTHETIC_PROMPT_LEN = 512

SYNTHETIC_PROMPTS = 16

MAX_TOKENS = 64


@dataclass(frozen=True)
class RunConfig:
    """What to run; the engine's settings are in EngineConfig."""

    prompts: str | None = option(
        None,
        "prompts: .txt (one a line), .json (a list), .jsonl or .parquet (field prompt) (default: bundled Python code)",
        metavar="FILE",
    )
    output: str | None = option(
        None,
        "write completions as JSON lines as they finish, in the order of the prompts; goes on where an interrupted "
        "run stopped",
        metavar="FILE",
    )
    num_prompts: int | None = option(
        None, "run only the first N prompts; of made-up prompts, make N (default: one block)"
    )
    prompt_len: int | None = option(
        None, f"make up prompts of N random tokens; with --dummy-weights and no --prompts, {SYNTHETIC_PROMPT_LEN}"
    )
    json: bool = option(False, "print completions and report as one JSON document")
    trace: str | None = option(
        None, "write a timeline of every link and processor for Chrome or Perfetto", metavar="FILE"
    )
    dry_run: bool = option(False, "print the plan, its price and the memory it needs, load nothing, run nothing")
    plot: str | None = option(None, "with --dry-run, draw time per resource and memory per tier", metavar="PNG")
    path: str | None = option(
        None, "folder of the model, or the folder that holds it under the model's name", metavar="FOLDER"
    )
    compress_weight: bool = option(False, "the same as --weight-bits 4")
    compress_cache: bool = option(False, "the same as --cache-bits 4")
    cpu_cache_compute: bool = option(False, "the same as --cpu-attention 1")
    pin_weight: bool = option(True, "accepted for FlexGen's sake: on a GPU machine, host weights are always pinned")


@dataclass(frozen=True)
class SamplingConfig:
    """SamplingParams of all prompts. What is None or empty the model's generation_config.json says; greedy unless
    either asks for more, so that a run can be
    repeated."""

    max_tokens: int | None = option(
        None,
        "tokens to generate for every prompt; 0 scores the prompts "
        "(default: as the model's generation_config.json says, else 64)",
        aliases=("--gen-len",),
    )
    temperature: float | None = option(
        None, "0 takes the most likely token (default: as generation_config.json says, else 0)"
    )
    top_p: float | None = option(
        None,
        "draw from the most likely tokens that together have this probability "
        "(default: as generation_config.json says, else 1)",
    )
    top_k: int | None = option(
        None, "draw from the N most likely tokens; 0 keeps all (default: as generation_config.json says, else 0)"
    )
    min_p: float | None = option(
        None,
        "drop tokens less likely than this share of the most likely one "
        "(default: as generation_config.json says, else 0)",
    )
    repetition_penalty: float | None = option(
        None,
        "divide the logits of tokens in prompt or output by this (default: as generation_config.json says, else 1)",
    )
    presence_penalty: float = option(0.0, "subtract this from the logits of tokens in the output (default: 0)")
    frequency_penalty: float = option(0.0, "subtract this once for every occurrence in the output (default: 0)")
    stop: tuple[str, ...] = option((), "end at any of these texts, which are cut off", nargs="+", metavar="TEXT")
    stop_token_ids: tuple[int, ...] = option((), "end at any of these tokens", nargs="+", metavar="ID")
    ignore_eos: bool = option(False, "go on after the end-of-sequence token; made-up prompts always do")
    n: int | None = option(None, "completions of every prompt (default: 1)")
    logprobs: int | None = option(None, "return log-probabilities of the N most likely tokens at every generated place")
    prompt_logprobs: int | None = option(
        None, "return log-probabilities of the N most likely tokens at every place of the prompt"
    )

    def given(self) -> dict[str, Any]:
        """What the user has set."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if value is not None and value != ()}

    def params(self, generation: GenerationDefaults, **more: Any) -> SamplingParams:
        """With the model's own settings where the user has none. Raises ConfigurationError."""
        return generation.params({**self.given(), **more}, max_tokens=MAX_TOKENS)
