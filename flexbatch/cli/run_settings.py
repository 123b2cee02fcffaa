"""The settings of `flexbatch run` beside the engine's; and those that `batch` and `complete` share with it: what goes
in, what comes out, and how tokens are drawn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexbatch.config import option
from flexbatch.text.files import read_text
from flexbatch.validation.errors import ConfigurationError, reason
from flexbatch.validation.structured_fields import StructuredOutputsParams, schema_text

if TYPE_CHECKING:
    from flexbatch.models.generation_config import GenerationDefaults
    from flexbatch.request import SamplingParams

PROMPT_FILES = (
    "prompts: .txt (one a line), .json (a list), .jsonl, .csv, .tsv or .parquet (field prompt); - for standard input, "
    "lines of text or JSON lines"
)

STANDARD_INPUT = "-"

SYNTHETIC_PROMPT_LEN = 512

SYNTHETIC_PROMPTS = 16

MAX_TOKENS = 64

API_MAX_TOKENS = 16
"""Of a completion in an OpenAI batch file that sets none, as in the API."""


@dataclass(frozen=True)
class InputConfig:
    """What every command that completes prompts is told about them."""

    prompts: str | None = option(None, PROMPT_FILES, metavar="FILE")
    output: str | None = option(None, "write one JSON line for every prompt, in their order", metavar="FILE")
    limit: int | None = option(None, "only the first N prompts")
    truncate: str | None = option(
        None,
        "cut prompts that are too long for the context and --max-tokens at this end (default: they are errors)",
        choices=("left", "right"),
    )

    def check_limit(self) -> None:
        """Raises ConfigurationError."""
        if self.limit is not None and self.limit < 1:
            raise ConfigurationError(f"--limit {self.limit} must be at least 1")


@dataclass(frozen=True)
class RunConfig(InputConfig):
    """What to run; the engine's settings are in EngineConfig."""

    prompts: str | None = option(None, f"{PROMPT_FILES} (default: bundled Python code)", metavar="FILE")
    output: str | None = option(
        None,
        "write completions as JSON lines as they finish, in the order of the prompts; goes on where an interrupted "
        "run stopped",
        metavar="FILE",
    )
    limit: int | None = option(
        None,
        "only the first N prompts; of made-up prompts, make N (default: one block)",
        aliases=("--num-prompts",),
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
        "tokens to generate for every prompt; 0 scores the prompts (default: as the model's generation_config.json "
        "says, else 64; requests of an OpenAI batch file: as the API says)",
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
    include_stop_str_in_output: bool = option(
        False, "leave the stop text, or the text of the stop token, in the answer"
    )
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    min_tokens: int | None = option(
        None,
        "tokens to generate before EOS, a stop token or a stop text counts (default: as generation_config.json says, "
        "else 0)",
    )
    bad_words: tuple[str, ...] = option((), "never write any of these texts", nargs="+", metavar="TEXT")
    allowed_token_ids: tuple[int, ...] = option((), "draw no other tokens", nargs="+", metavar="ID")
    ignore_eos: bool = option(False, "go on after the end-of-sequence token; made-up prompts always do")
    n: int | None = option(None, "completions of every prompt (default: 1)")
    logprobs: int | None = option(
        None, "return the log-probability of every generated token and of the N most likely ones; -1: of all tokens"
    )
    prompt_logprobs: int | None = option(None, "the same for the tokens of the prompt")
    json_schema: str | None = option(None, "answers are JSON of the schema in this file", metavar="FILE")
    disable_any_whitespace: bool = option(False, "JSON answers have no whitespace between their tokens")
    choice: tuple[str, ...] = option((), "answers are one of these texts", nargs="+", metavar="TEXT")
    regex: str | None = option(None, "answers match this regular expression from beginning to end", metavar="REGEX")

    def given(self) -> dict[str, Any]:
        """What the user has set, by the fields of SamplingParams. Raises ConfigurationError for a schema that cannot be
        read."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(SamplingConfig))
        found = {name: value for name, value in values if value is not None and value != ()}
        form: dict[str, Any] = {name: found.pop(name) for name in ("choice", "regex") if name in found}
        if (path := found.pop("json_schema", None)) is not None:
            try:
                form["json"] = schema_text(read_text(path))
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"--json-schema {path}: {reason(error)}") from error
        if found.pop("disable_any_whitespace"):
            if "json" not in form and getattr(self, "json_schema_column", None) is None:
                raise ConfigurationError("--disable-any-whitespace is for JSON answers: give their --json-schema, too")
            form |= {"disable_any_whitespace": True} if "json" in form else {}
        return {**found, "structured_outputs": StructuredOutputsParams(**form)} if form else found

    def check_sampling(self) -> None:
        """Raises ConfigurationError for what is wrong whatever the model's file adds to it."""
        from flexbatch.request import SamplingParams

        SamplingParams(**{"max_tokens": MAX_TOKENS, **self.given()})

    def params(self, generation: GenerationDefaults, **more: Any) -> SamplingParams:
        """With the model's own settings where the user has none. Raises ConfigurationError."""
        return generation.params({**self.given(), **more}, max_tokens=MAX_TOKENS)

    def api_params(self, generation: GenerationDefaults) -> SamplingParams:
        """The same for the requests of an OpenAI batch file, which has defaults of its own: 16 tokens at temperature 1.
        Raises ConfigurationError."""
        return generation.params(self.given(), max_tokens=API_MAX_TOKENS, sample=True)
