"""Pinned host buffers. On the CPU nothing is copied, so their path of a GPU runs here on tensors of the host."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from flexbatch.memory import host_buffers, uploads
from flexbatch.memory.handles import READY
from flexbatch.memory.host_buffers import NUM_BUFFERS, HostBuffers, rows_of
from flexbatch.memory.tiers import Pool
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.uploads import ROW_BYTES, Uploads
from flexbatch.trace import Tracer
from tests.memory.rigs import MIB, open_tiers

MAX_TOKENS, HEADS, KV_HEADS, HEAD_DIM = 6, 4, 2, 3


@pytest.fixture
def queues(tmp_path: Path) -> Iterator[TransferQueues]:
    with open_tiers(tmp_path) as (_, made):
        yield made


@contextlib.contextmanager
def that_copy(queues: TransferQueues) -> Iterator[HostBuffers]:
    """As with a GPU."""
    pool = Pool("cpu", 64 * MIB)
    made = HostBuffers(MAX_TOKENS, HEADS, KV_HEADS, HEAD_DIM, torch.float32, pool, queues)
    made.copies = True
    size = MAX_TOKENS * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM * 4
    made.buffers = [pool.allocate(f"attention buffer {i}", size) for i in range(NUM_BUFFERS)]
    yield made
    made.check()
    made.close()
    assert not pool.used_bytes


@pytest.fixture
def buffers(queues: TransferQueues) -> Iterator[HostBuffers]:
    with that_copy(queues) as made:
        yield made


def tensors(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    made = (torch.randn(count, n, HEAD_DIM, generator=generator) for n in heads)
    return tuple(made)  # type: ignore[return-value]


def test_buffers_in_flight_do_not_touch_each_other(buffers: HostBuffers) -> None:
    taken = []
    for seed in range(NUM_BUFFERS):
        given_in = tensors(MAX_TOKENS - seed, seed)
        query, key, value, output = buffers.acquire(*given_in)
        output.fill_(seed)
        taken.append((given_in, (query, key, value), output))
        buffers.check()
    for seed, (given_in, copies, output) in enumerate(taken):
        assert all(torch.equal(copy, source) for copy, source in zip(copies, given_in, strict=True))
        assert output.shape == given_in[0].shape and torch.all(output == seed)
    with pytest.raises(AssertionError, match="taken before it was given back"):
        buffers.acquire(*tensors(1, 9))


@pytest.mark.parametrize("most_bytes", [1 << 18, 6 * 24 * 4 - 1])
@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=8), seed=st.integers(0, 99), data=st.data())
def test_what_one_product_has_made_goes_in_one_copy_while_it_is_small(
    most_bytes: int, counts: list[int], seed: int, data: st.DataObject
) -> None:
    """Columns of the same rows, in part of a micro-batch; as they were sent, whichever way the last ones went."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(host_buffers, "ROWS_BYTES", most_bytes)
        with open_tiers(Path(folder)) as (_, queues), that_copy(queues) as made:
            for turn, count in enumerate(counts):
                first = data.draw(st.integers(0, 2), "first token of the part")
                generator = torch.Generator().manual_seed(seed + turn)
                fused = torch.randn(first + count, HEADS + 2 * KV_HEADS, HEAD_DIM, generator=generator)
                parts = fused[first:].split_with_sizes((HEADS, KV_HEADS, KV_HEADS), 1)
                apart = data.draw(st.booleans(), "apart")
                given_in = tensors(count, seed) if apart else parts
                assert (rows_of(*given_in) is None) == apart
                query, key, value, output = made.acquire(*given_in)
                held = made.parts[turn % NUM_BUFFERS].rows
                assert (held is None) == (apart or count * 24 * 4 > most_bytes)
                output.fill_(turn)
                assert all(
                    torch.equal(copy, source) for copy, source in zip((query, key, value), given_in, strict=True)
                )
                assert output.shape == query.shape and output.is_contiguous() and torch.all(output == turn)
                made.release(output, READY)
                made.check()


def swapped(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return parts[0], parts[2], parts[1]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(swapped, id="values before keys"),
        pytest.param(lambda parts: (parts[0] * 1, *parts[1:]), id="queries that were made anew"),
        pytest.param(lambda parts: (*parts[:2], parts[2].clone()), id="values that were made anew"),
        pytest.param(lambda parts: (parts[0], parts[1], parts[1]), id="keys that are the values"),
        pytest.param(lambda parts: tuple(part[::2] for part in parts), id="every second token"),
        pytest.param(lambda parts: (parts[0].double(), *parts[1:]), id="another type"),
    ],
)
def test_what_does_not_lie_side_by_side_is_not_taken_for_it(change: Any) -> None:
    fused = torch.randn(4, HEADS + 2 * KV_HEADS, HEAD_DIM)
    parts = fused.split_with_sizes((HEADS, KV_HEADS, KV_HEADS), 1)
    assert torch.equal(rows_of(*parts), fused.view(4, -1))  # type: ignore[arg-type]
    assert rows_of(*change(parts)) is None


def test_a_buffer_is_taken_again_only_once_its_readers_are_done(buffers: HostBuffers, queues: TransferQueues) -> None:
    read = []
    for turn in range(3 * NUM_BUFFERS):
        *_, output = buffers.acquire(*tensors(2, turn))
        if turn >= NUM_BUFFERS:
            assert turn - NUM_BUFFERS in read, "taken while it was still read"
        buffers.release(output, queues.h2d.submit(lambda turn=turn: (time.sleep(0.005), read.append(turn))))
        buffers.check()


def test_more_query_tokens_than_a_buffer_holds_is_an_error(buffers: HostBuffers) -> None:
    with pytest.raises(AssertionError, match="7 query tokens for CPU attention, buffers hold 6"):
        buffers.acquire(*tensors(7, 0))


def test_without_a_gpu_nothing_is_copied(queues: TransferQueues) -> None:
    made = HostBuffers(MAX_TOKENS, HEADS, KV_HEADS, HEAD_DIM, torch.float32, Pool("cpu", 0), queues)
    query, key, value = tensors(3, 0)
    taken = made.acquire(query, key, value)
    assert all(a is b for a, b in zip(taken, (query, key, value), strict=False)) and taken[3] is not query
    made.release(taken[3], READY)
    made.check()
    made.close()


ARRAYS = arrays.arrays(
    st.sampled_from([np.int32, np.int64]),
    arrays.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=7),
    elements=st.integers(0, 99),
)


@settings(max_examples=40, deadline=None)
@given(
    passes=st.lists(st.lists(ARRAYS, max_size=6), min_size=1, max_size=5),
    half_bytes=st.sampled_from([64, 256, 4096]),
    packet_bytes=st.sampled_from([16, 96, 4096]),
)
def test_inputs_arrive_as_they_were_sent_whether_they_fit_or_not(
    passes: list[list[np.ndarray]], half_bytes: int, packet_bytes: int
) -> None:
    """In one copy, where they fit."""
    queues = TransferQueues(torch.device("cpu"), Tracer())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "INPUT_BUFFER_BYTES", half_bytes)
        patch.setattr(uploads, "PACKET_BYTES", packet_bytes)
        copies = list[int]()
        copy = queues.copy_to_device
        patch.setattr(queues, "copy_to_device", lambda *args: (copies.append(len(args[0])), copy(*args)))
        sender = Uploads(Pool("cpu", 0), queues)
        sender.copies, sender.halves = True, list(torch.zeros(2, half_bytes, dtype=torch.uint8))
        sender.ids = torch.arange(half_bytes // ROW_BYTES, dtype=torch.int32)
        for sent in passes:
            sender.begin_pass()
            copies.clear()
            received = [sender.send(array) for array in sent]
            sender.flush()
            sender.check()
            total = sum(-(-array.nbytes // ROW_BYTES) * ROW_BYTES for array in sent)
            if total <= min(half_bytes, packet_bytes):
                assert copies == [total // ROW_BYTES] * bool(total), "one copy for all"
            for array, tensor in zip(sent, received, strict=True):
                assert tensor.shape == array.shape and torch.equal(tensor, torch.from_numpy(array))
        sender.close()
    queues.close()


def test_a_half_is_filled_again_only_when_the_device_has_read_it(
    queues: TransferQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = Uploads(Pool("cpu", 0), queues)
    sender.copies = True
    marks: list[list[str]] = []

    class Mark:
        def __init__(self) -> None:
            self.seen: list[str] = []
            marks.append(self.seen)

        def wait(self) -> None:
            self.seen.append("wait")

        def synchronize(self) -> None:
            self.seen.append("synchronize")

    monkeypatch.setattr(queues, "mark", Mark)
    for _ in range(4):
        sender.begin_pass()
    assert marks == [["synchronize"], ["synchronize"], ["synchronize"], []]
