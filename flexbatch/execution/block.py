"""The block: all sequences in flight, each with its tier and its micro-batch."""

from __future__ import annotations

from flexbatch.execution.sequence import Sequence
from flexbatch.memory.kvcache import KVCache
from flexbatch.policy import admission
from flexbatch.policy.balancer import TierBalancer
from flexbatch.policy.policy import TIERS, Policy, Split


class Block:
    """``num_gpu_batches`` micro-batches of up to ``gpu_batch_size`` sequences.

    A sequence is admitted when a tier has pages for all the tokens that it may reach, so nothing is ever evicted. Its
    tier is chosen by error diffusion over the cache split, and it gets into the micro-batch with the fewest sequences
    of that tier, so that micro-batches are alike.
    """

    def __init__(self, policy: Policy, cache: KVCache, spare_tokens: int) -> None:
        """spare_tokens: token rows for drafted tokens in every sequence's cache."""
        self.policy, self.cache, self.spare_tokens = policy, cache, spare_tokens
        self.micro_batches: list[list[Sequence]] = [[] for _ in range(policy.num_gpu_batches)]
        self.running: dict[int, Sequence] = {}
        """By sequence id."""
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
        """Token rows to reserve."""
        return sequence.max_cache_tokens + self.spare_tokens

    @property
    def allowed_tiers(self) -> list[str]:
        return admission.allowed_tiers(self.policy.cache)

    def choose_tier(self, sequence: Sequence) -> str | None:
        """The tier of its cache; None while none has the pages and a micro-batch for it."""
        possible = [
            tier
            for tier in self.allowed_tiers
            if self.cache.can_open(tier, self.max_rows(sequence), self.shareable(sequence, tier))
            and self.open_micro_batches(sequence, tier)
        ]
        return self.tiers.choose(1, possible) if possible else None

    def open_micro_batches(self, sequence: Sequence, tier: str) -> list[int]:
        """Micro-batches with a free slot, and staging pages for all their sequences that are not on the gpu tier."""
        staged = [sum(len(s.pages.pages) for s in batch if s.pages.tier != "gpu") for batch in self.micro_batches]
        pages = self.cache.layout.num_pages(self.max_rows(sequence))
        batch_size, staging_pages = self.policy.gpu_batch_size, self.cache.sizes.staging_pages
        return admission.open_micro_batches(self.occupied, staged, tier, pages, batch_size, staging_pages)

    @property
    def occupied(self) -> list[int]:
        """Sequences of each micro-batch."""
        return [len(batch) for batch in self.micro_batches]

    def shareable(self, sequence: Sequence, tier: str) -> list[int]:
        """Pages that already hold the beginning of the prompt, as far as its logits are not wanted."""
        if not sequence.shares_pages:
            return []
        prompt, params = sequence.request.prompt_token_ids, sequence.params
        return self.cache.shareable(
            tier, prompt if params.prompt_logprobs is None else prompt[: params.prompt_logprobs_start]
        )

    def admit(self, sequence: Sequence, tier: str) -> None:
        """Give a waiting sequence its pages and its micro-batch."""
        self.tiers.place(tier, 1)
        on_cpu = tier == "cpu" and self.cpu_attention > 0 and self.attention_tiers.choose(1) == "cpu"
        if tier == "cpu":
            self.attention_tiers.place("cpu" if on_cpu else "gpu", 1)
        prompt = sequence.request.prompt_token_ids
        # A page whose last token nobody reads is never ready: those that shared it would wait for ever.
        read = prompt[: len(prompt) - sequence.num_uncomputed] if sequence.shares_pages else ()
        of_tier = [sum(s.pages.tier == tier for s in batch) for batch in self.micro_batches]
        micro_batch = admission.emptiest(self.open_micro_batches(sequence, tier), of_tier, self.occupied)
        sequence.table = self.cache.open(tier, self.max_rows(sequence), read, self.shareable(sequence, tier), on_cpu)
        sequence.micro_batch = micro_batch
        self.micro_batches[micro_batch].append(sequence)
        self.running[sequence.sequence_id] = sequence

    def release(self, sequence: Sequence) -> None:
        """Give back the slot and the pages of a running sequence."""
        self.micro_batches[sequence.micro_batch].remove(sequence)
        del self.running[sequence.sequence_id]
        self.tiers.remove(sequence.pages.tier, 1)
        if sequence.pages.tier == "cpu":
            self.attention_tiers.remove("cpu" if sequence.pages.cpu_attention else "gpu", 1)
        self.cache.free(sequence.pages)

    def check(self) -> None:
        """Invariants: slots, tiers and pages are counted right, every sequence is consistent. Only one block may use
        a cache at a time."""
        sequences = [sequence for batch in self.micro_batches for sequence in batch]
        assert len(sequences) <= self.policy.block_size
        assert {id(sequence) for sequence in sequences} == set(map(id, self.running.values()))
        for k, batch in enumerate(self.micro_batches):
            assert len(batch) <= self.policy.gpu_batch_size
            assert (
                sum(len(sequence.pages.pages) for sequence in batch if sequence.pages.tier != "gpu")
                <= self.cache.sizes.staging_pages
            )
            for sequence in batch:
                assert sequence.micro_batch == k and sequence.status == "running"
                sequence.check()
        for tier in TIERS:
            assert self.tiers.placed[tier] == sum(sequence.pages.tier == tier for sequence in sequences)
        on_cpu = [sequence.pages.cpu_attention for sequence in sequences if sequence.pages.tier == "cpu"]
        assert self.attention_tiers.placed == {"gpu": on_cpu.count(False), "cpu": on_cpu.count(True), "disk": 0}, (
            self.attention_tiers.placed
        )
        self.tiers.check()
        self.cache.check([sequence.pages for sequence in sequences])
