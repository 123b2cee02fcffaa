"""What the fields of SamplingParams may hold, and what other libraries call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from math import inf
from numbers import Integral
from typing import Any

from flexbatch.validation.checks import (
    Check,
    Unfit,
    is_one_of,
    number,
    one_or_several,
    optional,
    several,
    table,
    text,
    truth,
    whole,
)
from flexbatch.validation.structured_fields import as_structured_outputs

MOST_SAMPLES = 16_384
"""Completions of one prompt, as in vLLM. Every one is a request of its own before anything runs: 64 bytes each and its
share of lists, 6.4 GiB for 100 million."""
MOST_LOGPROBS = 10_000
"""Candidates at one position. Each is an object of 0.2 kB in the result: 2 MB a token at this bound. The whole
vocabulary is -1."""
MOST_STOPS, LONGEST_STOP = 1_024, 4_096
"""Stop strings (bad words) and characters of one: all are looked for after every token."""
MOST_TOKENS = 2**31 - 1
"""The largest length that is taken: more than the context of any model, which cuts it."""
MOST_IDS = 2**20
"""Token ids in one list: more than any vocabulary has."""
MOST_BIASES = 2**22
"""Biased tokens times samples: every sample in flight keeps a table of 150 bytes an entry, 600 MB at this bound."""


def _biased_sequence(value: Any) -> tuple[tuple[int, ...], float]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != 2:
        raise Unfit("a list of pairs: token ids and the bias of the last of them")
    return _token_sequence(value[0]), _bias(value[1])


def _token_sequence(value: Any) -> tuple[int, ...]:
    tokens = several(_token, MOST_IDS, "token ids")(value)
    if not tokens:
        raise Unfit("a list of lists of at least one token id")
    return tokens


def _allowed(value: Any) -> tuple[int, ...]:
    tokens = several(_token, MOST_IDS, "token ids")(value)
    if not tokens:
        raise Unfit("None, or a list of at least one token id: nothing could be drawn from an empty one")
    return tuple(dict.fromkeys(tokens))


def _kept_tokens(value: Any) -> int:
    tokens = whole(-1, MOST_TOKENS)(value)
    if not tokens:
        raise Unfit("at least 1, or -1 for as many as the context leaves")
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
    "include_stop": "include_stop_str_in_output",
    **dict.fromkeys(("guided_decoding", "guided_json", "guided_regex", "guided_choice"), "structured_outputs"),
    **dict.fromkeys(("guided_grammar", "response_format", "json_schema"), "structured_outputs"),
}
"""What users of other libraries call a field, to be told its name here. Names that look alike may mean another one."""
NO_BEAMS = "there is no beam search; n and temperature give several answers"
UNAVAILABLE = {
    "logits_processors": "no code of the caller runs in a pass; logit_bias, bad_words, allowed_token_ids and "
    "sequence_bias change what may be drawn",
    "output_kind": "generate gives whole answers; stream(items, on_tokens) and add_request(on_text=) give text as it "
    "comes",
    "use_beam_search": NO_BEAMS,
    "length_penalty": NO_BEAMS,
    "early_stopping": NO_BEAMS,
    "spaces_between_special_tokens": "the tokenizer decides about these spaces; leave it out",
    "flat_logprobs": "log-probabilities are one dict for each token; leave it out",
    "extra_args": "there are no plug-ins that would read it; leave it out",
    "skip_reading_prefix_cache": "prompt_logprobs reads the whole prompt by itself; leave it out",
    "thinking_token_budget": "max_tokens counts thinking, too; leave it out",
}
"""Fields of vLLM's SamplingParams without a counterpart, and why."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(UNAVAILABLE, (None,)),
    "best_of": (None,),
    "guided_decoding": (None,),
    "logits_processors": (None, []),
    "extra_args": (None, {}),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1.0),
    "early_stopping": (None, False),
    "spaces_between_special_tokens": (None, True),
    "flat_logprobs": (None, False),
    "skip_reading_prefix_cache": (None, False),
}
"""Values of such fields that ask for what happens anyway: vLLM's defaults, which scripts spell out."""

_token = whole(0)
_bias = number(lambda bias: -1e30 <= bias <= 1e30 or bias == -inf, "between -1e30 and 1e30, or -inf to bar a token")
_penalty = number(lambda penalty: -2 <= penalty <= 2, "in [-2, 2]")
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
    "stop_token_ids": several(_token, MOST_IDS, "token ids"),
    "ignore_eos": truth,
    "seed": optional(whole()),
    "n": whole(1, MOST_SAMPLES),
    "logprobs": optional(whole(-1, MOST_LOGPROBS)),
    "prompt_logprobs": optional(whole(-1, MOST_LOGPROBS)),
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
    "bad_words": one_or_several(str, text(LONGEST_STOP), MOST_STOPS, "texts"),
    "allowed_token_ids": optional(_allowed),
    "include_stop_str_in_output": truth,
    "skip_special_tokens": truth,
    "detokenize": truth,
    "truncate_prompt_tokens": optional(_kept_tokens),
    "structured_outputs": optional(as_structured_outputs),
}


def with_meaning(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of SamplingParams without those of vLLM that ask for nothing."""
    return {name: value for name, value in keywords.items() if not is_one_of(value, NEUTRAL.get(name, ()))}


def taking_neutral(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that leaves out what `with_meaning` does."""

    @wraps(init)
    def wrapped(self: Any, *args: Any, **keywords: Any) -> None:
        init(self, *args, **(keywords if keywords.keys() <= CHECKS.keys() else with_meaning(keywords)))

    return wrapped
