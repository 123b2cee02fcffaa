"""The mutable side of a request: its output so far and its own random stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np

from flexbatch.execution.adjustments import Adjustments
from flexbatch.execution.constraints import Constraints
from flexbatch.request import Request, SamplingParams


def stream_key(request: Request, engine_seed: int) -> int:
    """64-bit key of the request's random stream.

    A seed in the sampling parameters stands alone, so that the same prompt with the same seed gives the same output
    wherever it is in the job; without one, the stream belongs to (engine seed, index of the request). The n samples
    of one prompt differ.
    """
    seed = request.params.seed
    entropy = (
        (1, _word(engine_seed), request.index, request.sample) if seed is None else (2, _word(seed), request.sample)
    )
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _word(seed: int) -> int:
    """SeedSequence takes no negative numbers; two's complement keeps -1 and 1 apart."""
    return seed % 2**64


class RequestState:
    """One request in flight: what it has generated, and what drawing its next token depends on besides the logits."""

    def __init__(self, request: Request, engine_seed: int = 0, eos_token_ids: Collection[int] = ()) -> None:
        params = request.params
        penalized = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
        self.request = request
        self.output_token_ids: list[int] = []
        self.key = stream_key(request, engine_seed)
        self.adjustments = Adjustments(request) if penalized or params.logit_bias else None
        self.constraints = Constraints(request, eos_token_ids) if params.constrained else None
        self.adjusted = self.adjustments is not None or self.constraints is not None
        """Whether anything changes the model's logits before a token is drawn."""
        self.unadjusted_greedy = params.greedy and not self.adjusted and params.logprobs is None

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    def append(self, token_id: int) -> None:
        """Commit one generated token."""
        self.output_token_ids.append(token_id)
        if self.adjustments is not None:
            self.adjustments.add(token_id)
        if self.constraints is not None:
            self.constraints.add(token_id)

    def check(self) -> None:
        """Raises AssertionError when the counts do not match the output, or there are more tokens than were asked
        for."""
        assert self.adjustments is None or self.adjustments.counts() == Counter(self.output_token_ids), (
            "token counts do not match the output"
        )
        text = [*self.request.prompt_token_ids, *self.output_token_ids]
        assert self.constraints is None or self.constraints.follows(text), "constraints do not follow the text"
        limit = self.params.max_tokens
        made = len(self.output_token_ids)
        assert limit is None or made <= limit, f"{made} tokens for max_tokens={limit}"
