"""Layers with a window keep only their window: the tokens are those of layers that keep everything, and of
transformers, on every tier and for every place of a window in its pages; and the pages are as many as were counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.execution.scheduler import Scheduler
from flexbatch.policy.limits import PAGE_TOKENS
from tests.engine import test_stepping_aside
from tests.tiny_models import greedy_tokens, make_model, random_prompts

PLACES: dict[str, dict[str, Any]] = {
    "gpu": {"percent": (100, 0, 100, 0, 100, 0)},
    "cpu": {"percent": (100, 0, 0, 100, 100, 0)},
    "cpu attention": {"percent": (100, 0, 0, 100, 100, 0), "cpu_attention": 1.0},
    "disk": {"percent": (100, 0, 0, 0, 100, 0)},
    "mixed": {"percent": (100, 0, 30, 40, 50, 20), "cpu_attention": 0.5},
}
SETTINGS: dict[str, Any] = {
    "gpu_batch_size": 3, "num_gpu_batches": 2, "prefill_chunk": 23, "device": "cpu", "dtype": "float32",
    "hardware": "cpu", "gpu_memory": "1GiB", "cpu_memory": "1GiB",
}  # fmt: skip
forced = test_stepping_aside.forced
FAMILIES = ("mistral", "gemma2", "gemma3", "gpt_oss", "phi3", "qwen2-window", "llama4_text")
LENGTHS = [1, 33, 90, 16, 111, 64, 7]
NEW_TOKENS = 28
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """(family, window) -> a folder and its model."""
    made: dict[Any, tuple[Path, Any]] = {}

    def folder(family: str, window: int, **more: Any) -> tuple[Path, Any]:
        key = (family, window, repr(more))
        if key not in made:
            name = "attention_chunk_size" if family == "llama4_text" else "sliding_window"
            path = tmp_path_factory.mktemp(family) / "model"
            made[key] = path, make_model(family, path, **{name: window, **more})
        return made[key]

    return folder


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Everything is checked before and after each pass; gives the most pages that these layers had on each tier."""
    next_pass, commit, peaks = Scheduler.next_pass, Scheduler.commit, [0, 0, 0]

    def composed(scheduler: Scheduler) -> Any:
        scheduler.check()
        return next_pass(scheduler)

    def committed(scheduler: Scheduler, *arguments: Any) -> None:
        commit(scheduler, *arguments)
        scheduler.check()
        if scheduler.cache.windows is not None:
            assert all(len(each.pages.windows) <= scheduler.cache.ring for each in scheduler.running.values())
            peaks[:] = [pool.peak for pool in scheduler.cache.windows.by_tier.values()]

    monkeypatch.setattr(Scheduler, "next_pass", composed)
    monkeypatch.setattr(Scheduler, "commit", committed)
    yield peaks


def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexbatch.policy.admission.window_sizes", lambda *arguments: None)


def run(folder: Path, tmp_path: Path, prompts: Any, params: Any = GREEDY, **settings: Any) -> Any:
    """(tokens, report, sizes of the cache)."""
    with LLM(str(folder), **{**SETTINGS, **settings}, offload_dir=str(tmp_path)) as llm:
        found = llm.generate(prompts, params)
        assert llm.runner is not None
        llm.runner.check()
        llm.tiers.check()
        return [each.token_ids for each in found], llm.report(), llm.runner.sizes.cache


QUICK = [("gemma3", "cpu attention"), ("gpt_oss", "disk")]


@pytest.mark.parametrize(
    ("family", "place"),
    [
        pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow)
        for cell in itertools.product(FAMILIES, PLACES)
    ],
)
def test_tokens_are_those_of_transformers(family, place, folders, tmp_path, checked):
    folder, model = folders(family, 24 if family == "llama4_text" else 19)
    prompts = random_prompts(LENGTHS, seed=len(family))
    # Chunks of 24 tokens are kept 48 at a time: a pass that brings more pages as well would keep all there are.
    more = {"prefill_chunk": 7} if family == "llama4_text" else {}
    tokens, _, sizes = run(folder, tmp_path, prompts, **PLACES[place], **more)
    assert sizes.windows is not None and sum(checked) > 0
    assert tokens == [greedy_tokens(model, prompt, NEW_TOKENS, eos_token_id=None) for prompt in prompts]


def alignments() -> list[tuple[int, int]]:
    """(window, chunk): around whole pages, and chunks around pages and windows, longer than either too."""
    windows = [k * PAGE_TOKENS + more for k in (1, 2) for more in (-1, 0, 1)]
    around = {(window, chunk) for window in windows for chunk in (15, 16, 17, window - 1, window + 1, 80)}
    return [(1, 5), *sorted(around)]


def cells() -> list[Any]:
    """Three run by default; with ``-m slow`` every window and chunk at every place, bits and trees by turns; with
    ``-m whole`` the rest, which is nine tenths."""
    found = []
    axes = (16, 4, 8), ("", "<2,2,1>", "chain:5"), PLACES, alignments()
    for i, cell in enumerate(itertools.product(*map(enumerate, axes))):
        (bits_at, bits), (tree_at, tree), (place_at, place), (pair_at, pair) = cell
        turn = (bits_at, tree_at) == ((pair_at + place_at) % 3, (pair_at + pair_at // 3 + 2 * place_at) % 3)
        mark = () if i in (37, 401, 1011) else pytest.mark.slow if turn else pytest.mark.whole
        found.append(pytest.param(*pair, place, bits, tree, marks=mark))
    return found


@pytest.mark.parametrize(("window", "chunk", "place", "bits", "tree"), cells())
def test_tokens_are_those_of_full_pages(window, chunk, place, bits, tree, folders, tmp_path, checked, monkeypatch):
    """Windows at every place in a page; chunks that are longer than a window; trees whose nodes are rejected."""
    family = ("gemma3", "mistral", "gpt_oss")[window % 3]
    folder, _ = folders(family, window)
    prompts = random_prompts(LENGTHS, seed=window)
    prompts = [prompt + prompt[-9:] + prompt[-4:] for prompt in prompts]
    settings = {**PLACES[place], "prefill_chunk": chunk, "prefill_budget": chunk, "cache_bits": bits}
    settings |= {"overlap": window % 2 == 0} | (
        {"draft": (str(folders("mistral", 19, seed=5)[0]),), "tree": tree} if tree else {}
    )
    kept, report, sizes = run(folder, tmp_path / "kept", prompts, **settings)
    assert sizes.windows is not None and sum(checked) > 0
    if tree:
        assert report["speculation"]["drafted_tokens"] > report["speculation"]["accepted_tokens"]
    keep_everything(monkeypatch)
    whole, _, sizes = run(folder, tmp_path / "whole", prompts, **settings)
    assert sizes.windows is None
    assert kept == whole


def bytes_of_cache(report: Any) -> int:
    return sum(row["num_bytes"] for row in report["memory"] if row["what"] == "cache")


@pytest.mark.parametrize(
    ("family", "place"), [("mistral", "cpu"), pytest.param("gemma3", "gpu", marks=pytest.mark.slow)]
)
def test_memory_falls_as_counted(family, place, folders, tmp_path, checked, monkeypatch):
    """Six sequences of 10 pages, of which layers with a window of 19 hold 3 between passes; and those of the chunks of
    16 tokens that two micro-batches read at the same time."""
    folder, model = folders(family, 19)
    short, layers = {"mistral": 3, "gemma3": 2}[family], model.config.num_hidden_layers
    prompts = random_prompts([121] * 9, seed=3)
    settings = {**PLACES[place], "prefill_chunk": 16, "prefill_budget": 16}
    kept, report, sizes = run(folder, tmp_path / "kept", prompts, **settings)
    passing = 2 * ((16 + 3 * (PAGE_TOKENS - 2)) // PAGE_TOKENS)
    tier = ("gpu", "cpu").index(place)
    assert sizes.windows is not None and sizes.windows.ring == 3
    assert sizes.windows.quota[tier] == 6 * 3 and sizes.windows.pages[tier] == 6 * 3 + passing
    assert 6 * 2 <= checked[tier] <= 6 * 3 + 2
    page = sizes.pages(place), bytes_of_cache(report) / ((layers - short) * 60 + short * (18 + passing))
    assert page == (60, 4 * 2 * 2 * 12 * PAGE_TOKENS)
    found = report["cache"]
    assert (found["window_layers"], found["window_tokens"], found["sequence_tokens"]) == (short, 19, 160)
    assert found["bytes_per_token"] == 192 * ((layers - short) * 10 + short * 3) / 10
    assert f"{short} layers keep 19 tokens" in str(report)
    keep_everything(monkeypatch)
    whole, report, _ = run(folder, tmp_path / "whole", prompts, **settings)
    assert bytes_of_cache(report) == layers * 60 * page[1] and kept == whole


def prefilled(folder: Path, tmp_path: Path, prompts: Any, **settings: Any) -> tuple[Any, int]:
    tokens, report, _ = run(folder, tmp_path, prompts, **settings)
    return tokens, report["prefilled_tokens"]


@pytest.mark.parametrize(
    "place", ["gpu", pytest.param("disk", marks=pytest.mark.slow), pytest.param("mixed", marks=pytest.mark.slow)]
)
def test_prefixes_longer_than_the_window_are_shared(place, folders, tmp_path, checked, monkeypatch):
    """What is seen of a header is held beside its pages: it is read once on each tier, as with full pages, also by
    those that come long after it was read."""
    folder, _ = folders("gemma3", 19)
    (header,) = random_prompts([100], seed=1)
    prompts = [header + end for end in random_prompts([1 + i % 9 for i in range(14)], seed=2)]
    settings = {**PLACES[place], "prefill_chunk": 33, "prefill_budget": 40}
    kept, read = prefilled(folder, tmp_path / "kept", prompts, **settings)
    assert sum(checked) > 0
    tiers = 3 if place == "mixed" else 1
    assert read == 96 * tiers + sum(len(prompt) - 96 for prompt in prompts)
    keep_everything(monkeypatch)
    assert prefilled(folder, tmp_path / "whole", prompts, **settings) == (kept, read)


def test_a_prefix_whose_window_is_gone_is_read_anew(folders, tmp_path, checked, monkeypatch):
    """Other prompts have taken the pages beside a header; whoever comes next reads it again, and those after share it
    once more."""
    folder, _ = folders("mistral", 19)
    (header,) = random_prompts([100], seed=1)
    ends = random_prompts([5] * 12, seed=2)
    others = random_prompts([140] * 12, seed=3)
    prompts = [header + ends[0], *others, *(header + end for end in ends[1:])]
    settings = {"gpu_batch_size": 2, "num_gpu_batches": 1, "prefill_chunk": 17, "prefill_budget": 17}
    kept, read = prefilled(folder, tmp_path / "kept", prompts, **settings)
    keep_everything(monkeypatch)
    monkeypatch.setattr("flexbatch.memory.kvcache.KVCache.shareable", lambda *arguments: [])
    whole, unshared = prefilled(folder, tmp_path / "whole", prompts, **settings)
    assert kept == whole
    assert 96 + 140 * 12 + 12 * 9 < read < unshared - 5 * 96


def test_a_prompt_whose_own_pages_drive_it_out_of_the_index(folders, tmp_path, checked):
    """A second run finds the beginning of a long prompt in the index, of which it may share nothing since what its
    windows saw is gone, and takes those very pages for itself."""
    folder, _ = folders("gemma3", 19, max_position_embeddings=2048)
    prompts = random_prompts([700, 5, 900], seed=3)
    settings = {**SETTINGS, "gpu_batch_size": 5, "num_gpu_batches": 1, "prefill_chunk": 16, **PLACES["gpu"]}
    with LLM(str(folder), **settings, offload_dir=str(tmp_path)) as llm:
        once, again = ([each.token_ids for each in llm.generate(prompts, GREEDY)] for _ in range(2))
        assert once == again


@pytest.mark.parametrize(
    ("place", "bits"), [("mixed", 16), *(pytest.param(*row, marks=pytest.mark.slow) for row in
    [("gpu", 16), ("disk", 16), ("cpu attention", 16), ("mixed", 4), ("gpu", 4), ("disk", 8)])]
)  # fmt: skip
def test_sequences_that_step_aside(place, bits, folders, tmp_path, checked, forced):
    """Pages of both kinds are moved, kept or dropped, and come back."""
    folder, _ = folders("gpt_oss", 19)
    prompts = random_prompts([40, 90, 33, 70, 101, 17, 55, 64, 80, 21], seed=4)
    settings = {**PLACES[place], "cache_bits": bits, "prefill_budget": 30}
    wanted, _, _ = run(folder, tmp_path / "all", prompts, reserve="all", **settings)
    with LLM(str(folder), **{**SETTINGS, **settings}, offload_dir=str(tmp_path / "aside")) as llm:
        test_stepping_aside.teach(llm)
        found = [each.token_ids for each in llm.generate(prompts, GREEDY)]
        assert llm.runner is not None and llm.runner.sizes.cache.windows is not None
        llm.runner.check()
        assert llm.report()["preemptions"]["total"] > 5
    assert found == wanted
