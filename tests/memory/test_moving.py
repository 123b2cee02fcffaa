"""Weights that change their tiers: the same tensors from every placement to every other, within what both need."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.memory.loading import Loader
from flexbatch.memory.moving import most_while_moving, move_weights
from flexbatch.memory.weight_plan import plan_weights
from flexbatch.memory.weights import WeightStore
from flexbatch.policy.policy import TIERS, Split
from tests.memory.rigs import MIB, open_tiers, pieces, splits, tiny_arch
from tests.memory.test_weights import sweep


def weights_on(tiers):
    """Bytes by tier of the tensors alone."""
    return {
        pool.tier: sum(size for name, size in pool.used_bytes.items() if name.startswith("weights "))
        for pool in tiers.pools
    }


@settings(max_examples=8)
@given(first=splits(), second=splits(), bits=st.sampled_from([16, 8, 4]), tied=st.booleans(), slabs=st.integers(2, 3))
def test_a_move_changes_tiers_and_nothing_else(first, second, bits, tied, slabs):
    arch = tiny_arch(3, tied)
    before, after = plan_weights(arch, first, bits, 8, 4), plan_weights(arch, second, bits, 8, 4, num_slabs=slabs)
    most = most_while_moving(before, after)
    with tempfile.TemporaryDirectory() as folder, open_tiers(Path(folder), MIB, MIB) as (tiers, queues):
        store = WeightStore(before, tiers, queues, torch.float32)
        Loader(store, Path(folder) / "files", cache_quantized=False).load(
            lambda skip: (piece for piece in pieces(arch) if (piece.layer, piece.role) not in skip)
        )
        sweep(store, arch, bits, 2)
        for plan in (after, before):
            store.close_buffers()
            for pool in (tiers.gpu, tiers.cpu):
                needs = [p.tier_bytes(pool.tier) + (buffers(p) if pool.tier == "gpu" else 0) for p in (before, after)]
                pool.budget_bytes, pool.peak_bytes = max(most[pool.tier], *needs), pool.total_used_bytes
            moved = move_weights(store, plan)
            assert (moved > 0) == ([t.tier for t in before.all_tensors] != [t.tier for t in after.all_tensors])
            for tier in ("gpu", "cpu"):
                assert weights_on(tiers)[tier] == plan.tier_bytes(tier)
            on_disk = {(t.spec.layer, t.spec.role) for t in plan.all_tensors if t.tier == "disk"}
            assert store.files.keys() == on_disk
            assert all(name.split()[2] in {role for _, role in on_disk} for name in tiers.disk.used_bytes)
            sweep(store, arch, bits, 2)
            tiers.check()
        store.close()
        assert not any(weights_on(tiers)[tier] for tier in ("gpu", "cpu"))


def buffers(plan):
    """Of the gpu tier: slabs and dequantization."""
    return plan.num_slabs * plan.slab_bytes + sum(plan.dequantization_bytes(stage) for stage in ("pre", "post"))


@pytest.mark.parametrize("to", TIERS)
def test_a_move_that_fails_says_why_and_leaves_nothing(to, tmp_path, monkeypatch):
    """The store is closed then, and its bytes are free."""
    arch = tiny_arch(2)
    anywhere = {"gpu": Split(1, 0), "cpu": Split(0, 1), "disk": Split(0, 0, 1)}
    first = anywhere["cpu" if to != "cpu" else "gpu"]
    with open_tiers(tmp_path) as (tiers, queues):
        store = WeightStore(plan_weights(arch, first, 16, 8, 4), tiers, queues, torch.float32)
        Loader(store, None, cache_quantized=False).load(lambda skip: pieces(arch))
        monkeypatch.setattr("flexbatch.memory.moving.write_tensor", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            move_weights(store, plan_weights(arch, anywhere[to], 16, 8, 4))
        store.close()
        assert sum(weights_on(tiers).values()) == 0
