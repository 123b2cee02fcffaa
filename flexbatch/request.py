"""What comes in and what goes out: sampling parameters, requests and completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn; names and meaning as vLLM users know them.

    ``max_tokens=0`` scores the prompt without generating. ``temperature=0`` is greedy. ``top_k`` 0 or -1 keeps every token.
    ``seed=None`` derives the request's own random stream from the engine's seed and the request's index.
    ``logprobs=k`` returns the k most likely tokens and the chosen one for every generated token; ``prompt_logprobs=k`` likewise for the prompt,
    from token ``prompt_logprobs_start`` on: what lies before it is not scored, and so may share the cache pages of a common prefix.
    Raises ValueError that names the field for values out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        checks = (
            ("max_tokens", self.max_tokens >= 0, ">= 0"),
            ("temperature", 0 <= self.temperature < inf, ">= 0 and finite"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= -1, ">= -1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < inf, "> 0 and finite"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("logit_bias", all(bias < inf for bias in (self.logit_bias or {}).values()), "of finite numbers, or -inf to bar a token"),
            ("n", self.n >= 1, ">= 1"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, ">= 0"),
            ("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, ">= 0"),
            ("prompt_logprobs_start", self.prompt_logprobs_start >= 1, ">= 1"),
            ("stop", all(self.stop), "without empty strings"),
        )
        for name, good, wanted in checks:
            if not good:
                raise ValueError(f"sampling parameter {name}={getattr(self, name)!r} must be {wanted}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class Request:
    """One prompt to complete: ``index`` is its place among the results, ``sample`` counts the n completions of one prompt."""

    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    sample: int = 0
    prompt: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of one token and its rank (1 = most likely)."""

    token_id: int
    logprob: float
    rank: int


@dataclass
class Completion:
    """The result of one request.

    ``finish_reason`` is ``"stop"`` (EOS, stop string or stop token), ``"length"`` (max_tokens or the model's context), or ``"error"``.
    ``logprobs[t]`` maps token ids to TokenLogprob for generated token t; ``prompt_logprobs[0]`` is None, as the first token has no context,
    and so are those before ``prompt_logprobs_start``.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    prompt: str | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; None for EOS and length."""
    logprobs: list[dict[int, TokenLogprob]] | None = None
    prompt_logprobs: list[dict[int, TokenLogprob] | None] | None = None
    error: str = ""
    """Why it failed, with ``finish_reason`` "error"; empty when fine."""
    index: int = 0
    samples: list[Completion] = field(default_factory=list)
    """With n > 1: all n completions of the prompt, this one first."""
