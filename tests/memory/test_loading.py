"""Files of the offload folder: written once, reused by later runs, and trusted only when they are whole and of the
same kind."""

from __future__ import annotations

import io
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flexbatch.kernels import ops, reference
from flexbatch.memory import layer_files
from flexbatch.memory.conversion import parts_of
from flexbatch.memory.file_writer import FILE_WRITERS, FileWriter
from flexbatch.memory.files import OffloadError
from flexbatch.memory.layer_files import layer_file, open_layer_file
from flexbatch.memory.load_buffers import LoadBuffers
from flexbatch.memory.load_meter import LoadMeter
from flexbatch.memory.loading import NEXT_START, Loader
from flexbatch.memory.moving import key_of
from flexbatch.memory.weight_plan import PlacedTensor, plan_weights
from flexbatch.memory.weights import WeightStore
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.fingerprint import WeightFiles
from flexbatch.models.specs import Piece
from flexbatch.policy.policy import Split
from tests.memory.rigs import open_tiers, pieces, tiny_arch
from tests.tiny_models import make_model

ARCH = tiny_arch(2)
DISK, CPU, MIXED = Split(0, 0, 1), Split(0, 1, 0), Split(0.4, 0.2, 0.4)
MIXED_IN_MEMORY = Split(0.6, 0.4)


@contextmanager
def loaded(
    folder: Path, split: Split = DISK, bits: int = 16, seed: int = 3, stream=None, threads: int = 0
) -> Iterator[tuple[WeightStore, set[tuple[int, str]]]]:
    """A store loaded from random weights by way of ``folder``, and which tensors were read from the checkpoint."""
    read: set[tuple[int, str]] = set()

    def source(skip: set[tuple[int, str]]) -> Iterator[Piece]:
        for piece in pieces(ARCH, seed):
            if (piece.layer, piece.role) not in skip:
                read.add((piece.layer, piece.role))
                yield piece

    folder.mkdir(exist_ok=True, parents=True)
    with open_tiers(folder) as (tiers, queues):
        store = WeightStore(plan_weights(ARCH, split, bits, 8, 4), tiers, queues, torch.float32)
        try:
            loader = Loader(store, folder, cache_quantized=True, threads=threads)
            loader.load(stream or source)
            loader.check()
            store.check()
            yield store, read
        finally:
            store.close()


def same_weights(store: WeightStore, bits: int = 16, seed: int = 3) -> bool:
    """Whether every layer computes with the weights of the seed."""
    for layer in range(ARCH.num_layers + 1):
        store.fetch_rest(layer, 1)
        found = {**store.weights(layer, "pre", 1)}
        found = {
            **store.weights(layer, "post", 1),
            **{role: tensor for role, tensor in found.items() if role == "qkv.weight"},
        }
        for piece in pieces(ARCH, seed):
            tensor = piece.tensor
            if piece.layer != layer:
                continue
            if bits != 16 and tensor.dim() == 2 and layer < ARCH.num_layers:
                quantize = ops.fit if bits == 4 else ops.quantize
                tensor = reference.dequantize(*quantize(tensor, bits, 8), tensor.shape[1], bits, 8)
            if not torch.equal(found[piece.role], tensor):
                return False
        store.drain()
    return True


@pytest.mark.parametrize(("split", "bits"), [(DISK, 16), (MIXED, 16), (DISK, 4), (CPU, 8), (MIXED, 8)])
def test_a_second_run_reads_the_files_of_the_first(tmp_path: Path, split: Split, bits: int) -> None:
    with loaded(tmp_path, split, bits, threads=3) as (store, read):
        assert len(read) == len(store.plan.all_tensors) and same_weights(store, bits)
        filed = {(t.spec.layer, t.spec.role) for t in store.plan.all_tensors if t.tier == "disk" or t.quantized}
    with loaded(tmp_path, split, bits) as (store, read):
        assert same_weights(store, bits) and not read & filed
    with loaded(tmp_path, DISK, bits) as (store, read):  # another split finds the same files
        assert same_weights(store, bits) and not read & filed


def harmed(path: Path, harm: str, elsewhere: Path) -> None:
    """Harm a file of the offload folder; what it is meant to be is (1, "down.weight")."""
    content, other = bytearray(path.read_bytes()), path.parent.with_name("layer-0000") / path.name
    if harm == "dot-file":
        path.rename(path.with_name(f".{path.name}.123.tmp"))
    elif harm in ("missing", "link", "dangling link", "pipe", "hard link"):
        path.rename(elsewhere / "whole")
        if harm == "pipe":
            os.mkfifo(path)
        elif harm == "hard link":
            shutil.copy(other, elsewhere / "whole")
            os.link(elsewhere / "whole", path)
        elif harm != "missing":
            path.symlink_to(elsewhere / ("whole" if harm == "link" else "nothing"))
    elif harm == "another layer's":
        shutil.copy(other, path)
    elif harm in ("first byte", "middle byte", "last byte", "padding", "seal"):
        placements = {
            "first byte": 0,
            "middle byte": 1000,
            "last byte": NUM_BYTES - 1,
            "padding": NUM_BYTES,
            "seal": -1,
        }
        content[placements[harm]] ^= 1
        path.write_bytes(content)
    else:
        changed = {
            "empty": b"",
            "short": content[:-4096],
            "long": content + bytes(4096),
            "zeros": bytes(len(content)),
            "zero tail": bytes(content[:2048]).ljust(len(content), b"\0"),
            "without a seal": content[:-4096] + bytes(4096),
        }
        path.write_bytes(changed[harm])


NUM_BYTES = 20 * 36 * 4
HARMS = (
    *("empty", "short", "long", "zeros", "zero tail", "dot-file"),
    *("missing", "link", "dangling link", "hard link", "pipe"),
    *("another layer's", "first byte", "middle byte", "last byte", "padding", "seal", "without a seal"),
)


@pytest.mark.parametrize("harm", HARMS)
def test_a_file_that_is_not_whole_is_written_again(tmp_path: Path, harm: str) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with loaded(folder) as (store, _):
        placed = next(t for t in store.plan.all_tensors if (t.spec.layer, t.spec.role) == (1, "down.weight"))
    path = layer_file(folder, placed)
    assert placed.num_bytes == NUM_BYTES
    content = path.read_bytes()
    harmed(path, harm, elsewhere)
    before = [entry.read_bytes() for entry in elsewhere.iterdir()]
    assert not opens(folder, placed)
    with loaded(folder) as (store, read):
        assert read == {(1, "down.weight")} and same_weights(store)
    assert path.read_bytes() == content and opens(folder, placed) and not path.is_symlink()
    assert path.stat().st_mode & 0o077 == 0
    assert [entry.read_bytes() for entry in elsewhere.iterdir()] == before, "what a link leads to is left alone"


def opens(folder: Path, placed: PlacedTensor) -> bool:
    """Whether the tensor's file is trusted."""
    with ThreadPoolExecutor(2) as pool:
        file = open_layer_file(folder, placed, pool)
    if file is not None:
        file.close()
    return file is not None


@pytest.mark.parametrize("bits", [4, 8])
def test_damaged_files_of_tensors_in_memory_are_written_again(tmp_path: Path, bits: int) -> None:
    with loaded(tmp_path, CPU, bits) as (store, _):
        filed = [t for t in store.plan.all_tensors if t.quantized]
    paths = [layer_file(tmp_path, t) for t in filed]
    for index, path in enumerate(paths[::2]):
        content = bytearray(path.read_bytes())
        content[17 * index % len(content)] ^= 4
        path.write_bytes(content)
    with loaded(tmp_path, CPU, bits) as (store, read):
        assert same_weights(store, bits)
    assert {(t.spec.layer, t.spec.role) for t in filed[::2]} <= read
    assert not {(t.spec.layer, t.spec.role) for t in filed[1::2]} & read


def test_files_of_another_checkpoint_are_refused_whatever_folder_they_are_put_in(tmp_path: Path) -> None:
    with loaded(tmp_path / "one", seed=1), loaded(tmp_path / "two", seed=2) as (store, _):
        assert same_weights(store, seed=2)
    shutil.rmtree(tmp_path / "two")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with loaded(tmp_path / "two", seed=2) as (store, read):
        assert len(read) == len(store.plan.all_tensors) and same_weights(store, seed=2)


@pytest.mark.parametrize("which", ["model", "layer-0001"])
def test_a_link_in_place_of_a_folder_is_refused(tmp_path: Path, which: str) -> None:
    """Nothing outside the folder that the user named is read or written, for whole files either."""
    with loaded(tmp_path / "model"):
        pass
    link = tmp_path / "model" if which == "model" else tmp_path / "model" / which
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "elsewhere").rglob("*"))
    problem = rf"{which} is no folder of its own; remove it, or name another"
    with pytest.raises(OffloadError, match=problem), loaded(tmp_path / "model"):
        pass
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "elsewhere").rglob("*")) == before


def test_a_checkpoint_that_changes_while_it_is_loaded_is_not_filed(tmp_path: Path) -> None:
    """What was read before is filed: it was asked for each tensor between its last piece and its file."""
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise CheckpointError("changed")

    with open_tiers(tmp_path) as (tiers, queues):
        store = WeightStore(plan_weights(ARCH, DISK, 16, 8, 4), tiers, queues, torch.float32)
        with pytest.raises(CheckpointError, match="changed"):
            Loader(store, tmp_path, True, check).load(lambda skip: pieces(ARCH))
        store.close()
    assert len(list(tmp_path.rglob("*.bin"))) == 4


def test_bits_and_groups_have_files_of_their_own(tmp_path: Path) -> None:
    for bits in (16, 8, 4):
        with loaded(tmp_path, DISK, bits) as (store, read):
            assert same_weights(store, bits) and (bits == 16 or (0, "qkv.weight") in read)
    names = {path.name for path in tmp_path.rglob("qkv.weight.*")}
    assert names == {"qkv.weight.dense.bin", "qkv.weight.8bit-g8.bin", "qkv.weight.4bit-g8-fit.bin"}


def test_another_checkpoint_never_meets_these_files(tmp_path: Path) -> None:
    """The folder is named by the checkpoint's digest: one changed number in the weights, and it is another."""
    make_model("llama", tmp_path / "one", seed=1, tokenizer=False)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    make_model("llama", tmp_path / "two", seed=2, tokenizer=False)
    one, copy, two = (WeightFiles(tmp_path / name).identity for name in ("one", "copy", "two"))
    assert one == copy != two
    config = (tmp_path / "copy" / "config.json").read_text()
    (tmp_path / "copy" / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert WeightFiles(tmp_path / "copy").identity != one


@pytest.mark.parametrize(("count", "threads"), [(0, 0), (1, 0), (7, 3), (14, 0)])
def test_a_load_that_breaks_off_leaves_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, threads: int
) -> None:
    """The disk fills up after ``count`` files; the next run takes what is there and writes the rest."""
    written: list[Path] = []
    write = layer_files.write_atomically

    def fill_up(path: Path, tensors, num_bytes: int, pool: ThreadPoolExecutor) -> None:
        if len(written) == count:
            raise OffloadError(28, "No space left on device")
        write(path, tensors, num_bytes, pool)
        written.append(path)

    monkeypatch.setattr(layer_files, "write_atomically", fill_up)
    with pytest.raises(OffloadError, match="No space left"), loaded(tmp_path, threads=threads):
        pass
    monkeypatch.setattr(layer_files, "write_atomically", write)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(written)
    with loaded(tmp_path) as (store, read):
        assert same_weights(store) and len(read) == len(store.plan.all_tensors) - count


def test_files_are_written_while_the_next_tensors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits to be written is bounded meanwhile, and a tensor that is larger than the bound comes through alone."""
    last_read, write = threading.Event(), layer_files.write_atomically
    late: list[Path] = []

    def slow(path: Path, tensors, num_bytes: int, pool: ThreadPoolExecutor) -> None:
        if not last_read.wait(0 if late else 60):
            late.append(path)
        write(path, tensors, num_bytes, pool)

    def watched() -> Iterator[Piece]:
        yield from pieces(ARCH)
        last_read.set()

    def load(most_bytes: int) -> Loader:
        with open_tiers(tmp_path) as (tiers, queues):
            store = WeightStore(plan_weights(ARCH, DISK, 16, 8, 4), tiers, queues, torch.float32)
            loader = Loader(store, tmp_path / str(most_bytes), cache_quantized=True)
            loader.budget.most_bytes = most_bytes
            loader.load(lambda skip: watched())
            loader.check()
            assert same_weights(store)
            store.close()
        return loader

    monkeypatch.setattr(layer_files, "write_atomically", slow)
    assert load(1 << 20).budget.peak_bytes > 5 * 4096 and not late
    last_read.set()
    assert load(2 * 4096).budget.peak_bytes <= 2 * 4096
    assert load(1).budget.peak_bytes == 2 * 4096, "the largest tensor"


def test_buffers_are_used_again_and_kept_no_more_than_were_in_use() -> None:
    buffers = LoadBuffers(pinned=False)
    first, second = buffers.take(5000), buffers.take(4096)
    first[:5000] = second[:] = 7
    assert first.tolist() == [7] * 5000 + [0] * 3192 and buffers.used_bytes == 3 * 4096
    address = first.data_ptr()
    buffers.give(first)
    again = buffers.take(4100)
    assert again.data_ptr() == address and again[4100:].tolist() == [0] * 4092 and int(again[4099]) == 7
    buffers.give(again)
    buffers.give(second)
    third = buffers.take(2 * 4096 + 1)
    buffers.check()
    assert buffers.used_bytes == 3 * 4096 == buffers.peak_bytes
    assert third.data_ptr() % 4096 == 0 and not buffers._kept, "what was kept makes way for another size"
    buffers.close()
    buffers.check()


def test_an_interrupt_does_not_wait_for_what_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, go_on = layer_files.write_atomically, threading.Event()

    def slow(path: Path, tensors, num_bytes: int, pool: ThreadPoolExecutor) -> None:
        assert go_on.wait(60)
        write(path, tensors, num_bytes, pool)

    def interrupted(skip: set[tuple[int, str]]) -> Iterator[Piece]:
        yield from pieces(ARCH)
        raise KeyboardInterrupt

    def close(writer: FileWriter, dropped: bool = False) -> None:
        def release() -> None:
            while writer.error is None:
                time.sleep(0.001)
            go_on.set()

        threading.Thread(target=release, daemon=True).start()
        close_writer(writer, dropped)

    close_writer = FileWriter.close
    monkeypatch.setattr(FileWriter, "close", close)
    monkeypatch.setattr(layer_files, "write_atomically", slow)
    with open_tiers(tmp_path) as (tiers, queues):
        store = WeightStore(plan_weights(ARCH, DISK, 16, 8, 4), tiers, queues, torch.float32)
        loader = Loader(store, tmp_path, cache_quantized=True)
        loader.budget.most_bytes = 1 << 20  # all of them wait
        with pytest.raises(KeyboardInterrupt):
            loader.load(interrupted)
        store.close()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == FILE_WRITERS


@contextmanager
def beside_job(tmp_path: Path, folder: Path | Future[Path], bits: int = 4) -> Iterator[tuple[Loader, WeightStore]]:
    """A loader that has loaded, and may still write files."""
    with open_tiers(tmp_path) as (tiers, queues):
        store = WeightStore(plan_weights(ARCH, MIXED_IN_MEMORY, bits, 8, 4), tiers, queues, torch.float32)
        loader = Loader(store, folder, cache_quantized=True, threads=3, beside_job=True)
        loader.load(lambda skip: (piece for piece in pieces(ARCH) if (piece.layer, piece.role) not in skip))
        try:
            yield loader, store
        finally:
            loader.close()
            loader.close()
            loader.check()
            assert NEXT_START not in tiers.cpu.used_bytes
            store.close()


@pytest.mark.parametrize("bits", [8, 4])
def test_files_of_the_next_start_are_written_beside_the_job(tmp_path: Path, bits: int) -> None:
    """Loading waits neither for the folder's name nor for the disk, and the files are those of any other load."""
    later: Future[Path] = Future()
    with beside_job(tmp_path, later, bits) as (loader, store):
        assert same_weights(store, bits) and not list(tmp_path.rglob("*.bin"))
        assert store.tiers.cpu.used_bytes[NEXT_START] > 0
        loader.budget.check()
        later.set_result(tmp_path / "model")
    written = {path.relative_to(tmp_path / "model"): path.read_bytes() for path in tmp_path.rglob("*.bin")}
    (tmp_path / "elsewhere").mkdir()
    with loaded(tmp_path / "elsewhere" / "model", MIXED_IN_MEMORY, bits):
        pass
    folder = tmp_path / "elsewhere" / "model"
    assert written == {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.bin")} != {}
    with loaded(tmp_path / "model", MIXED_IN_MEMORY, bits) as (store, read):
        assert same_weights(store, bits) and not any(t.quantized and key_of(t) in read for t in store.plan.all_tensors)
    with beside_job(tmp_path, tmp_path / "model", bits) as (loader, store):
        assert loader.writer is None and same_weights(store, bits), "nothing is left to write"


def test_a_disk_that_is_full_ends_no_job_that_does_not_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, tensors, num_bytes: int, pool: ThreadPoolExecutor) -> None:
        raise OffloadError(28, "No space left on device")

    monkeypatch.setattr(layer_files, "write_atomically", full)
    told = "not all weights are kept for the next start: [Errno 28] No space left on device"
    with beside_job(tmp_path, tmp_path) as (_, store):
        assert same_weights(store, 4)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [told]
    for threads in (0, 3):
        caplog.clear()
        with loaded(tmp_path, MIXED_IN_MEMORY, 4, threads=threads) as (store, read):
            assert same_weights(store, 4) and len(read) == len(store.plan.all_tensors)
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [told]
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(OffloadError, match="No space left"), loaded(tmp_path, DISK):
        pass


def test_an_interrupt_leaves_files_of_the_next_start_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later: Future[Path] = Future()

    def interrupted(writer: FileWriter) -> None:
        later.set_result(tmp_path / "model")
        raise KeyboardInterrupt

    def slow(path: Path, tensors, num_bytes: int, pool: ThreadPoolExecutor) -> None:
        time.sleep(0.2)
        write(path, tensors, num_bytes, pool)

    write = layer_files.write_atomically
    monkeypatch.setattr(layer_files, "write_atomically", slow)
    monkeypatch.setattr(FileWriter, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt), beside_job(tmp_path, later):
        pass
    assert len(list((tmp_path / "model").rglob("*.bin"))) <= FILE_WRITERS


@pytest.mark.parametrize("rows", [None, slice(5, 25)])
def test_large_pieces_are_cut_into_rows(rows: slice | None) -> None:
    tensor = torch.randn(20, 6)
    piece = Piece(1, "up.weight", rows, tensor)
    assert list(parts_of(piece, piece.num_bytes)) == [piece]
    parts = list(parts_of(piece, 3 * 6 * 4 + 5))
    assert [len(part.tensor) for part in parts] == [3] * 6 + [2]
    first = 0 if rows is None else 5
    assert [part.rows for part in parts][-2:] == [slice(first + 15, first + 18), slice(first + 18, first + 20)]
    assert torch.equal(torch.cat([part.tensor for part in parts]), tensor)
    assert len(list(parts_of(piece, 1))) == 20, "a row at least"


def test_a_folder_that_is_not_known_yet_is_asked_for_when_there_is_a_file(tmp_path: Path) -> None:
    """Its name is a digest, which is worked out while the tensors are read."""
    later: Future[Path] = Future()

    def watched(skip: set[tuple[int, str]]) -> Iterator[Piece]:
        yield from pieces(ARCH)
        later.set_result(tmp_path / "model")

    with open_tiers(tmp_path) as (tiers, queues):
        store = WeightStore(plan_weights(ARCH, DISK, 16, 8, 4), tiers, queues, torch.float32)
        loader = Loader(store, later, cache_quantized=True)
        loader.budget.most_bytes = 1 << 20  # nothing has to be written before the folder is known
        loader.load(watched)
        assert same_weights(store)
        store.close()
    with loaded(tmp_path / "model") as (store, read):
        assert not read and same_weights(store)


def test_a_tensor_that_is_not_delivered_in_full_is_named_and_not_filed(tmp_path: Path) -> None:
    def torn(skip: set[tuple[int, str]]) -> Iterator[Piece]:
        for piece in pieces(ARCH):
            half = piece.tensor.shape[0] // 2
            torn_one = (piece.layer, piece.role) == (0, "o.weight")
            yield Piece(piece.layer, piece.role, slice(0, half), piece.tensor[:half]) if torn_one else piece

    with (
        pytest.raises(CheckpointError, match=r"incomplete weights: \[\(0, 'o.weight'\)\] were not delivered"),
        loaded(tmp_path, stream=torn),
    ):
        pass
    assert not list((tmp_path / "layer-0000").glob("*o.weight*"))


@pytest.mark.parametrize(("bits", "threads"), [(16, 0), (4, 0), (4, 4)])
def test_pieces_of_rows_come_in_any_order(tmp_path: Path, bits: int, threads: int) -> None:
    def cut(skip: set[tuple[int, str]]) -> Iterator[Piece]:
        for piece in pieces(ARCH):
            half = piece.tensor.shape[0] // 2
            if half:
                yield Piece(piece.layer, piece.role, slice(half, len(piece.tensor)), piece.tensor[half:])
            yield Piece(piece.layer, piece.role, slice(0, half or 1), piece.tensor[: half or 1])

    with loaded(tmp_path, MIXED, bits, stream=cut, threads=threads) as (store, _):
        assert same_weights(store, bits)


def test_loading_says_how_far_it_is_and_how_fast(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    meter = LoadMeter(8 * 2**30, lambda: now[0])
    with caplog.at_level("INFO"):
        for step in range(1, 9):
            now[0] = 2.0 * step
            meter.loaded(2**30, 2**31)
    assert len(caplog.messages) == 2
    assert caplog.messages[0] == "loading: 3.000 GiB of 8.000 GiB are on their tiers, 1.07 GB/s read, 10 s left"


def test_a_terminal_shows_a_bar_with_bytes_rate_and_what_is_done() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now, shown = [0.0], Terminal()
    meter = LoadMeter(8 * 2**30, lambda: now[0], shown)
    meter.to_file_bytes = 2**30
    now[0] = 2.0
    meter.reused(2**30)
    meter.filed(2**29)
    meter._bar.mininterval = 0
    meter.loaded(2**30, 2**31)
    meter.check()
    meter.close()
    last = shown.getvalue().split("\r")[-3]
    assert "25%" in last and "2.00G/8.00G" in last, last
    assert "1.07 GB/s read, 1.000 GiB found in the offload folder, 512.000 MiB of 1.000 GiB written there" in last, last
