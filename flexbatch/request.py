"""What comes in and what goes out: sampling parameters, requests and completions."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from numbers import Integral
from typing import Any

from flexbatch.validation.checks import (
    Check,
    Unfit,
    check_keywords,
    checked,
    number,
    one_or_several,
    optional,
    several,
    table,
    text,
    truth,
    whole,
)
from flexbatch.validation.errors import ConfigurationError

MOST_SAMPLES = 16_384
"""Completions of one prompt, as in vLLM. Every one is a request of its own before anything runs: 64 bytes each and its
share of lists, 6.4 GiB for 100 million."""
MOST_LOGPROBS = 10_000
"""Candidates at one place. Each is an object of 0.2 kB in the result: 2 MB a token at this bound."""
MOST_STOPS, LONGEST_STOP = 1_024, 4_096
"""Stop strings and characters of one: all are looked for after every token."""
MOST_TOKENS = 2**31 - 1
"""The largest length that is taken: more than the context of any model, which cuts it."""
MOST_IDS = 2**20
"""Token ids in one list: more than any vocabulary has."""
MOST_BIASES = 2**22
"""Biased tokens times samples: every sample in flight keeps a table of 150 bytes an entry, 600 MB at this bound."""

SAMPLING_RULES = 1
"""Version of how tokens follow from logits, sampling parameters, seeds and places in a job. A change that gives the
same request other tokens raises it, and jobs that were begun before are not resumed with two kinds of answers.
"""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn; names and meaning as vLLM users know them.

    ``max_tokens=0`` scores the prompt without generating, None takes the rest of the model's context.
    ``temperature=0`` is greedy. ``top_k`` 0 or -1 keeps every token. ``seed=None`` derives the request's own random
    stream from the engine's seed and the request's index. ``logprobs=k`` returns the k most likely tokens and the
    chosen one for every generated token; ``prompt_logprobs=k`` likewise for the prompt, from token
    ``prompt_logprobs_start`` on: what lies before it is not scored, and so may share the cache pages of a common
    prefix. ``min_tokens``: generated before EOS or a stop token may come, or a stop string counts. The fields below
    it are those of transformers' generation_config.json, and mean the same. Raises ConfigurationError, a ValueError,
    that names the field for values of a wrong type or out of range, and for a keyword that does not exist.
    """

    max_tokens: int | None = 16
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
    min_tokens: int = 0
    min_length: int = 0
    """Like min_tokens, but counts prompt and output together, and bars EOS alone."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens comes twice in prompt and output; 0: any may."""
    bad_words_ids: Sequence[Sequence[int]] = ()
    """Sequences of tokens of which the last is never drawn after the others."""
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    """Not drawn as the first token."""
    forced_bos_token_id: int | None = None
    """The first token after a prompt of one token."""
    forced_eos_token_id: int | Sequence[int] = ()
    """What the last token of max_tokens is."""
    sequence_bias: Sequence[tuple[Sequence[int], float]] = ()
    """(tokens, bias): added to the logit of the last of them where the others come before."""

    def __new__(cls, *args: Any, **keywords: Any) -> SamplingParams:
        check_keywords("SamplingParams", keywords, cls.__dataclass_fields__, OTHER_NAMES)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            value = getattr(self, name)
            if value is not getattr(
                SamplingParams, name
            ):  # defaults are as they should be: 20 of 25 in every row of a job
                object.__setattr__(self, name, checked("sampling parameter", name, value, check))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigurationError(
                f"sampling parameter min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}"
            )
        if self.n * len(self.logit_bias or ()) > MOST_BIASES:
            raise ConfigurationError(
                f"sampling parameter n={self.n} must be at most {MOST_BIASES // len(self.logit_bias or ())} "
                f"with a logit_bias of {len(self.logit_bias or ()):,} "
                "tokens: every completion keeps a table of them"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def tokens_within(self, context_left: int) -> int:
        """Tokens to generate where the context holds ``context_left`` more behind the prompt."""
        return max(0, context_left if self.max_tokens is None else min(self.max_tokens, context_left))

    @property
    def may_end_early(self) -> bool:
        """Whether anything but ``max_tokens`` can end the output."""
        return not self.ignore_eos or bool(self.stop or self.stop_token_ids)

    def within(self, context_left: int) -> SamplingParams:
        """These parameters with a number for ``max_tokens``: None is all of ``context_left``, the tokens
        behind the prompt."""
        if self.max_tokens is not None:
            return self
        # EOS stays barred to the end of the context, as it does where max_tokens is more than the context has left.
        limit = self.tokens_within(context_left)
        return replace(self, max_tokens=limit, min_tokens=min(self.min_tokens, limit))

    @property
    def constrained(self) -> bool:
        """Whether any of the fields from ``min_tokens`` on says something."""
        return any(getattr(self, name) not in (0, (), None) for name in CONSTRAINTS)

    def named_tokens(self) -> Iterator[tuple[str, int]]:
        """(field, token id) of every token that the model must have. Suppressed ones that it lacks are never drawn, and
        passed over as in transformers."""
        for token in self.logit_bias or ():
            yield "logit_bias", token
        for token in self.forced_eos_token_id:  # type: ignore[union-attr]  # a tuple since __post_init__
            yield "forced_eos_token_id", token
        for tokens in self.bad_words_ids:
            for token in tokens:
                yield "bad_words_ids", token
        for tokens, _ in self.sequence_bias:
            for token in tokens:
                yield "sequence_bias", token
        if self.forced_bos_token_id is not None:
            yield "forced_bos_token_id", self.forced_bos_token_id


def _biased_sequence(value: Any) -> tuple[tuple[int, ...], float]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != 2:
        raise Unfit("a list of pairs: token ids and the bias of the last of them")
    return _token_sequence(value[0]), _bias(value[1])


def _token_sequence(value: Any) -> tuple[int, ...]:
    tokens = several(_token, MOST_IDS, "token ids")(value)
    if not tokens:
        raise Unfit("a list of lists of at least one token id")
    return tokens


TRANSFORMERS_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "num_return_sequences": "n",
}
"""What transformers calls a field."""
OTHER_NAMES = {
    **TRANSFORMERS_NAMES,
    "max_length": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_gen_toks": "max_tokens",
    "stop_sequences": "stop",
    "until": "stop",
    "best_of": "n",
    "do_sample": "temperature",
    "temp": "temperature",
    "random_seed": "seed",
    "top_logprobs": "logprobs",
    "repeat_penalty": "repetition_penalty",
}
"""What users of other libraries call a field, to be told its name here. Names that look alike may mean another one."""

_token = whole(0)
_bias = number(lambda bias: -1e30 <= bias <= 1e30 or bias == -inf, "between -1e30 and 1e30, or -inf to bar a token")
_penalty = number(lambda penalty: -2 <= penalty <= 2, "in [-2, 2]")
CONSTRAINTS = (
    "min_tokens", "min_length", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id", "sequence_bias",
)  # fmt: skip
"""Fields that follow the text so far: `execution.constraints`."""
CHECKS: dict[str, Check] = {
    "max_tokens": optional(whole(0, MOST_TOKENS)),
    "temperature": number(lambda temperature: 0 <= temperature < inf, ">= 0 and finite"),
    "top_p": number(lambda share: 0 < share <= 1, "in (0, 1]"),
    "top_k": whole(-1, MOST_TOKENS),
    "min_p": number(lambda share: 0 <= share <= 1, "in [0, 1]"),
    "repetition_penalty": number(lambda penalty: 0 < penalty < inf, "> 0 and finite"),
    "presence_penalty": _penalty,
    "frequency_penalty": _penalty,
    "logit_bias": optional(table(whole(), _bias, MOST_IDS, "token ids to biases")),
    "stop": one_or_several(str, text(LONGEST_STOP), MOST_STOPS, "texts"),
    "stop_token_ids": several(whole(), MOST_IDS, "token ids"),
    "ignore_eos": truth,
    "seed": optional(whole()),
    "n": whole(1, MOST_SAMPLES),
    "logprobs": optional(whole(0, MOST_LOGPROBS)),
    "prompt_logprobs": optional(whole(0, MOST_LOGPROBS)),
    "prompt_logprobs_start": whole(1, MOST_TOKENS),
    "min_tokens": whole(0, MOST_TOKENS),
    "min_length": whole(0, MOST_TOKENS),
    "no_repeat_ngram_size": whole(0, MOST_TOKENS),
    "bad_words_ids": several(_token_sequence, MOST_IDS, "lists of token ids"),
    "suppress_tokens": several(whole(), MOST_IDS, "token ids"),
    "begin_suppress_tokens": several(whole(), MOST_IDS, "token ids"),
    "forced_bos_token_id": optional(_token),
    "forced_eos_token_id": one_or_several(Integral, _token, MOST_IDS, "token ids"),
    "sequence_bias": several(_biased_sequence, MOST_IDS, "pairs of token ids and a bias"),
}


@dataclass(frozen=True)
class Request:
    """One prompt to complete: ``index`` is its place among the results, ``sample`` counts the n completions of one
    prompt. ``source``: where its row is from; answers of one source are expected to be of like lengths."""

    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    sample: int = 0
    prompt: str | None = None
    source: Hashable = None


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of one token and its rank (1 = most likely)."""

    token_id: int
    logprob: float
    rank: int


@dataclass
class Completion:
    """The result of one request.

    ``finish_reason`` is ``"stop"`` (EOS, stop string or stop token), ``"length"`` (max_tokens or the model's
    context), or ``"error"``. ``logprobs[t]`` maps token ids to TokenLogprob for generated token t;
    ``prompt_logprobs[0]`` is None, as the first token has no context, and so are those before
    ``prompt_logprobs_start``.
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
    """With n > 1: all n completions of the prompt. This one is the first of them, or one that failed."""

    @property
    def bare_error(self) -> str:
        """``error`` without the number of the prompt, for those who count in another way: a job its rows."""
        return re.sub(r"^prompt \d+(, sample \d+)?: ", "", self.error)
