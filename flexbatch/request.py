"""What comes in and what goes out: sampling parameters, requests and completions."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from flexbatch.validation.checks import check_keywords, checked
from flexbatch.validation.errors import ConfigurationError
from flexbatch.validation.sampling_fields import (
    CHECKS,
    MOST_BIASES,
    OTHER_NAMES,
    UNAVAILABLE,
    taking_neutral,
    with_meaning,
)
from flexbatch.validation.structured_fields import StructuredOutputsParams

SAMPLING_RULES = 1
"""Version of how tokens follow from logits, sampling parameters, seeds and positions in a job. A change that gives the
same request other tokens raises it, and jobs that were begun before are not resumed with two kinds of answers.
"""


@dataclass
class SamplingParams:
    """How the tokens of one request are drawn; names and meaning as vLLM users know them.

    Fields may be set later, and are checked then as well; a request keeps what they were when it came.

    ``max_tokens=0`` scores the prompt without generating, None takes the rest of the model's context.
    ``temperature=0`` is greedy. ``top_k`` 0 or -1 keeps every token. ``seed=None`` derives the request's own random
    stream from the engine's seed and the request's number among all that the engine has had. ``logprobs=k`` returns the
    k most likely tokens and the chosen one for every generated token, -1 those of the whole vocabulary;
    ``prompt_logprobs=k`` likewise for the prompt, from token ``prompt_logprobs_start`` on: what lies before it is not
    scored, and so may share the cache pages of a common prefix. ``min_tokens``: generated before EOS or a stop token
    may come, or a stop string counts. The fields from ``min_length`` to ``sequence_bias`` are those of transformers'
    generation_config.json, and mean the same. Raises ConfigurationError, a ValueError, that names the field for values
    of a wrong type or out of range, and for a keyword that does not exist.
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

    bad_words: str | Sequence[str] = ()
    """Texts whose last token is never drawn after their others, as the tokenizer writes them at the beginning of a text
    and after a space."""
    allowed_token_ids: Sequence[int] | None = None
    """No other tokens are drawn."""
    include_stop_str_in_output: bool = False
    """Whether the text ends with the stop string, or the text of the stop token, that ended it."""
    skip_special_tokens: bool = True
    """Whether the text leaves out special tokens."""
    detokenize: bool = True
    """Whether there is a text at all."""
    truncate_prompt_tokens: int | None = None
    """Only so many tokens at the end of the prompt are used; -1: as many as the context leaves beside max_tokens. The
    BOS token that the tokenizer puts before a text stays."""
    structured_outputs: StructuredOutputsParams | None = None
    """The form of the answer: a JSON schema, a regex, a choice or a grammar. A dict of its fields will do."""

    def __new__(cls, *args: Any, **keywords: Any) -> SamplingParams:
        if not keywords.keys() <= CHECKS.keys():
            check_keywords("SamplingParams", with_meaning(keywords), CHECKS, OTHER_NAMES, UNAVAILABLE)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in CHECKS:
            if not with_meaning({name: value}):
                return
            check_keywords("SamplingParams", [name], CHECKS, OTHER_NAMES, UNAVAILABLE)
        # Defaults are as they should be: 25 of 30 in every row of a job.
        if value is not getattr(SamplingParams, name):
            value = checked("sampling parameter", name, value, CHECKS[name])
        object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ConfigurationError for fields that contradict each other. Not asked when one is set, so that several
        may be set one after the other; asked of every request."""
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigurationError(
                f"sampling parameter min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}"
            )
        if self.n * len(self.logit_bias or ()) > MOST_BIASES:
            raise ConfigurationError(
                f"sampling parameter n={self.n} must be at most {MOST_BIASES // len(self.logit_bias or ())} "
                f"with a logit_bias of {len(self.logit_bias or ()):,} tokens: every completion keeps a table of them"
            )
        if self.stop and not self.detokenize:
            raise ConfigurationError(
                "sampling parameter stop needs the text of the answer, and detokenize=False asks for none: leave one "
                "out, or use stop_token_ids"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def tokens_within(self, context_left: int) -> int:
        """Tokens to generate where the context holds ``context_left`` more behind the prompt."""
        return max(0, context_left if self.max_tokens is None else min(self.max_tokens, context_left))

    def snapshot(self) -> SamplingParams:
        """A copy that its caller cannot change. Raises ConfigurationError for what was put into the dict of biases, or
        fields that contradict each other."""
        kept = copy(self)
        kept.logit_bias = kept.logit_bias  # checked once more, and another dict
        kept.check()
        return kept

    clone = snapshot  # its name in vLLM

    @property
    def may_end_early(self) -> bool:
        """Whether anything but ``max_tokens`` can end the output."""
        return not self.ignore_eos or bool(self.stop or self.stop_token_ids)

    def within(self, context_left: int) -> SamplingParams:
        """A snapshot with a number for ``max_tokens``: None is all of ``context_left``, the tokens behind the
        prompt."""
        kept = self.snapshot()
        if self.max_tokens is None:
            # EOS stays barred to the end of the context, as it does where max_tokens is more than the context has left.
            kept.max_tokens = self.tokens_within(context_left)
            kept.min_tokens = min(self.min_tokens, kept.max_tokens)
        return kept

    @property
    def constrained(self) -> bool:
        """Whether any of the fields that follow the text so far says something."""
        return any(getattr(self, name) not in (0, (), None) for name in CONSTRAINTS)

    def named_tokens(self) -> Iterator[tuple[str, int]]:
        """(field, token id) of every token that the model must have. Suppressed ones that it lacks are never drawn, and
        passed over as in transformers."""
        for name in ("logit_bias", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                yield name, token
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


SamplingParams.__init__ = taking_neutral(SamplingParams.__init__)  # type: ignore[method-assign]

CONSTRAINTS = (
    "min_tokens", "min_length", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "allowed_token_ids",
)  # fmt: skip
"""Fields that follow the text so far: `execution.constraints`."""


@dataclass(frozen=True)
class Request:
    """One prompt to complete: ``index`` is that of its result, ``sample`` counts the n completions of one
    prompt. ``number``, ``index`` where it is None, is what the random stream of a prompt without a seed belongs to.
    ``source``: where its row is from; answers of one source are expected to be of like lengths."""

    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    sample: int = 0
    prompt: str | None = None
    number: int | None = None
    source: Hashable = None
    adapter: int = 0
    """Its LoRA adapter by number, 0 for none."""
    priority: int = 0
    """Those of smaller numbers go first, as in vLLM."""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of one token and its rank (1 = most likely)."""

    token_id: int
    logprob: float
    rank: int
    decoded_token: str | None = field(default=None, compare=False)
    """Its text by itself; None without a tokenizer."""


@dataclass(frozen=True)
class CompletionOutput:
    """One of the n answers to a prompt, with the names that vLLM users know; the fields are those of `Completion`, but
    ``index`` counts the answers."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    """Of all its tokens together; None unless log-probabilities were asked for."""
    logprobs: list[dict[int, TokenLogprob]] | None
    finish_reason: str
    stop_reason: str | int | None

    def finished(self) -> bool:
        return True


@dataclass
class Completion:
    """The result of one request: its prompt, and the first of its answers. ``outputs`` has all of them.

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
    request_id: Hashable = None
    """The id given to `add_request`, the key of a stream's item, or the number of the prompt, as text."""

    @property
    def finished(self) -> bool:
        """Whether nothing more comes: completions are handed out when they are whole."""
        return True

    @property
    def cumulative_logprob(self) -> float | None:
        """Natural-log probability of all generated tokens together; None unless log-probabilities were asked for."""
        if self.logprobs is None:
            return None
        steps = zip(self.token_ids, self.logprobs, strict=True)
        return sum((entries[token_id].logprob for token_id, entries in steps), 0.0)

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The n answers to the prompt."""
        return [
            CompletionOutput(
                i, one.text, one.token_ids, one.cumulative_logprob, one.logprobs, one.finish_reason, one.stop_reason
            )
            for i, one in enumerate(self.samples or [self])
        ]

    @property
    def bare_error(self) -> str:
        """``error`` without the number of the prompt, for those who count in another way: a job its rows."""
        return re.sub(r"^prompt \d+(, sample \d+)?: ", "", self.error)
