"""Composes passes: admits sequences, gives them pages, cuts prompts, chooses query tokens, releases what is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from flexbatch.execution import queries
from flexbatch.execution.answer_lengths import AnswerLengths
from flexbatch.execution.aside import Aside
from flexbatch.execution.block import Block
from flexbatch.execution.block_check import check_block
from flexbatch.execution.pass_batch import NOTHING_DECODED, DecodedTokens, PassBatch, QueryTokens
from flexbatch.execution.plain_tokens import take_decoded
from flexbatch.execution.proposals import Proposer
from flexbatch.execution.sampler import SampledTokens
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.pages import PageTable
from flexbatch.policy.policy import Policy
from flexbatch.policy.rounds import Rounds
from flexbatch.policy.step_aside import StepAsideCosts


class Scheduler:
    """Keeps a `Block` full and decides what every pass runs.

    A request that is longer than the block was made for is refused where ``refusal`` says why no block can hold it
    (without it, always). Else nothing is admitted any more; once the rest has run, it stands first among the
    ``waiting``, for a larger block.

    Where a tier has no pages left for those that grow, the youngest on it step aside; for a more urgent request, the
    youngest of the less urgent do. They come back before anybody new who is not more urgent. Of those that run the
    oldest of the most urgent always goes on, so that every sequence comes to its end.
    """

    def __init__(
        self,
        policy: Policy,
        cache: KVCache,
        arrivals: Iterator[Sequence | None],
        micro_batch_tokens: int,
        proposer: Proposer | None = None,
        refusal: Callable[[Sequence], str] | None = None,
        reach: Callable[[int], bool | None] | None = None,
        lengths: AnswerLengths | None = None,
        costs: StepAsideCosts | None = None,
        left: Iterable[Sequence] = (),
        overtakes: Callable[[Sequence], bool] = lambda first: False,
    ) -> None:
        """arrivals: waiting sequences, pulled as there is capacity; None where nobody waits now, though more may come.
        lengths: of answers; without them all that a sequence may reach is reserved. left: sequences that another block
        has left; they come before all arrivals but those for which ``overtakes``, given the first in line, is true."""
        self.policy, self.cache, self.arrivals, self.proposer = policy, cache, arrivals, proposer
        self.lengths = lengths or AnswerLengths(reserve="all")
        self.block = Block(policy, cache, 0 if proposer is None else proposer.max_nodes, self.lengths)
        self.aside = Aside(cache, costs or StepAsideCosts(), self.block.promises, self.begin_anew)
        self.refusal = refusal or self.block.too_long
        self.overtakes, self.reach = overtakes, reach
        """Whether the runner takes a sequence of so many tokens, for which it may grow; None: once no pass is run."""
        self.micro_batch_tokens = micro_batch_tokens
        self.prefill_chunk, self.prefill_budget = policy.prefill_chunk, policy.prompt_tokens_per_micro_batch
        self.admission_limit = policy.block_size
        """Sequences in flight, at most."""
        self.rounds = Rounds(policy.admission_passes)
        self.waiting: deque[Sequence] = deque(left)
        self.finished: list[Sequence] = []
        self.outgrown = False
        self.advanced: dict[int, Sequence] | None = None
        """The sequences of a pass that counts as done while nobody has read its tokens, by id."""
        self.settled, self.parts, self.reaching = True, 1, False
        """Whether nothing is in flight, so that sequences may step aside; the passes in which all run once; whether one
        waits for the runner to grow, once nothing is in flight."""

    @property
    def running(self) -> dict[int, Sequence]:
        """The sequences in flight by their ids."""
        return self.block.running

    # Admission

    @property
    def num_sequences(self) -> int:
        return len(self.block.running)

    @property
    def is_full(self) -> bool:
        return self.num_sequences >= self.admission_limit

    @property
    def started(self) -> list[Sequence]:
        """The sequences in flight, and those that have stepped aside."""
        return [*self.running.values(), *self.aside.sequences]

    def has_work(self) -> bool:
        """Whether there is anything to run; admits what fits, where it is time for a round."""
        running, self.reaching = self.num_sequences, False
        if not self.rounds.waits(running) or self.aside.sequences or self.displaces:
            self.admit()
            if self.waiting and self.num_sequences > running:
                self.rounds.filled(self.num_sequences)
        return self.num_sequences > 0

    @property
    def displaces(self) -> bool:
        """Whether the next in line is more urgent than one that runs, which may have to step aside for it."""
        return (first := self.peek()) is not None and self.block.last_behind(first) is not None

    def peek(self) -> Sequence | None:
        """The next sequence in line; None where nobody waits at present."""
        ahead = not self.waiting or self.overtakes(self.waiting[0])
        if ahead and (sequence := next(self.arrivals, None)) is not None:
            self.waiting.appendleft(sequence)
        return self.waiting[0] if self.waiting else None

    def admit(self) -> None:
        """Fill the free slots of the block: first with those that have stepped aside, then in the order of arrival."""
        # A new estimate is for whoever comes, and is made of all that run.
        if not self.is_full and (self.aside.sequences or (not self.outgrown and self.peek() is not None)):
            self.lengths.update(self.started)
            self.block.estimate()
        self.take_back()
        while not self.outgrown and (sequence := self.peek()) is not None and self.aside.lets_pass(sequence):
            if self.is_full and self.block.last_behind(sequence) is None:
                return
            held = self.block.holds(sequence) and (self.reach is None or self.reach(sequence.max_cache_tokens))
            if held is None:
                self.reaching = True
                return
            if not held:
                if not (problem := self.refusal(sequence)):
                    self.outgrown = True
                    return
                self.finish(self.waiting.popleft(), problem)
                continue
            if (tier := self.tier_for(sequence)) is None:
                assert self.num_sequences, "nothing runs and the next request finds no pages: pages are lost"
                return
            self.block.admit(self.waiting.popleft(), tier)

    def tier_for(self, sequence: Sequence) -> str | None:
        """The tier of a new sequence, for which the less urgent may step aside; None: it finds no slot or no pages."""
        while (full := self.is_full) or (tier := self.block.choose_tier(sequence, self.aside.sequences)) is None:
            last = self.block.last_behind(sequence) if self.settled and self.aside.recomputes else None
            if last is not None:
                self.step_aside(last, in_place=full)
            elif self.num_sequences or not self.aside.reclaim_any(self.block.allowed_tiers):
                return None
        return tier

    def take_back(self) -> None:
        """Let those that have stepped aside run again, the oldest first."""
        aside = self.aside.sequences
        while aside and not self.is_full:
            tier = self.block.choose_tier(aside[0], aside)
            if tier is not None:
                self.block.admit(aside.pop(0), tier)
            elif self.num_sequences or not self.aside.reclaim_any(self.block.allowed_tiers, aside[0]):
                # Where nothing runs, what the others have left stands in the way of the first.
                assert self.num_sequences, "nothing runs and the first to come back finds no pages: pages are lost"
                return

    # Passes

    def next_pass(self, part: int = 0, parts: int = 1) -> PassBatch:
        """The query tokens of one of so many parts of the block: a token or a token tree of every sequence that
        decodes, and chunks of prompts as far as a micro-batch's budget goes."""
        block, tokens = self.block, (self.micro_batch_tokens, self.prefill_budget, self.prefill_chunk)
        for sequence in queries.without_prefix(block.others.values(), self.cache):
            if sequence.sequence_id in self.running:
                self.step_aside(sequence)
        self.give_pages()
        chosen = range(part, len(block.micro_batches), parts)
        self.rounds.now += 1
        return queries.composed_pass(block, queries.PassLimits(*tokens, block.spare_tokens), self.proposer, chosen)

    def give_pages(self) -> None:
        """Let every sequence take the pages of its next tokens, the oldest first."""
        for sequence in (short := self.block.short()):
            while sequence.sequence_id in self.running and not self.block.grow(sequence):
                if not self.aside.reclaim(sequence.pages.tier):
                    self.step_aside(self.block.youngest(sequence.pages.tier))
        while short and (overfull := self.block.overfull()) is not None:
            self.step_aside(max(self.block.staged(overfull), key=lambda each: each.precedence), in_place=True)

    def step_aside(self, sequence: Sequence, in_place: bool = False, drop: bool = False) -> None:
        """Take a sequence out of the block; it comes back as soon as there are pages for it. See `Aside.add`."""
        self.aside.add(sequence, self.release_slot(sequence), in_place, drop)

    def withdraw(self) -> list[Sequence]:
        """Everything that has not finished, in the order of arrival, to go on in another block."""
        for sequence in list(self.running.values()):
            if sequence.sequence_id in self.running:
                self.step_aside(sequence, drop=True)
        return [*self.aside.empty(), *self.waiting]

    def begin_anew(self, tier: str, pages: set[int]) -> None:
        """Those that share pages which will not be filled have read nothing yet: they wait to be admitted anew."""
        for sequence in list(self.running.values()) if pages else ():  # of which one may take others along
            if (table := sequence.table) and table.tier == tier and pages.intersection(table.pages[: table.num_shared]):
                self.step_aside(sequence)

    # What a pass gave

    def advance(self, batch: PassBatch) -> bool:
        """Count a pass that runs as done, before its tokens are read: its rows are in the cache, and what it draws are
        tokens, of which some bring their sequences to max_tokens. `commit` then takes in the tokens alone. Returns
        whether the next pass can be composed: not where somebody would have to step aside for it.
        """
        self.settled, running = False, self.running
        self.advanced = {id: running[id] for id in batch.sequence_ids if id in running}
        ending = self.block.decoding.advance(batch.decoding)
        for query in (each for each in batch.others if each.sequence_id in self.advanced):
            sequence, end = self.advanced[query.sequence_id], query.start + query.num_tokens
            sequence.num_unread = int(end == len(sequence.token_ids) and sequence.output.finish is None)
            self.cache.commit(sequence.pages, end)
            ending += [sequence] * sequence.surely_ends
        for sequence in ending:
            self.release(sequence)
        return self.has_work() and self.block.all_can_grow()

    def commit(
        self, batch: PassBatch, sampled: Mapping[int, SampledTokens], decoded: DecodedTokens = NOTHING_DECODED
    ) -> None:
        """Append what was sampled (by sequence id, or as arrays), keep the accepted paths of trees in the cache, and
        release sequences that are done. What has left since the pass was composed is left out."""
        advanced, self.advanced, self.settled = self.advanced, None, True
        sequences = dict(self.running) if advanced is None else advanced
        cache, observed = self.cache if advanced is None else None, self.proposer is not None
        taken, others = take_decoded(self.block.decoding, decoded, batch, sequences, cache, observed)
        committed = [query for query in queries.left_over(batch, taken) if query.sequence_id in sequences]
        queries.keep_accepted(self.cache, committed, sequences, sampled := {**sampled, **others})
        if self.proposer is not None:
            ids = [query.sequence_id for query in committed]
            self.proposer.observe({id: sampled[id] for id in ids if id in sampled and sampled[id].token_ids})
        for query in committed:
            sequence, result = sequences[query.sequence_id], sampled.get(query.sequence_id) or SampledTokens()
            self.commit_one(query, sequence, result, cached=advanced is not None)
            self.block.decoding.refresh(sequence)

    def commit_one(self, query: QueryTokens, sequence: Sequence, result: SampledTokens, cached: bool) -> None:
        """cached: its rows are counted already."""
        sequence.num_unread = 0
        if query.parents is not None and result.fault is not None:
            # Plain decoding need not come to it. The output may end before, by a stop string, say, or because the form
            # is complete and all that could follow is barred. And attention multiplies masked values by 0, which
            # leaves NaN: a drafted token that plain decoding never reads may have done this.
            sequence.drafted = False
            return
        kept = result.append_to(sequence)
        if not cached:
            # Of a tree, the rows of its root and of the kept part of its path; the token after the path has none yet.
            count = query.num_tokens if query.parents is None else min(1 + len(result.path), kept)
            self.cache.commit(sequence.pages, query.start + count)
        if (sequence.output.finish is not None or sequence.fault is not None) and sequence.prompt_is_read:
            if sequence.sequence_id in self.running:
                self.release(sequence)
            if sequence.fault_may_be_of_others:  # it reads its prompt once more, next, in pages of its own
                sequence.restart()
                self.waiting.appendleft(sequence)
            else:
                self.finish(sequence, "" if sequence.fault is None else sequence.fault.problem)

    # The end of a sequence

    def finish(self, sequence: Sequence, error: str = "") -> None:
        sequence.error, sequence.finished = error, True
        self.finished.append(sequence)
        self.lengths.observe(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give back the slot and the pages of a running sequence."""
        self.aside.free(self.release_slot(sequence))

    def release_slot(self, sequence: Sequence) -> PageTable:
        """Give back the slot of a running sequence; returns its pages."""
        if self.proposer is not None:
            self.proposer.release(sequence)
        return self.block.release_slot(sequence)

    def take_finished(self) -> list[Sequence]:
        finished, self.finished = self.finished, []
        return finished

    def abort(self, wanted: Callable[[Sequence], bool] = lambda sequence: True) -> None:
        """Give back the pages of the sequences in flight that are ``wanted``, and let those that wait go."""
        for sequence in [each for each in self.running.values() if wanted(each)]:
            # Another one that goes may have been what it waited for.
            if sequence.sequence_id in self.running:
                self.release(sequence)
        self.aside.remove(wanted)
        self.waiting = deque(sequence for sequence in self.waiting if not wanted(sequence))

    def check(self) -> None:
        """Invariants: every sequence is where it should be, and the block consistent."""
        assert not (lost := {x.sequence_id for x in self.started if x.num_unread} - (self.advanced or {}).keys()), lost
        assert all(sequence.status == "waiting" for sequence in self.waiting)
        assert all(sequence.status == "finished" for sequence in self.finished)
        self.aside.check()
        check_block(self.block, [each.parked for each in self.aside.sequences if each.parked is not None])
