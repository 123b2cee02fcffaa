"""The block: all sequences in flight, each with its tier and its micro-batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from flexbatch.execution.answer_lengths import AnswerLengths
from flexbatch.execution.decoding import Decoding
from flexbatch.execution.promises import Promises, Reach, StagedPages
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.page_moves import restore
from flexbatch.memory.pages import PageTable
from flexbatch.policy import admission
from flexbatch.policy.balancer import TierBalancer
from flexbatch.policy.limits import LOOKAHEAD_TOKENS
from flexbatch.policy.policy import TIERS, Policy, Split


class Block:
    """``num_gpu_batches`` micro-batches of up to ``gpu_batch_size`` sequences.

    A sequence is admitted when a tier has pages for all the tokens that it is likely to reach, beside those that the
    others there are likely to take; it takes them as it grows. Its tier is chosen by error diffusion over the cache
    split, and it gets into the micro-batch with the fewest sequences of that tier, so that micro-batches are alike.
    """

    def __init__(self, policy: Policy, cache: KVCache, spare_tokens: int, lengths: AnswerLengths | None = None) -> None:
        """spare_tokens: token rows for drafted tokens in every sequence's cache. lengths: without them a sequence
        reserves all that it may reach."""
        self.policy, self.cache, self.spare_tokens = policy, cache, spare_tokens
        self.lengths = lengths or AnswerLengths(reserve="all")
        self.reserved: dict[int, int] = {}
        """Pages that each sequence which runs is likely to reach, by its id."""
        self.promises = Promises(cache.sizes)
        """Those of them that are not taken yet."""
        self.staged_pages, self.reach = StagedPages(policy.num_gpu_batches), Reach(cache.sizes)
        self.micro_batches: list[list[Sequence]] = [[] for _ in range(policy.num_gpu_batches)]
        self.of_tier = {tier: [0] * policy.num_gpu_batches for tier in TIERS}
        """Sequences of each micro-batch, by tier."""
        self.running: dict[int, Sequence] = {}
        """By sequence id."""
        self.decoding = Decoding(cache.layout.page_tokens)
        """Those of them that decode and are in its arrays."""
        self.others: dict[int, Sequence] = {}
        """The rest, by sequence id."""
        self.priorities = Counter[int]()  # of those that run
        self.tiers = TierBalancer(policy.cache)
        self.attention_tiers = TierBalancer(Split(1.0, 0.0))
        self.set_cpu_attention(policy.cpu_attention)

    def set_cpu_attention(self, share: float) -> None:
        """The share of the cpu tier's sequences that the CPU attends; it holds for those that come."""
        self.cpu_attention = share
        self.attention_tiers.split = Split(gpu=1 - share, cpu=share)

    @property
    def max_pages(self) -> int:
        """Pages that a sequence can have when nothing else runs."""
        return admission.largest_sequence(self.policy.cache, self.cache.sizes)

    def holds(self, sequence: Sequence) -> bool:
        """Whether there are pages for a sequence when nothing else runs."""
        return self.cache.layout.num_pages(self.max_rows(sequence)) <= self.max_pages

    def too_long(self, sequence: Sequence) -> str:
        need, page_tokens = self.cache.layout.num_pages(self.max_rows(sequence)), self.cache.layout.page_tokens
        return (
            f"{sequence.num_prompt_tokens} prompt and up to {sequence.output.max_tokens} generated tokens need "
            f"{need} cache pages of {page_tokens} tokens; "
            f"the largest tier has {self.max_pages}. Lower max_tokens, raise the budgets, or move the cache to a "
            "larger tier with --percent"
        )

    def max_rows(self, sequence: Sequence) -> int:
        """Token rows that it may need."""
        return sequence.max_cache_tokens + self.spare_tokens

    def pages_to_reserve(self, sequence: Sequence) -> int:
        """Pages that one which is about to run is likely to reach."""
        return self.pages_of(sequence, self.lengths.rows_of_one(sequence, len(self.running) + 1))

    def pages_of(self, sequence: Sequence, likely_rows: int) -> int:
        """For so many rows and a tree; of any sequence, for its next tokens, so that nobody steps aside at once for
        one that was admitted."""
        soon = len(sequence.token_ids) + LOOKAHEAD_TOKENS * (1 + self.spare_tokens)
        rows = min(self.max_rows(sequence), max(likely_rows, soon) + self.spare_tokens)
        return self.cache.layout.num_pages(rows)

    def estimate(self) -> None:
        """Reserve anew for all that run, by what is known now."""
        if not self.lengths.knows:
            return
        running = list(self.running.values())
        likely = self.lengths.rows_together(running)
        self.reserved = {
            each.sequence_id: self.pages_of(each, rows) for each, rows in zip(running, likely, strict=True)
        }
        self.promises.replace(self.pages_of_running())
        self.staged_pages.replace(self.pages_in_staging())

    def pages_of_running(self) -> list[tuple[str, int, int]]:
        """(tier, reserved pages, taken ones) of every sequence."""
        reserved = self.reserved
        return [(each.pages.tier, reserved[each.sequence_id], len(each.pages.pages)) for each in self.running.values()]

    def pages_in_staging(self) -> list[tuple[int, int, int]]:
        """(micro-batch, reserved pages, taken ones) of every sequence off the gpu tier."""
        away = [each for each in self.running.values() if each.pages.tier != "gpu"]
        return [(each.micro_batch, self.reserved[each.sequence_id], len(each.pages.pages)) for each in away]

    def promise(self, sequence: Sequence, sign: int = 1) -> None:
        """Count the pages that are reserved for a sequence and those that it has taken, or with -1 no more."""
        table, reserved = sequence.pages, self.reserved[sequence.sequence_id]
        self.promises.add(table.tier, reserved, len(table.pages), sign)
        if table.tier != "gpu":
            self.staged_pages.add(sequence.micro_batch, reserved, len(table.pages), sign)

    @property
    def allowed_tiers(self) -> list[str]:
        return admission.allowed_tiers(self.policy.cache)

    def choose_tier(self, sequence: Sequence, parked: Iterable[Sequence] = ()) -> str | None:
        """The tier of its cache; None while none has the pages and a micro-batch for it. parked: sequences that have
        stepped aside."""
        pages = self.pages_to_reserve(sequence)
        possible = [
            tier
            for tier in self.allowed_tiers
            if self.takes(sequence, tier)
            and self.has_pages(sequence, tier, pages)
            and self.open_micro_batches(pages, tier)
            and self.is_safe(sequence, tier, parked)
        ]
        return self.tiers.choose(1, possible) if possible else None

    def takes(self, sequence: Sequence, tier: str) -> bool:
        """Whether a tier has the pages for all that a sequence may reach, when nothing else runs."""
        sizes, pages = self.cache.sizes, self.cache.layout.num_pages(self.max_rows(sequence))
        return pages <= sizes.pages(tier) and (tier == "gpu" or pages <= sizes.staging_pages)

    def has_pages(self, sequence: Sequence, tier: str, pages: int) -> bool:
        """Whether a tier has so many pages for a sequence beside what is promised to others."""
        rows, table = pages * self.cache.layout.page_tokens, sequence.parked
        promised, in_windows = self.promises.pages[tier], self.promises.in_windows[tier]
        if table is None:
            return self.cache.can_open(tier, rows, self.shareable(sequence, tier), promised, in_windows)
        own = len(table.pages) if table.tier == tier else 0
        return self.cache.can_open(tier, rows, (), promised - own, in_windows - self.cache.sizes.in_windows(own))

    def is_safe(self, sequence: Sequence, tier: str, parked: Iterable[Sequence]) -> bool:
        """Whether every sequence can go on to its end once this one is admitted: always where tokens may be read
        anew. A quantized cache is only ever moved. So either nobody will have to, as every tier has pages for all
        that those on it may reach; or all tiers together have, and of the longest one more each: then one of them
        has the pages free that another lacks."""
        if not self.lengths.learns or self.cache.layout.bits == 16:
            return True
        others = [(each, each.parked.tier) for each in parked if each.parked is not None and each is not sequence]
        pools = {tier: pool.num_pages for tier, pool in self.cache.pools.items()}
        return self.reach.can_all_move([self.reached(*each) for each in [*others, (sequence, tier)]], pools)

    def reached(self, sequence: Sequence, tier: str) -> tuple[str, int]:
        """A tier, and the pages that a sequence may have there."""
        return tier, self.cache.layout.num_pages(self.max_rows(sequence))

    def open_micro_batches(self, pages: int, tier: str) -> list[int]:
        """Micro-batches with a free slot, and staging pages for all their sequences that are not on the gpu tier, one
        of so many pages among them."""
        staged = self.staged_pages.reserved
        batch_size, staging_pages = self.policy.gpu_batch_size, self.cache.sizes.staging_pages
        return admission.open_micro_batches(self.occupied, staged, tier, pages, batch_size, staging_pages)

    @property
    def occupied(self) -> list[int]:
        """Sequences of each micro-batch."""
        return [len(batch) for batch in self.micro_batches]

    def staged(self, micro_batch: int) -> list[Sequence]:
        """Those of a micro-batch whose pages go through staging."""
        return [each for each in self.micro_batches[micro_batch] if each.pages.tier != "gpu"]

    def shareable(self, sequence: Sequence, tier: str) -> list[int]:
        """Pages that already hold the beginning of the prompt, as far as its logits are not wanted."""
        if not sequence.shares_pages:
            return []
        prompt, params = sequence.request.prompt_token_ids, sequence.params
        # One token at least is its own to read, also of a prompt whose last one is not read.
        end = len(prompt) - sequence.num_uncomputed
        if params.prompt_logprobs is not None:
            end = min(end, params.prompt_logprobs_start)
        return self.cache.shareable(tier, prompt[:end], sequence.request.adapter)

    def admit(self, sequence: Sequence, tier: str) -> None:
        """Give a waiting sequence, or one that stepped aside, its pages and its micro-batch."""
        self.tiers.place(tier, 1)
        on_cpu = tier == "cpu" and self.cpu_attention > 0 and self.attention_tiers.choose(1) == "cpu"
        if tier == "cpu":
            self.attention_tiers.place("cpu" if on_cpu else "gpu", 1)
        prompt = sequence.request.prompt_token_ids
        # A page whose last token nobody reads is never ready: those that shared it would wait for ever.
        read = prompt[: len(prompt) - sequence.num_uncomputed] if sequence.shares_pages else ()
        pages = self.pages_to_reserve(sequence)
        micro_batch = admission.emptiest(self.open_micro_batches(pages, tier), self.of_tier[tier], self.occupied)
        if sequence.parked is None:
            shared = self.shareable(sequence, tier)
            known = len(sequence.token_ids) - sequence.num_uncomputed
            sequence.table = self.cache.open(tier, known, read, shared, on_cpu, sequence.request.adapter)
        else:
            sequence.table, sequence.parked = restore(self.cache, sequence.parked, tier, on_cpu), None
        sequence.micro_batch = micro_batch
        self.micro_batches[micro_batch].append(sequence)
        self.of_tier[tier][micro_batch] += 1
        self.running[sequence.sequence_id] = self.others[sequence.sequence_id] = sequence
        self.priorities[sequence.request.priority] += 1
        self.reserved[sequence.sequence_id] = pages
        self.promise(sequence)
        self.reach.add(*self.reached(sequence, tier))

    # Growth

    def rows_of_pass(self, sequence: Sequence) -> int:
        """Token rows that it needs for its next pass."""
        return min(self.max_rows(sequence), len(sequence.token_ids) + sequence.num_unread + self.spare_tokens)

    def short(self) -> list[Sequence]:
        """Those that need more pages for the next pass, the most urgent first, and then the oldest."""
        page_tokens = self.cache.layout.page_tokens
        # First what costs least to ask, as most have room in their last page.
        most = [each for each in self.others.values() if each.num_free(page_tokens) < self.spare_tokens]
        found = [each for each in most if self.rows_of_pass(each) > len(each.pages.pages) * page_tokens]
        return sorted(found + self.decoding.short(), key=lambda each: each.precedence)

    def all_can_grow(self) -> bool:
        """Whether tiers and staging have the pages of the next pass, so that nobody has to step aside."""
        cache, staged, missing = self.cache, [*self.staged_pages.taken], Promises(self.cache.sizes)
        for each in self.short():
            pages, taken = cache.layout.num_pages(self.rows_of_pass(each)), len(each.pages.pages)
            staged[each.micro_batch] += pages - taken if each.pages.tier != "gpu" else 0
            missing.add(each.pages.tier, pages, taken)
        fits = all(cache.has_room(tier, missing.pages[tier], missing.in_windows[tier]) for tier in TIERS)
        return fits and max(staged) <= cache.sizes.staging_pages

    def grow(self, sequence: Sequence) -> bool:
        """Take pages for the next pass; False where its tier has too few."""
        self.promise(sequence, -1)
        grown = self.cache.extend(sequence.pages, self.rows_of_pass(sequence))
        self.promise(sequence)
        self.decoding.grow(sequence)
        return grown

    def others_by_micro_batch(self) -> list[list[Sequence]]:
        """Those that are not in the arrays."""
        batches: list[list[Sequence]] = [[] for _ in self.micro_batches]
        for each in self.others.values():
            batches[each.micro_batch].append(each)
        return batches

    def let_in(self) -> None:
        """Let those that decode from now on into the arrays: not where they hold a window's pages, which change with
        every pass."""
        if self.cache.windows is not None:
            return
        for sequence in [each for each in self.others.values() if self.decoding.takes(each)]:
            del self.others[sequence.sequence_id]
            self.decoding.join(sequence)

    def overfull(self) -> int | None:
        """A micro-batch whose pages off the gpu tier exceed its staging."""
        most = self.cache.sizes.staging_pages
        return next((k for k, taken in enumerate(self.staged_pages.taken) if taken > most), None)

    def youngest(self, tier: str) -> Sequence:
        """The last to come of those that run on a tier, and of the least urgent."""
        return max(
            (each for each in self.running.values() if each.pages.tier == tier), key=lambda each: each.precedence
        )

    def last_behind(self, sequence: Sequence) -> Sequence | None:
        """The last to come of the least urgent that run, if they are less urgent than a sequence."""
        if max(self.priorities, default=sequence.request.priority) <= sequence.request.priority:
            return None
        return max(self.running.values(), key=lambda each: each.precedence)

    def release_slot(self, sequence: Sequence) -> PageTable:
        """Give back the slot of a running sequence; returns its pages, which are the caller's to release."""
        self.promise(sequence, -1)
        self.reach.add(*self.reached(sequence, sequence.pages.tier), sign=-1)
        del self.reserved[sequence.sequence_id]
        self.micro_batches[sequence.micro_batch].remove(sequence)
        self.of_tier[sequence.pages.tier][sequence.micro_batch] -= 1
        del self.running[sequence.sequence_id]
        self.priorities -= Counter([sequence.request.priority])
        self.others.pop(sequence.sequence_id, None)
        self.decoding.leave(sequence.sequence_id)
        self.tiers.remove(sequence.pages.tier, 1)
        if sequence.pages.tier == "cpu":
            self.attention_tiers.remove("cpu" if sequence.pages.cpu_attention else "gpu", 1)
        return sequence.pages
