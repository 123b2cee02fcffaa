"""Which pages of a layer with a window are kept, and how many there have to be."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.policy.admission import cache_sizes, most_prompt_tokens
from flexbatch.policy.explain import explain, summary
from flexbatch.policy.footprint import peak_memory
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.layer_window import LayerWindow, passing_pages
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.plan import price
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.workload import Workload

WINDOWS = st.builds(LayerWindow, st.integers(1, 70), st.booleans())


def seen_from(window: LayerWindow, position: int) -> int:
    """The first key that a query sees, by the definition of the masks."""
    return position // window.tokens * window.tokens if window.chunked else max(0, position - window.tokens + 1)


@given(WINDOWS, st.integers(0, 500), st.integers(1, 90), st.sampled_from([4, 16]))
def test_what_is_kept_is_what_is_seen_and_less_than_a_step_more(window, start, queries, page):
    first = window.first_kept(start, page)
    assert first <= min(seen_from(window, position) for position in range(start, start + queries))
    assert seen_from(window, start) - first < window.step(page) and first % page == 0
    assert not window.chunked or first % window.tokens == 0
    assert -(-(start + queries) // page) - first // page <= window.pages(queries, page)


@pytest.mark.parametrize("tokens", [15, 16, 17, 31, 32, 33, 128])
def test_no_page_too_many_is_counted(tokens):
    """Somewhere in its page a first token needs all of them."""
    window = LayerWindow(tokens)
    for queries in (1, 2, 16, 17, 40):
        spans = [
            -(-(start + queries) // 16) - window.first_kept(start, 16) // 16 for start in range(tokens, tokens + 64)
        ]
        assert max(spans) == window.pages(queries, 16), (tokens, queries)


@given(st.integers(1, 80), st.integers(1, 12), st.integers(1, 200), st.randoms(use_true_random=False))
def test_chunks_of_a_pass_never_need_more_than_is_there_for_them(tokens, batch, budget, chance):
    window, policy = LayerWindow(tokens), policy_of(batch, 1, budget)
    left, beyond = most_prompt_tokens(policy), 0
    for _ in range(batch):
        chunk = min(left, chance.choice([1, 2, 3, 17, 18, 33, left]))
        left -= chunk
        start = chance.randint(0, 300)
        held = -(-(start + chunk) // 16) - window.first_kept(start, 16) // 16
        beyond += max(0, held - window.pages(1, 16))
    assert beyond <= passing_pages(policy, most_prompt_tokens(policy), 16)


def policy_of(batch: int, batches: int, budget: int, cache: Split | None = None) -> Policy:
    return Policy(
        Split(1, 0), cache or Split(0, 1), Split(1, 0), batch, batches, prefill_chunk=512, prefill_budget=budget
    )


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 300), st.integers(0, 30))
def test_pools_hold_what_sequences_may_hold(lengths, tokens, nodes):
    """Of any split, never more than whole contexts take, and none where these take no more."""
    longest, chance = sorted(lengths, reverse=True), random.Random(tokens)
    gpu = chance.choice([0, 0.3, 1])
    cpu = chance.choice([0, 1 - gpu])
    cache = Split(gpu, cpu, 1 - gpu - cpu)
    policy = policy_of(len(longest), 1, chance.choice([16, 200]), cache)
    sizes, window = cache_sizes(policy, longest, 16, nodes, LayerWindow(tokens)), LayerWindow(tokens)
    whole = [sizes.pages(tier) for tier in ("gpu", "cpu", "disk")]
    if sizes.windows is None:
        assert sizes.in_windows(7) == sizes.window_pages("gpu") == 0
        return
    ring = window.pages(1 + nodes, 16)
    assert sizes.windows.ring == ring < longest[0] and sizes.in_windows(10**6) == ring
    quota, pages = sizes.windows.quota, sizes.windows.pages
    assert all(quota[i] <= pages[i] <= whole[i] for i in range(3))
    assert sum(sizes.windows.pages) < sum(whole)
    assert all(sizes.windows.quota[i] >= min(longest[0], ring) for i in range(3) if whole[i])
    assert sizes.covers(sizes) and not sizes.covers(dataclasses.replace(sizes, windows=None))
    more = sizes.windows.with_more(1, 3, None)
    assert more.covers(sizes.windows) and not sizes.windows.covers(more) and more.pages[1] == sizes.windows.pages[1] + 3


SHAPE = ModelShape.from_sizes("half windows", 36, 2880, 64, 2880, 201088, num_kv_heads=8, head_dim=64)
HALF = dataclasses.replace(SHAPE, window=128, window_layers=18)


def test_a_plan_counts_what_is_kept_and_says_so():
    """512 and 128 tokens: 18 layers of 640 tokens, and 18 of 9 pages; beside a pass's chunks on the tier of the
    cache."""
    hardware, workload, policy = load_hardware("h200"), Workload.uniform(512, 128, 4000), policy_of(100, 4, 512)
    before, after = (peak_memory(shape, hardware, workload, policy)["cpu"]["cache"] for shape in (SHAPE, HALF))
    passing = 4 * ((512 + 100 * 14) // 16) * 16
    assert before == 400 * 640 * 36 * 2048
    assert after == (400 * (640 + 9 * 16) + passing) * 18 * 2048
    plan = price(HALF, hardware, workload, policy)
    whole = price(SHAPE, hardware, workload, policy)
    assert plan.passes == whole.passes
    assert plan.work["h2d"] < 0.75 * whole.work["h2d"], "pages of a window cross, not whole contexts"
    (line,) = [line for line in explain(plan).splitlines() if line.startswith("  windows")]
    assert "18 of 36 layers see 128 tokens" in line and "27.562 MiB of cache instead of 45.000 MiB" in line
    assert summary(plan)["windows"]["cache_bytes_per_token"] == 18 * (640 + 144) * 2048 / 640
    assert "windows  " not in explain(whole) and summary(whole)["windows"] is None


@pytest.mark.parametrize("window_layers", [18, 36])
def test_a_tier_with_a_part_of_the_block_has_pages_for_all_chunks(window_layers):
    """All that a pass reads may be on one tier."""
    hardware, workload = load_hardware("h200"), Workload.uniform(512, 128, 4000)
    shape = dataclasses.replace(SHAPE, window=128, window_layers=window_layers)
    policy = policy_of(100, 4, 512, Split(0.1, 0.9))
    peak = peak_memory(shape, hardware, workload, policy)
    sizes = cache_sizes(policy, [40] * 400, window=LayerWindow(128))
    for tier in ("gpu", "cpu"):
        exact = 16 * 2048 * ((36 - window_layers) * sizes.pages(tier) + window_layers * sizes.window_pages(tier))
        assert abs(peak[tier]["cache"] / exact - 1) < 0.06, (tier, peak[tier]["cache"], exact)
