"""What is true of a block between passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from flexbatch.execution.block import Block
from flexbatch.memory.pages import PageTable
from flexbatch.policy.policy import TIERS


def check_block(block: Block, parked: Iterable[PageTable] = ()) -> None:
    """Invariants: slots, tiers and pages are counted right, every sequence is consistent. Only one block may use a
    cache at a time. parked: pages of sequences that have stepped aside."""
    policy, cache = block.policy, block.cache
    sequences = [sequence for batch in block.micro_batches for sequence in batch]
    assert len(sequences) <= policy.block_size
    assert {id(sequence) for sequence in sequences} == set(map(id, block.running.values()))
    for k, batch in enumerate(block.micro_batches):
        assert len(batch) <= policy.gpu_batch_size
        staged = sum(len(sequence.pages.pages) for sequence in batch if sequence.pages.tier != "gpu")
        assert staged <= cache.sizes.staging_pages
        for sequence in batch:
            assert sequence.micro_batch == k and sequence.status == "running"
            sequence.check()
    for tier in TIERS:
        counts = [sum(each.pages.tier == tier for each in batch) for batch in block.micro_batches]
        assert block.of_tier[tier] == counts and block.tiers.placed[tier] == sum(counts), (tier, counts)
    on_cpu = [sequence.pages.cpu_attention for sequence in sequences if sequence.pages.tier == "cpu"]
    placed = {"gpu": on_cpu.count(False), "cpu": on_cpu.count(True), "disk": 0}
    assert block.attention_tiers.placed == placed, (block.attention_tiers.placed, placed)
    assert block.priorities == Counter(sequence.request.priority for sequence in sequences), block.priorities
    for tier, pool in cache.pools.items():
        filling = {page for each in sequences if each.pages.tier == tier for page in each.pages.pages}
        assert pool.prefixes.keys.keys() - pool.prefixes.ready <= filling, "nobody fills what others may wait for"
    block.tiers.check()
    block.lengths.check()
    block.decoding.check()
    assert block.running.keys() == block.others.keys() | block.decoding.entries.keys()
    assert not block.others.keys() & block.decoding.entries.keys()
    assert block.reserved.keys() == block.running.keys()
    block.promises.check(block.pages_of_running())
    block.staged_pages.check(block.pages_in_staging())
    block.reach.check(block.reached(each, each.pages.tier) for each in sequences)
    cache.check([*(sequence.pages for sequence in sequences), *parked])
