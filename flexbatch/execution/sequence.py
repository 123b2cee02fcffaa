"""One request from its arrival to its completion: prompt, output, sampling state, text and page table in one place.

::

    waiting  --admit-->  running  --release-->  finished
                          ^   |
                          |   +--restart-----> waiting   (its prompt is read again, in pages of its own)
                          |   +--step aside--> aside     (an older one needs its pages)
                          +---come back----------+
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from flexbatch.execution.adjustments import Adjustments
from flexbatch.execution.constraints import TokenConstraints
from flexbatch.execution.masks import GrammarFollower
from flexbatch.execution.pass_batch import QueryTokens
from flexbatch.memory.pages import PageTable
from flexbatch.request import Request, SamplingParams, TokenLogprob
from flexbatch.text.decoder import TextDecoder
from flexbatch.text.detokenize import OutputText


def stream_key(request: Request, engine_seed: int) -> int:
    """Returns the 64-bit key of the request's random stream.

    A seed in the sampling parameters stands alone, so that the same prompt with the same seed gives the same output
    wherever it is in the job; without one, the stream belongs to (engine seed, number of the request among all that the
    engine has had, or in a job its index). The n samples of one prompt differ.
    """
    seed = request.params.seed
    number = request.index if request.number is None else request.number
    entropy = (1, _word(engine_seed), number, request.sample) if seed is None else (2, _word(seed), request.sample)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _word(seed: int) -> int:
    """SeedSequence takes no negative numbers; two's complement keeps -1 and 1 apart."""
    return seed % 2**64


@dataclass(frozen=True)
class Fault:
    """Why a sequence cannot go on. ``in_model``: the model's own logits are not finite, whatever was asked of them."""

    problem: str
    in_model: bool = True


class Sequence:
    """A request and all that belongs to it while it waits and runs. Sequences are compared by identity.

    Raises ValueError where the request cannot be followed: stop strings without a tokenizer, max_tokens=None without
    ``max_context``.
    """

    def __init__(
        self,
        request: Request,
        decoder: TextDecoder | None = None,
        *,
        engine_seed: int = 0,
        eos_token_ids: Collection[int] = (),
        max_context: int | None = None,
        sequence_id: int = 0,
        grammar: GrammarFollower | None = None,
    ) -> None:
        """decoder: of the model's tokenizer; None without one. max_context: tokens of prompt and output together, at
        most. sequence_id: by which passes name the sequence; larger than those of all that came before it. grammar:
        that the answer follows."""
        params = request.params
        self.request, self.sequence_id = request, sequence_id
        self.output = OutputText(
            decoder,
            params,
            eos_token_ids=eos_token_ids,
            prompt_token_ids=request.prompt_token_ids,
            max_context=max_context,
        )
        self.token_ids: list[int] = self.output.text_token_ids
        """Prompt and generated tokens; the output appends to this very list."""
        # Attributes, as they never change and are asked for several times a pass by every sequence.
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_uncomputed = int(self.output.max_tokens == 0 and self.num_prompt_tokens > 1)
        """1 for a prompt that is only scored: its last token is predicted, and what follows it is not asked for. It
        may stand past the context's end."""
        self.stream_key = stream_key(request, engine_seed)
        self.grammar = grammar
        self.wish(params, eos_token_ids)
        self.logprobs: list[dict[int, TokenLogprob]] = []
        self.prompt_logprobs: list[dict[int, TokenLogprob] | None] = []
        self.table: PageTable | None = None
        """Its pages while it runs."""
        self.parked: PageTable | None = None
        """The pages that it left where they are not in its way, once it has stepped aside; None where it reads its
        tokens anew."""
        self.micro_batch = 0
        """Which micro-batch it belongs to while it runs."""
        self.num_unread = 0
        """1 where its newest token is drawn, and the host has not read it: the next pass runs meanwhile."""
        self.shares_pages = True
        self.drafted = True
        """Whether anything may be drafted for it."""
        self.fault: Fault | None = None
        """Why it cannot go on. It stays until its prompt is read: others may wait for the pages that they share with
        it."""
        self.error = ""
        """Why it failed; empty unless it is finished and did."""
        self.finished = False
        self.precedence = request.priority, sequence_id
        """Smaller than that of those who make way for it: it is more urgent, or as urgent and came before."""

    def wish(self, params: SamplingParams, eos_token_ids: Collection[int]) -> None:
        """Note what is asked for beside tokens: it never changes, and every pass asks every sequence for it."""
        penalized = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
        self.adjustments = Adjustments(self.request) if penalized or params.logit_bias else None
        self.constraints = TokenConstraints(params, self.token_ids, eos_token_ids) if params.constrained else None
        self.adjusted = self.adjustments is not None or self.constraints is not None or self.grammar is not None
        """Whether anything changes the model's logits before a token is drawn."""
        as_they_are = not self.adjusted and params.logprobs is None
        self.plain = as_they_are and not self.output.searches
        """Whether nothing but its length and its last tokens decides when it ends, and nothing else looks at these."""
        self.unadjusted_greedy = as_they_are and params.greedy
        self.scores_prompt = params.prompt_logprobs is not None
        self.largest_only = self.unadjusted_greedy and not self.scores_prompt
        """Whether nothing but the largest of its logits is wanted."""

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def next_scored(self) -> int:
        """The first prompt token whose log-probability is wanted and not there yet."""
        return self.params.prompt_logprobs_start + len(self.prompt_logprobs)

    @property
    def status(self) -> str:
        """``waiting`` (also after it has stepped aside), ``running`` or ``finished``."""
        return "finished" if self.finished else "waiting" if self.table is None else "running"

    @property
    def pages(self) -> PageTable:
        """The page table of a running sequence."""
        assert self.table is not None, "a sequence that does not run has no pages"
        return self.table

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_cache_tokens(self) -> int:
        """Token rows it may need: the last token that it generates needs none, nor does one that is not read."""
        return self.num_prompt_tokens - self.num_uncomputed + max(0, self.output.max_tokens - 1)

    @property
    def num_cached(self) -> int:
        """Leading tokens whose keys and values are in the cache."""
        return 0 if self.table is None else self.table.num_tokens

    def num_free(self, page_tokens: int) -> int:
        """Token rows that its pages have beyond its tokens; negative where they have too few."""
        return len(self.pages.pages) * page_tokens - len(self.token_ids) - self.num_unread

    @property
    def num_uncached(self) -> int:
        """Tokens that still have to be read."""
        return len(self.token_ids) + self.num_unread - self.num_uncomputed - self.num_cached

    @property
    def surely_ends(self) -> bool:
        """Whether the tokens that were drawn, whatever they are, are all that were asked for."""
        ended = self.output.finish is not None or self.num_output_tokens + self.num_unread >= self.output.max_tokens
        return ended and self.prompt_is_read

    @property
    def prompt_is_read(self) -> bool:
        return self.num_cached >= self.num_prompt_tokens - self.num_uncomputed

    @property
    def fault_may_be_of_others(self) -> bool:
        """Whether its fault may come from the sequence that filled the pages that it shares: attention multiplies
        masked values by 0, which leaves NaN, so that a token of that one after them makes NaN of them too."""
        return (
            self.fault is not None and self.fault.in_model and self.pages.num_shared > 0 and not self.num_output_tokens
        )

    @property
    def needs_host(self) -> bool:
        """Whether the host has to know its newest token before the next pass is composed: what a grammar leaves no
        choice about is brought with it."""
        return self.grammar is not None

    def is_decoded_by(self, query: QueryTokens) -> bool:
        """Whether a pass with this query draws a token: it holds the newest one, and the output has not ended."""
        newest = query.parents is not None or query.start + query.num_tokens == len(self.token_ids)
        return newest and self.output.finish is None

    def extend(self, token_ids: Collection[int]) -> int:
        """Append generated tokens up to the end of the output, and those after them that a grammar leaves no choice
        about; returns how many of ``token_ids`` were kept."""
        if self.grammar is None:
            kept = self.output.extend(token_ids)
            self.catch_up(kept)
            return kept
        before = self.num_output_tokens
        kept = self._follow(token_ids, self.grammar)
        # What has a log-probability is read in a pass of its own, and so is what other constraints may bar.
        if self.params.logprobs is None and self.constraints is None:
            while self.output.finish is None and (forced := self.grammar.forced()):
                self._follow(forced, self.grammar)
        self.catch_up(self.num_output_tokens - before)
        if self.grammar.problem and self.fault is None:
            self.fault = Fault(f"structured_outputs: {self.grammar.problem}", in_model=False)
        return kept

    def take_plain(self, token_id: int) -> bool:
        """`extend` by one token, where that is all that is to be done with it; else False, and nothing is."""
        text, output = self.token_ids, self.output
        ends = token_id in output.end_token_ids or len(text) + 1 >= self.num_prompt_tokens + output.max_tokens
        if ends or not self.plain or output.finish is not None or self.fault is not None:
            return False
        text.append(token_id)
        self.num_unread = 0
        return True

    def _follow(self, token_ids: Collection[int], grammar: GrammarFollower) -> int:
        """Append tokens up to the end of the output, which is also where the grammar has nothing more."""
        before = self.num_output_tokens
        for token_id in token_ids:
            if self.output.finish is not None:
                break
            self.output.append(token_id)
            grammar.advance(token_id)
            if grammar.complete:
                self.output.complete()
        return self.num_output_tokens - before

    def catch_up(self, count: int) -> None:
        """Let what depends on the output take in its last ``count`` tokens."""
        if self.adjustments is not None:
            for token_id in self.token_ids[len(self.token_ids) - count :]:
                self.adjustments.add(token_id)
        if self.constraints is not None:
            self.constraints.catch_up()

    def restart(self) -> None:
        """Wait again, to read the prompt in pages of its own: nothing was generated, and what was scored is not to be
        trusted."""
        self.table, self.parked, self.fault, self.prompt_logprobs = None, None, None, []
        self.shares_pages, self.drafted, self.num_unread = False, True, 0

    def check(self) -> None:
        """Invariants: the cache never holds more than the tokens, what depends on the output has seen all of it, and
        there are no more tokens than were asked for."""
        assert self.token_ids is self.output.text_token_ids
        assert self.table is None or self.parked is None
        assert self.num_unread in (0, 1), self.num_unread
        assert self.num_cached <= len(self.token_ids), (self.num_cached, len(self.token_ids))
        assert self.token_ids[: self.num_prompt_tokens] == list(self.request.prompt_token_ids)
        generated = self.token_ids[self.num_prompt_tokens :]
        assert self.adjustments is None or self.adjustments.counts() == Counter(generated), (
            "token counts do not match the output"
        )
        if self.constraints is not None:
            self.constraints.check()
        if self.grammar is not None:
            self.grammar.check(len(generated))
        limit = self.params.max_tokens
        assert limit is None or len(generated) <= limit, f"{len(generated)} tokens for max_tokens={limit}"
        self.output.check()
