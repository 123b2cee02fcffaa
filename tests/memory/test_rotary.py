"""Rotary tables: as long as the longest sequence, whatever the model's context is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch import LLM, SamplingParams
from flexbatch.memory.rotary import POSITION_STEP, Rotary, table_bytes
from flexbatch.memory.tiers import Pool
from flexbatch.models import rope
from flexbatch.models.arch import Arch
from flexbatch.models.checkpoint import read_arch
from flexbatch.validation.errors import DoesNotFitError
from tests.models.dense import rope_tables
from tests.tiny_models import make_model, random_prompts

CONTEXT = 2_000_000
PLACE: dict[str, Any] = {
    "percent": (100, 0, 100, 0, 100, 0),
    "gpu_batch_size": 3,
    "num_gpu_batches": 1,
    "device": "cpu",
    "cpu_memory": "64MiB",
}
GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "llama-dynamic", "gemma3", "opt"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp(request.param) / "model"
    make_model(request.param, made, max_position_embeddings=2048 if request.param == "opt" else CONTEXT)
    return made


def used(arch: Arch) -> int:
    return {"rope": 2 if arch.local_rope_theta is None else 4}.get(arch.position, 0) * (arch.rotary_dim // 2)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=4))
def test_tables_grow_and_never_shrink(folder: Path, lengths: list[int]) -> None:
    arch, pool = read_arch(folder), Pool("gpu", 64 << 20)
    rotary = Rotary(arch, lengths[0], torch.bfloat16, pool)
    for i, longest in enumerate(lengths):
        before = rotary.num_positions
        grew = rotary.grow_to(longest)
        rotary.check()
        assert grew == (rotary.num_positions > before) and min(longest, arch.max_positions) <= rotary.num_positions
        assert rotary.num_positions < max(lengths[: i + 1]) + POSITION_STEP
        assert (
            pool.total_used_bytes
            == table_bytes(arch, rotary.num_positions, torch.bfloat16)
            == used(arch) * rotary.num_positions * 2
        )
        whole = rope_tables(arch, dtype=torch.bfloat16, num_positions=rotary.num_positions)
        assert (rotary.tables is None) == (whole is None)
        if rotary.tables is not None and whole is not None:
            for name in ("cos", "sin", "local_cos", "local_sin"):
                assert torch.equal(getattr(rotary.tables, name), getattr(whole, name)), name
    rotary.close()
    assert pool.total_used_bytes == 0


def test_long_tables_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    arch = read_arch(folder)
    pieces = rope_tables(arch, num_positions=1000)
    monkeypatch.setattr(rope, "BUILT_POSITIONS", 7)
    small = rope_tables(arch, num_positions=1000)
    assert (pieces is None) == (small is None)
    if pieces is not None and small is not None:
        torch.testing.assert_close(small.cos, pieces.cos)
        torch.testing.assert_close(small.local_sin, pieces.local_sin)


def test_a_context_of_two_million_costs_nothing(folder: Path, tmp_path: Path) -> None:
    """And a longer request finds its positions: in the next job, and in a stream in the middle of one."""
    arch = read_arch(folder)
    short, long = random_prompts([5, 9, 30, 3, 8, 9] * 4, seed=1), random_prompts([600], seed=2)
    with LLM(str(folder), gpu_memory="64MiB", offload_dir=str(tmp_path), **PLACE) as llm:
        wanted = [[completion.token_ids for completion in llm.generate(prompts, GREEDY)] for prompts in (long, short)]
    with LLM(str(folder), gpu_memory="64MiB", offload_dir=str(tmp_path), **PLACE) as llm:
        assert [completion.token_ids for completion in llm.generate(short, GREEDY)] == wanted[1]
        assert llm.runner is not None
        rows = {row["what"]: row["num_bytes"] for row in llm.report()["memory"]}
        assert (
            rows.get("rotary tables", 0)
            == used(arch) * POSITION_STEP * 4
            == llm.tiers.gpu.used_bytes.get("rotary tables", 0)
        )
        prompts = [*short, *long, *short]
        found = dict(llm.stream((i, prompt, GREEDY) for i, prompt in enumerate(prompts)))
        assert [found[i].token_ids for i in range(len(prompts))] == [*wanted[1], *wanted[0], *wanted[1]]
        assert llm.runner.rotary.num_positions >= 604 and llm.runner.sizes.longest == 604
        assert {row["what"]: row["num_bytes"] for row in llm.report()["memory"]}.get("rotary tables", 0) == used(
            arch
        ) * 3 * POSITION_STEP * 4
        llm.runner.check()
        llm.tiers.check()
    if arch.position == "rope":
        pool = Pool("gpu", table_bytes(arch, 300, torch.float32) - 1)
        with pytest.raises(DoesNotFitError, match="rotary tables"):
            Rotary(arch, 300, torch.float32, pool)
