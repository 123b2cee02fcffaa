"""The cache over the tiers, driven as a pass drives it: every sequence finds its own rows again, wherever they live
and however late they arrive."""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flexbatch.execution.input_builder import InputBuilder
from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.execution.pass_batch import QueryTokens
from flexbatch.memory.handles import READY, FutureHandle
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.page_moves import keep_paths, park, restore
from flexbatch.memory.pages import CacheLayout, Gather, PageTable
from flexbatch.memory.transfer import ThreadQueue
from flexbatch.memory.uploads import Uploads
from flexbatch.policy.admission import CacheSizes
from flexbatch.policy.layer_window import LayerWindow, WindowSizes
from tests.memory.rigs import dawdle, open_tiers

LAYERS, PAGE_TOKENS, MAX_NODES = 2, 4, 5
SIZES = CacheSizes(
    gpu_pages=10,
    cpu_pages=10,
    disk_pages=10,
    staging_pages=40,
    disk_sequences=3,
    tail_tokens=2 * PAGE_TOKENS + MAX_NODES,
)


WINDOW = LayerWindow(5)
WINDOWS = WindowSizes(ring=WINDOW.pages(1 + MAX_NODES, PAGE_TOKENS), quota=(8, 8, 8), pages=(10, 10, 10), staging=40)
"""A pass may bring all of a text at once: no fewer pages than the other layers have are always enough."""


def layout_of(bits: int) -> CacheLayout:
    return CacheLayout(LAYERS, 2, 6, bits, 64, PAGE_TOKENS, torch.float32)


@dataclass(eq=False)
class Text:
    """A sequence in the model: its prompt, its table, its capacity and the rows [layers, tokens, token_bytes] that it
    must find."""

    prompt: tuple[int, ...]
    table: PageTable
    capacity: int
    rows: torch.Tensor

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)


class CacheMachine(RuleBasedStateMachine):
    """Rows are random bytes but for prompts, whose rows follow from the prompt's beginning, so that a shared page
    holds what its sharers would write."""

    bits = 16
    window: LayerWindow | None = None
    window_layers: tuple[bool, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.context = open_tiers(Path(self.folder.name))
        self.tiers, self.queues = self.context.__enter__()
        dawdle(self.queues, 0, 0.006)
        self.layout = replace(layout_of(self.bits), window=self.window, window_layers=self.window_layers)
        sizes = replace(SIZES, windows=WINDOWS if self.window else None)
        self.cache = KVCache(self.layout, sizes, self.tiers, self.queues)
        self.builder = InputBuilder(PAGE_TOKENS, Uploads(self.tiers.cpu, self.queues))
        self.texts: list[Text] = []
        self.generator = torch.Generator().manual_seed(0)

    def text_of(self, query: QueryTokens) -> Text:
        return next(text for text in self.texts if id(text) == query.sequence_id)

    def new_rows(self, text: Text, start: int, count: int) -> torch.Tensor:
        """[layers, count, token_bytes] uint8."""
        rows = torch.randint(
            0, 256, (LAYERS, count, self.layout.token_bytes), generator=self.generator, dtype=torch.uint8
        )
        for i in range(count):
            if start + i < text.num_prompt_tokens:
                rows[:, i] = hash(text.prompt[: start + i + 1]) % 251
        return rows

    @rule(
        tier=st.sampled_from(["gpu", "cpu", "disk"]),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=10).map(tuple),
        more=st.integers(0, 8),
    )
    def open(self, tier: str, prompt: tuple[int, ...], more: int) -> None:
        capacity = len(prompt) + more
        shared = self.cache.shareable(tier, prompt)
        if not self.cache.can_open(tier, capacity + MAX_NODES, shared):
            return
        table = self.cache.open(tier, len(prompt), prompt, shared)
        text = Text(prompt, table, capacity, torch.empty(0))
        text.rows = self.new_rows(text, 0, table.num_tokens)
        self.texts.append(text)

    @precondition(lambda self: self.texts)
    @rule(chance=st.randoms(use_true_random=False))
    def run_pass(self, chance: Any) -> None:
        queries = []
        for text in [text for text in self.texts if text.table.waits and self.cache.prefix_ready(text.table)]:
            if not self.cache.attach_prefix(text.table):
                self.texts.remove(text)
                self.cache.free(text.table)
        for text in self.texts:
            start = text.table.num_tokens
            left = text.capacity - start
            if text.table.parked or not self.cache.prefix_ready(text.table) or left == 0 or chance.random() < 0.2:
                continue
            count = chance.randint(1, left)
            if not self.cache.extend(text.table, start + max(count, 1 + MAX_NODES)):
                continue
            parents = None
            if start >= text.num_prompt_tokens and chance.random() < 0.7:
                nodes = chance.randint(1, MAX_NODES)
                parents = (-1, *(chance.randrange(i) for i in range(1, nodes + 1)))
                count = len(parents)
            self.cache.hold(text.table, start + (count if count > 1 and parents is None else 1 + MAX_NODES))
            queries.append(
                QueryTokens(id(text), (0,) * count, start, count, text.table.location, text.num_prompt_tokens, parents)
            )
        if queries:
            self.sweep(queries, chance)

    def sweep(self, queries: list[Any], chance: Any) -> None:
        """What the executor does with the cache in one pass of one micro-batch."""
        inputs = self.builder.build(queries)
        self.cache.begin_pass(READY)
        fresh = {query: self.new_rows(self.text_of(query), query.start, query.num_tokens) for query in inputs.queries}
        handle = self.gather(inputs, 0)
        for layer in range(LAYERS):
            following = self.gather(inputs, layer + 1) if layer + 1 < LAYERS else READY
            new = torch.cat([fresh[query][layer] for query in inputs.queries])
            self.compute(inputs, layer, handle, new)
            handle = following
        self.commit(inputs.queries, fresh, chance)

    def gather(self, inputs: MicroBatchInputs, layer: int) -> Any:
        staged = inputs.groups(self.cache.windowed[layer]).staged
        return READY if staged is None else self.cache.gather(staged.gather, layer, layer % 2)

    def compute(self, inputs: MicroBatchInputs, layer: int, gathered: Any, new: torch.Tensor) -> None:
        """Look for the rows that are in the cache, and write the new ones [num_tokens, token_bytes]."""
        groups = inputs.groups(self.cache.windowed[layer])
        if groups.gpu is not None:
            group = groups.gpu
            rows = self.as_bytes(self.cache.rows("gpu", layer))
            self.look(group, rows, [q for q in inputs.queries if q.pages.tier == "gpu"], layer)
            rows[group.slots] = new[group.start : group.end]
        if groups.staged is not None:
            staged, group = groups.staged, groups.staged.attention
            gathered.wait()
            rows = self.as_bytes(self.cache.staging_rows(layer % 2))
            self.look(group, rows, [q for q in inputs.queries if q.pages.tier != "gpu"], layer)
            leaving = self.layout.row_view(new[group.start : group.end].clone().view(-1))
            if staged.num_cpu_tokens:
                # Some by the transfer queue, and some by what computes.
                self.cache.few_bytes = (layer + len(self.texts)) % 2 * leaving.nbytes
                self.cache.drain_cpu(layer, leaving[: staged.num_cpu_tokens], staged.cpu_slots)
            if staged.disk_pages:
                self.cache.drain_disk(layer, leaving[staged.num_cpu_tokens :], staged.disk_pages, READY)
            self.cache.release_staging(layer % 2, READY)

    def as_bytes(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(len(rows), -1).view(torch.uint8)

    def look(self, group: Any, rows: torch.Tensor, queries: list[Any], layer: int) -> None:
        for table, query in zip(group.page_table, queries, strict=True):
            first = PAGE_TOKENS * query.pages.of(self.cache.windowed[layer]).first
            seen = (
                query.start - WINDOW.tokens + 1 if self.window is WINDOW else query.start // PAGE_TOKENS * PAGE_TOKENS
            )
            assert first == 0 or (self.window and first <= seen), (first, query.start)
            slots = (table.long()[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()[: query.start - first]
            assert torch.equal(rows[slots], self.text_of(query).rows[layer, first : query.start]), (
                query.pages.tier,
                layer,
            )

    def commit(self, queries: tuple[Any, ...], fresh: dict[Any, torch.Tensor], chance: Any) -> None:
        """Accept a random path of every tree."""
        accepted = []
        for query in queries:
            text, rows = self.text_of(query), fresh[query]
            kept = range(query.num_tokens)
            if query.parents is not None:
                path, position = [], 0
                while (
                    below := [i for i, parent in enumerate(query.parents) if parent == position]
                ) and chance.random() < 0.8:
                    position = chance.choice(below)
                    path.append(position)
                path = path[: max(0, text.capacity - query.start - 1)]
                accepted.append((text.table, query.start + 1, [query.start + position for position in path]))
                kept = (0, *path)
            text.rows = torch.cat([text.rows, rows[:, list(kept)]], dim=1)
        keep_paths(self.cache, accepted)
        for query in queries:
            self.cache.commit(self.text_of(query).table, self.text_of(query).rows.shape[1])

    @precondition(lambda self: any(text.table.num_tokens >= text.num_prompt_tokens for text in self.texts))
    @rule(tier=st.sampled_from(["gpu", "cpu", "disk"]), chance=st.randoms(use_true_random=False))
    def step_aside(self, tier: str, chance: Any) -> None:
        """Pages of one that has stepped aside may move on."""
        text = chance.choice([text for text in self.texts if text.table.num_tokens >= text.num_prompt_tokens])
        pages = len(text.table.pages)
        if text.table.tier == tier or self.cache.has_room(tier, pages, self.cache.sizes.in_windows(pages)):
            text.table = park(self.cache, text.table, tier)

    @precondition(lambda self: any(text.table.parked for text in self.texts))
    @rule(tier=st.sampled_from(["gpu", "cpu", "disk"]), chance=st.randoms(use_true_random=False))
    def come_back(self, tier: str, chance: Any) -> None:
        text = chance.choice([text for text in self.texts if text.table.parked])
        tail = tier != "disk" or self.cache.disk.free_tails
        if tail and (text.table.tier == tier or self.cache.can_open(tier, text.table.num_tokens)):
            text.table = restore(self.cache, text.table, tier)

    @precondition(lambda self: any(text.table.num_tokens >= text.num_prompt_tokens for text in self.texts))
    @rule(chance=st.randoms(use_true_random=False))
    def free(self, chance: Any) -> None:
        text = chance.choice([text for text in self.texts if text.table.num_tokens >= text.num_prompt_tokens])
        self.texts.remove(text)
        self.cache.free(text.table)

    @invariant()
    def holds(self) -> None:
        self.cache.check([text.table for text in self.texts])
        self.tiers.check()
        self.queues.check()

    def teardown(self) -> None:
        for text in self.texts:
            self.cache.free(text.table)
        self.cache.check([])
        self.cache.close()
        assert not any(self.tiers.gpu.used_bytes.values()) and not self.tiers.disk.used_bytes
        self.context.__exit__(None, None, None)
        self.folder.cleanup()


class QuantizedCacheMachine(CacheMachine):
    bits = 4


class WindowedCacheMachine(CacheMachine):
    """One layer of two keeps only its window."""

    window = WINDOW
    window_layers = (False, True)


class AllWindowedCacheMachine(CacheMachine):
    bits = 4
    window = LayerWindow(4, chunked=True)
    window_layers = (True, True)


CacheMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
QuantizedCacheMachine.TestCase.settings = settings(max_examples=8, stateful_step_count=15, deadline=None)
WindowedCacheMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
AllWindowedCacheMachine.TestCase.settings = settings(max_examples=8, stateful_step_count=20, deadline=None)
TestCache = CacheMachine.TestCase
TestWindowedCache = WindowedCacheMachine.TestCase
TestAllWindowedCache = AllWindowedCacheMachine.TestCase
TestQuantizedCache = QuantizedCacheMachine.TestCase


@pytest.mark.parametrize("late", ["cpu", "disk", "cpu before disk"])
def test_pages_are_gathered_once_their_rows_are_home(tmp_path: Path, late: str) -> None:
    """The rows of the last pass are still on their way when the next pass begins."""
    layout, gate = layout_of(16), threading.Event()
    rows = {tier: torch.randn(PAGE_TOKENS, 2, 2, 6) for tier in ("cpu", "disk")}
    with open_tiers(tmp_path) as (tiers, queues):
        cache = KVCache(layout, SIZES, tiers, queues)
        tables = {tier: cache.open(tier, PAGE_TOKENS) for tier in ("cpu", "disk")}
        queue = queues.disk_write if late == "disk" else queues.d2h
        queue.submit(lambda: gate.wait(10))
        cache.begin_pass(READY)
        if late != "disk":
            cache.drain_cpu(0, rows["cpu"], torch.tensor(tables["cpu"].location.slots(0, PAGE_TOKENS, PAGE_TOKENS)))
        if late != "cpu":
            cache.drain_disk(0, rows["disk"], [(tables["disk"].location, 0, PAGE_TOKENS, 0)], READY)
        for table in tables.values():
            cache.commit(table, PAGE_TOKENS)
        cache.begin_pass(READY)
        on_disk = late == "disk"
        pages = torch.tensor([] if on_disk else tables["cpu"].pages, dtype=torch.int32)
        gathered = cache.gather(
            Gather(pages, ((tables["disk"].location, PAGE_TOKENS),) if on_disk else (), int(on_disk)), 0, 0
        )
        assert isinstance(gathered, FutureHandle)
        time.sleep(0.03)
        assert not gathered.future.done(), "gathered before the rows were there"
        gate.set()
        gathered.wait()
        assert torch.equal(cache.staging_rows(0)[:PAGE_TOKENS], rows["disk" if on_disk else "cpu"])
        cache.close()


def test_few_rows_come_to_lie_over_many_of_the_pass_before(tmp_path: Path) -> None:
    """A sequence ends with its prompt, and another one takes its pages while its rows are still on their way there."""
    many, few = torch.randn(2, PAGE_TOKENS, 2, 2, 6).unbind(0)
    with open_tiers(tmp_path) as (tiers, queues):
        cache, gate = KVCache(layout_of(16), SIZES, tiers, queues), threading.Event()
        table = cache.open("cpu", PAGE_TOKENS)
        slots = torch.tensor(table.location.slots(0, PAGE_TOKENS, PAGE_TOKENS))
        cache.begin_pass(READY)
        queues.d2h.submit(gate.wait)
        cache.drain_cpu(0, many, slots)
        cache.begin_pass(READY)
        cache.few_bytes = few.nbytes
        threading.Timer(0.05, gate.set).start()
        cache.drain_cpu(0, few, slots)
        cache.synchronize()
        assert torch.equal(cache.rows("cpu", 0)[slots], few)
        cache.close()


@pytest.mark.parametrize(("few", "by_queue"), [(0, True), (1, False)])
def test_few_rows_go_home_with_what_computes_and_are_counted(tmp_path: Path, few: int, by_queue: bool) -> None:
    rows = torch.randn(PAGE_TOKENS, 2, 2, 6)
    with open_tiers(tmp_path) as (tiers, queues):
        cache = KVCache(layout_of(16), SIZES, tiers, queues)
        assert cache.few_bytes == 0, "on a CPU there is no stream that computes"
        cache.few_bytes = few * rows.nbytes
        table = cache.open("cpu", PAGE_TOKENS)
        slots = torch.tensor(table.location.slots(0, PAGE_TOKENS, PAGE_TOKENS))
        assert isinstance(queues.d2h, ThreadQueue) and queues.d2h.num_submitted == 0
        cache.begin_pass(READY)
        cache.drain_cpu(0, rows, slots)
        assert queues.d2h.num_submitted == by_queue
        cache.synchronize()
        assert torch.equal(cache.rows("cpu", 0)[slots], rows) and queues.moved_bytes()["d2h"] == rows.nbytes
        cache.close()


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_rows_of_a_sequence_that_sat_out_a_pass_are_waited_for(tmp_path: Path, tier: str) -> None:
    """A prompt that is left out of a pass: what it drained in the pass before may still be under way when the pass
    after reads it."""
    rows = torch.randn(PAGE_TOKENS, 2, 2, 6)
    with open_tiers(tmp_path) as (tiers, queues):
        cache = KVCache(layout_of(16), SIZES, tiers, queues)
        table = cache.open(tier, PAGE_TOKENS)
        (queues.disk_write if tier == "disk" else queues.d2h).submit(lambda: time.sleep(0.2))
        cache.begin_pass(READY)
        if tier == "cpu":
            cache.drain_cpu(0, rows, torch.tensor(table.location.slots(0, PAGE_TOKENS, PAGE_TOKENS)))
        else:
            cache.drain_disk(0, rows, [(table.location, 0, PAGE_TOKENS, 0)], READY)
        cache.commit(table, PAGE_TOKENS)
        cache.begin_pass(READY)
        cache.begin_pass(READY)
        pages = torch.tensor(table.pages if tier == "cpu" else [], dtype=torch.int32)
        cache.gather(
            Gather(pages, ((table.location, PAGE_TOKENS),) if tier == "disk" else (), int(tier == "disk")), 0, 0
        ).wait()
        assert torch.equal(cache.staging_rows(0)[:PAGE_TOKENS], rows)
        cache.free(table)
        cache.close()
