"""Budgets and arenas: what is accounted for, and what an error says."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from flexbatch.memory.tiers import HostArena, MemoryRequirement, Pool, check_budgets
from flexbatch.policy.units import GIB
from flexbatch.validation.errors import DoesNotFitError

BUDGET = 10_000


class PoolMachine(RuleBasedStateMachine):
    """A pool against a dictionary."""

    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.model, self.count, self.peak = Pool("cpu", BUDGET), {}, 0, 0

    @rule(target=names, num_bytes=st.integers(0, 4000))
    def allocate(self, num_bytes: int) -> str:
        name, self.count = f"tensor {self.count}", self.count + 1
        if sum(self.model.values()) + num_bytes > BUDGET:
            with pytest.raises(DoesNotFitError):
                self.pool.allocate(name, num_bytes)
            return name
        tensor = self.pool.allocate(name, num_bytes)
        assert tensor.shape == (num_bytes,) and tensor.dtype == torch.uint8
        tensor.fill_(7)
        self.model[name] = num_bytes
        self.peak = max(self.peak, sum(self.model.values()))
        return name

    @rule(name=consumes(names))
    def free(self, name: str) -> None:
        self.pool.free(name)
        self.model.pop(name, None)

    @rule(num_bytes=st.integers(0, 4000))
    def reserve(self, num_bytes: int) -> None:
        if sum(self.model.values()) + num_bytes <= BUDGET:
            self.pool.reserve("reserved", num_bytes)
            self.model["reserved"] = self.model.get("reserved", 0) + num_bytes
            self.peak = max(self.peak, sum(self.model.values()))

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.used_bytes == self.model and self.pool.peak_bytes == self.peak

    def teardown(self) -> None:
        self.pool.close()
        self.pool.check()
        assert self.pool.total_used_bytes == 0 and not self.pool.arenas


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestPool = PoolMachine.TestCase


def test_a_name_is_allocated_once() -> None:
    pool = Pool("gpu", BUDGET)
    pool.allocate("weights", 10)
    with pytest.raises(AssertionError, match="weights is allocated on gpu already"):
        pool.allocate("weights", 10)


def test_the_error_of_a_budget_holds_the_numbers_and_the_remedy() -> None:
    needs = [
        MemoryRequirement("weights", "gpu", 3 * GIB),
        MemoryRequirement("cache", "gpu", GIB // 2),
        MemoryRequirement("weights", "cpu", GIB),
        MemoryRequirement("nothing", "cpu", 0),
    ]
    with pytest.raises(DoesNotFitError) as caught:
        check_budgets(needs, {"gpu": 2 * GIB, "cpu": 2 * GIB})
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()]
    assert lines[:8] == [
        "the plan does not fit the memory budgets",
        "GiB gpu cpu",
        "weights 3.000 1.000",
        "cache 0.500 -",
        "needed 3.500 1.000",
        "budget 2.000 2.000",
        "missing 1.500 -",
        "remedies:",
    ]
    assert lines[8] == "- raise --gpu-memory by 1.500 GiB" and "--cpu-memory" not in str(caught.value)


@given(
    st.lists(st.tuples(st.sampled_from(["gpu", "cpu", "disk"]), st.integers(0, 100)), max_size=8),
    st.tuples(*[st.integers(0, 150)] * 3),
)
def test_budgets_are_checked_to_the_byte(needs: list[tuple[str, int]], limits: tuple[int, int, int]) -> None:
    budgets = dict(zip(("gpu", "cpu", "disk"), limits, strict=True))
    short = [tier for tier, budget in budgets.items() if sum(size for name, size in needs if name == tier) > budget]
    try:
        check_budgets([MemoryRequirement("x", tier, size) for tier, size in needs], budgets)
    except DoesNotFitError as error:
        remedies = str(error).partition("remedies:")[2]
        told = {"gpu": "raise --gpu-memory by", "cpu": "raise --cpu-memory by", "disk": "on the disk of --offload-dir"}
        assert short and [tier for tier in budgets if told[tier] in remedies] == short
        assert "0.000" not in str(error)
    else:
        assert not short


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells of mappings in /proc")
def test_host_memory_is_private_and_stays_out_of_children() -> None:
    """Shared memory has no huge pages, and a page that a fork shares may move away under a transfer."""
    arena = HostArena(8 << 20, pinned=False)
    arena.tensor.fill_(1)
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    position = arena.tensor.data_ptr()
    block = next(
        block
        for block in blocks[1:]
        if int(block.split("-")[0], 16) <= position < int(block.split("-")[1].split()[0], 16)
    )
    assert block.split()[1] == "rw-p"
    flags = block.split("VmFlags:")[1].split("\n")[0].split()
    assert "dc" in flags and ("hg" in flags or not hasattr(mmap, "MADV_HUGEPAGE"))
