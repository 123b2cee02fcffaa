"""Weights on their way: each layer computes with its own weights, however late they come, and no slab is overwritten
while it is read."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexbatch.kernels import ops, reference
from flexbatch.kernels.coded_matrix import CodedMatrix
from flexbatch.memory import files
from flexbatch.memory.files import DiskFile
from flexbatch.memory.handles import READY
from flexbatch.memory.loading import Loader
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weight_plan import plan_weights
from flexbatch.memory.weights import WeightStore
from flexbatch.models.arch import Arch
from flexbatch.policy.policy import Split
from flexbatch.policy.schedule import zigzag
from tests.memory.rigs import dawdle, open_tiers, pieces, splits, tiny_arch

MIXED = Split(0.3, 0.3, 0.4)


@contextmanager
def open_store(
    arch: Arch,
    split: Split,
    bits: int = 16,
    late: float = 0.0,
    staged: bool = False,
    group: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[WeightStore, TransferQueues]]:
    with tempfile.TemporaryDirectory() as folder, open_tiers(Path(folder)) as (tiers, queues):
        plan = plan_weights(arch, split, bits, group, dtype.itemsize)
        store = WeightStore(plan, tiers, queues, dtype, staged)
        loader = Loader(store, Path(folder) / "files", cache_quantized=False)
        loader.load(lambda skip: (piece for piece in pieces(arch) if (piece.layer, piece.role) not in skip))
        loader.check()
        store.check()
        if late:
            dawdle(queues, 1, late)
        try:
            yield store, queues
            store.check()
        finally:
            store.close()


def expected(arch: Arch, bits: int) -> dict[int, dict[str, torch.Tensor]]:
    """Layer -> role -> tensor as `WeightStore.weights` should give it."""
    found: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in range(-1, arch.num_layers + 1)}
    for piece in pieces(arch):
        tensor = piece.tensor
        if bits != 16 and tensor.dim() == 2 and 0 <= piece.layer < arch.num_layers:
            codes, parameters = (ops.fit if bits == 4 else ops.quantize)(tensor, bits, 8)
            tensor = reference.dequantize(codes, parameters, tensor.shape[1], bits, 8)
        found[piece.layer][piece.role] = tensor
    if arch.tie_word_embeddings:
        found[arch.num_layers]["head.weight"] = found[-1]["embed.weight"]
    return found


def sweep(store: WeightStore, arch: Arch, bits: int, count: int) -> None:
    """One pass as the executor runs it; every role of every layer is compared in every micro-batch."""
    wanted, num_layers = expected(arch, bits), arch.num_layers + 1
    store.fetch_rest(0, count)
    for tick in zigzag(num_layers, count):
        if tick.fetch_weights is not None:
            store.fetch(*tick.fetch_weights)
        store.check()
        for stage in ("pre", "post"):
            weights = store.weights(tick.layer, stage, 1)
            for role, tensor in wanted[tick.layer].items():
                if role in weights:
                    quantized = bits != 16 and role in ("qkv.weight", "o.weight", "gate_up.weight", "down.weight")
                    if not quantized or (stage == "pre") == (role == "qkv.weight"):
                        assert torch.equal(weights[role], tensor), (tick, stage, role)
        assert set(wanted[tick.layer]) <= set(store.weights(tick.layer, "post", 1)), tick
        if tick.micro_batch == count - 1:
            store.release(tick.layer, READY)
    store.check()


@settings(max_examples=25, deadline=None)
@given(
    split=splits(),
    layers=st.integers(1, 4),
    count=st.integers(1, 3),
    bits=st.sampled_from([16, 8, 4]),
    tied=st.booleans(),
    staged=st.booleans(),
)
def test_every_tick_of_every_pass_sees_its_layers_weights(
    split: Split, layers: int, count: int, bits: int, tied: bool, staged: bool
) -> None:
    arch = tiny_arch(layers, tied)
    with open_store(arch, split, bits, late=0.006, staged=staged) as (store, _):
        for _ in range(3):
            sweep(store, arch, bits, count)


@settings(max_examples=15, deadline=None)
@given(split=splits(), tied=st.booleans(), ids=st.lists(st.integers(0, 36), min_size=1, max_size=9))
def test_embedding_rows_are_gathered_where_the_table_lives(split: Split, tied: bool, ids: list[int]) -> None:
    arch = tiny_arch(1, tied)
    row_ids = torch.tensor(ids)
    with open_store(arch, split) as (store, _):
        table = expected(arch, 16)[-1]["embed.weight"]
        assert torch.equal(store.tensors.gather_rows("embed.weight", row_ids, row_ids), table[row_ids])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_few_tokens_get_codes(bits: int) -> None:
    """Where they lie, in a slab or not, until more tokens have had the stage expanded. What has rows of no whole groups
    is expanded for one token too, with its stage."""
    wide = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    few = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    for changes, coded in ((wide, {"pre", "post"}), (wide | {"intermediate_size": 40}, {"pre"})):
        arch = tiny_arch(2, **changes)
        with open_store(arch, Split(0.4, 0.6), bits, group=32, dtype=torch.float16) as (store, _):
            store.coded_tokens = 64
            for layer in range(2):
                store.fetch_rest(layer, 1)
                for stage, role in (("pre", "qkv.weight"), ("post", "gate_up.weight")):
                    matrix = store.weights(layer, stage, 64)[role]
                    assert isinstance(matrix, CodedMatrix) == (stage in coded)
                    assert store.weights(layer, stage, 64)["attn_norm.weight"].dim() == 1
                    dense = store.weights(layer, stage, 65)[role]
                    torch.testing.assert_close(ops.linear(few, matrix), few @ dense.T, rtol=2e-3, atol=1e-2)
                    assert store.weights(layer, stage, 1)[role] is dense
                store.release(layer, READY)


def test_a_plan_may_have_few_tokens_expanded_too() -> None:
    arch = tiny_arch(1, hidden_size=64, intermediate_size=96, head_dim=16)
    with open_store(arch, Split(1, 0), 4, group=32, dtype=torch.float16) as (store, _):
        store.coded_tokens, store.coded_pass_tokens = 64, 256
        for few_in_codes in (True, False, True):
            store.few_in_codes = few_in_codes
            for stage, role in (("pre", "qkv.weight"), ("post", "down.weight")):
                matrices = [store.weights(0, stage, 3)[role] for _ in range(2)]
                assert [isinstance(each, CodedMatrix) for each in matrices] == [few_in_codes] * 2
            store.release(0, READY)


def test_tokens_of_small_passes_get_codes_whatever_their_micro_batches_are() -> None:
    """Up to so many of a micro-batch, or of the whole pass."""
    arch = tiny_arch(1, hidden_size=64, intermediate_size=96, head_dim=16)
    with open_store(arch, Split(1, 0), 4, group=32, dtype=torch.float16) as (store, _):
        store.coded_tokens, store.coded_pass_tokens = 4, 16
        for tokens, of_pass, coded in ((4, 99, True), (5, 16, True), (5, 17, False), (17, 0, False)):
            store.pass_tokens = of_pass
            assert isinstance(store.weights(0, "pre", tokens)["qkv.weight"], CodedMatrix) == coded
            store.release(0, READY)


def test_views_of_codes_are_made_once_for_each_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in every tick; and in whichever slab a layer lies, it has its own codes."""
    arch, layers = tiny_arch(3, hidden_size=64, intermediate_size=96, head_dim=16), range(3)
    with open_store(arch, Split(0, 1), 4, group=32, dtype=torch.float16) as (store, _):
        store.coded_tokens, made, seen = 64, list[int](), dict[tuple[int, int], Tensor]()
        view = store.compute_view
        monkeypatch.setattr(store, "compute_view", lambda *words: made.append(words[1]) or view(*words))
        for turn in range(4):
            for layer in layers:
                store.fetch_rest(layer, 1)
                for _ in range(2):  # micro-batches
                    codes = store.weights(layer, "pre", 3)["qkv.weight"].codes
                slab = store.leases[layer].slab
                assert torch.equal(seen.setdefault((layer, slab), codes.clone()), codes)
                store.release(layer, READY)
            if turn < 2:
                before = len(made)
        assert len(seen) == 6 and len(made) == before, (seen.keys(), made)
        assert all(torch.equal(seen[layer, 0], seen[layer, 1]) for layer in layers)
        assert not torch.equal(seen[0, 0], seen[1, 0])
        store.close_buffers()
        assert not (store.kept.coded or store.kept.dense), "views would keep slabs alive"
        store.open_buffers()


def test_a_slab_is_not_claimed_while_a_layer_holds_it() -> None:
    arch = tiny_arch(4)
    with open_store(arch, MIXED) as (store, _):
        store.fetch_rest(0, 1)
        store.fetch_rest(1, 1)
        with pytest.raises(AssertionError, match="slab 0 is still layer 0's, layer 2 wants it"):
            store.fetch(2, 0, 1)
        store.release(0, READY)
        store.fetch(2, 0, 1)
        store.check()
        store.drain()
        assert not store.leases


@pytest.mark.parametrize("staged", [False, True])
def test_a_fetch_into_a_slab_waits_for_the_compute_that_reads_it(staged: bool) -> None:
    """The handle of the release orders the next fetch: nothing lands in the slab before it is done."""
    arch = tiny_arch(4)
    with open_store(arch, Split(0, 0.5, 0.5), staged=staged) as (store, queues):
        store.fetch_rest(0, 1)
        reading = {role: tensor.clone() for role, tensor in store.weights(0, "pre", 1).items()}
        now = store.weights(0, "pre", 1)
        store.fetch_rest(1, 1)
        for handle in store.leases[1].handles:
            handle.synchronize()
        read = threading.Event()
        gate = queues.cpu_attention.submit(lambda: read.wait(10))
        store.release(0, gate)
        store.fetch_rest(2, 1)
        time.sleep(0.05)
        assert all(torch.equal(now[role], tensor) for role, tensor in reading.items()), "overwritten while it was read"
        read.set()
        store.weights(2, "pre", 1)
        assert not all(torch.equal(now[role], tensor) for role, tensor in reading.items())
        store.drain()


def test_weights_are_not_used_before_they_were_fetched() -> None:
    with (
        open_store(tiny_arch(2), MIXED) as (store, _),
        pytest.raises(AssertionError, match="layer 0 is used before it was fetched"),
    ):
        store.weights(0, "pre", 1)


@pytest.mark.parametrize("staged", [False, True])
def test_a_failed_read_reaches_the_layers_user_and_nobody_after_a_drain(
    staged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = tiny_arch(3)
    with open_store(arch, Split(0, 0, 1), staged=staged) as (store, _):
        read = DiskFile.read

        def fail(self: DiskFile, buffer: torch.Tensor, offset: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(files.DiskFile, "read", fail)
        store.fetch_rest(0, 2)
        with pytest.raises(OSError, match="Input/output error"):
            store.weights(0, "pre", 1)
        monkeypatch.setattr(files.DiskFile, "read", read)
        store.drain()
        store.check()
        sweep(store, arch, 16, 2)


def test_staging_is_filled_before_any_slab_is_free() -> None:
    """A share of the disk is a few whole tensors: what reads them must not wait for the slab, which is free one
    layer before."""
    arch = tiny_arch(6)
    with open_store(arch, Split(0, 0.5, 0.5), staged=True) as (store, queues):
        ahead = store.read_ahead
        assert ahead is not None and len(ahead.layers) > 2
        store.fetch_rest(0, 1)
        if ahead.layers[0] != 0:
            store.fetch_rest(ahead.layers[0], 1)
        queues.disk_read.synchronize()
        assert [ahead.arrived(layer) for layer in ahead.layers[:3]].count(True) == len(ahead.buffers)
        store.drain()
        # A job that ends leaves what was read; the next one begins again with the first layer.
        for _ in range(2):
            sweep(store, arch, 16, 2)


def test_resident_weights_need_no_slab() -> None:
    arch = tiny_arch(2)
    with open_store(arch, Split(1, 0, 0)) as (store, _):
        assert store.resident and not store.slabs
        store.fetch_rest(0, 1)
        assert not store.leases
        sweep(store, arch, 16, 1)
