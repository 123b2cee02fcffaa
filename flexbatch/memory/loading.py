"""From a checkpoint's stream of tensors to their homes, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.memory.layer_files import empty_buffer, open_layer_file, write_layer_file
from flexbatch.memory.weight_plan import StoredTensor
from flexbatch.memory.weights import TensorView, WeightStore, view_of
from flexbatch.models.checkpoint import CheckpointError, Piece, QuantizedPiece

QUANTIZE_BLOCK_BYTES = 32 << 20
"""Bytes of fp32 of the rows that are quantised at a time; the search for their parameters holds eight times as many."""
CACHED_BLOCK_BYTES = 1 << 20
"""The same for every thread of a CPU, whose caches hold the search then: 5 million weights a second, where blocks of
16 MiB leave 1.4."""

Key = tuple[int, str]


class Loader:
    """Writes pieces into their homes; converted tensors of the disk tier (and quantised ones, with ``cache_quantized``)
    become files that later runs reuse.

    ``check_source`` is called before a tensor becomes a file, and raises when its pieces are no longer those of the
    checkpoint that ``folder`` is named after.
    """

    def __init__(
        self,
        store: WeightStore,
        folder: Path | None,
        cache_quantized: bool,
        check_source: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self.folder, self.check_source = store, folder, check_source
        tensors = store.plan.all_tensors
        self.stored: dict[Key, StoredTensor] = {(tensor.spec.layer, tensor.spec.role): tensor for tensor in tensors}
        self.cache_quantized = cache_quantized and folder is not None
        self.building: dict[Key, tuple[Tensor, TensorView]] = {}
        self.rows_written: dict[Key, int] = {}
        self.reused_bytes = 0
        """Of the tensors that came from files of earlier runs, as they are stored."""

    def filed(self, stored: StoredTensor) -> bool:
        """Whether this tensor has a file in the offload folder."""
        return stored.tier == "disk" or (self.cache_quantized and stored.quantized)

    def reuse(self) -> set[Key]:
        """Take what earlier runs left; returns the keys that need not be read from the checkpoint."""
        reused = set()
        for key, stored in self.stored.items():
            if self.filed(stored) and self.reuse_file(key, stored):
                reused.add(key)
                self.reused_bytes += stored.num_bytes
        return reused

    def reuse_file(self, key: Key, stored: StoredTensor) -> bool:
        assert self.folder is not None
        pool = self.store.queues.disk_chunks
        if stored.tier == "disk":
            file = open_layer_file(self.folder, stored, pool)
            if file is not None:
                self.store.files[key] = file
            return file is not None
        data = empty_buffer(stored)
        file = open_layer_file(self.folder, stored, pool, data)
        if file is None:
            return False
        file.close()
        source, home = view_of(data, stored, 0, self.store.dtype), self.store.homes[key]
        assert home.codes is not None and home.parameters is not None
        assert source.codes is not None and source.parameters is not None
        home.codes.copy_(source.codes)
        home.parameters.copy_(source.parameters)
        return True

    def load(self, stream: Callable[[set[Key]], Iterator[Piece | QuantizedPiece]]) -> int:
        """Read what is not there yet; ``stream(skip)`` yields the pieces of all other tensors. Returns the bytes
        that came from the checkpoint."""
        reused = self.reuse()
        taken = 0
        if len(reused) < len(self.stored):
            for piece in stream(reused):
                taken += self.write(piece)
        missing = [
            key
            for key, stored in self.stored.items()
            if key not in reused and self.rows_written.get(key, 0) < stored.spec.shape[0]
        ]
        if missing:
            raise CheckpointError(
                f"incomplete weights: {missing[:5]}{' ...' if len(missing) > 5 else ''} were not delivered in full"
            )
        return taken

    def check(self) -> None:
        """Invariants: no row is delivered twice; only unfinished tensors of the disk tier are held in memory."""
        for key, rows in self.rows_written.items():
            assert rows <= self.stored[key].spec.shape[0], (key, rows)
        for key in self.building:
            assert self.stored[key].tier == "disk" and key not in self.store.files, key

    def write(self, piece: Piece | QuantizedPiece) -> int:
        key = (piece.layer, piece.role)
        stored = self.stored[key]
        target = self.target(key, stored)
        rows = piece.rows or slice(0, stored.spec.shape[0])
        if isinstance(piece, QuantizedPiece):
            num_bytes = self.write_codes(piece, target, rows)
        else:
            self.write_dense(piece.tensor, target, rows)
            num_bytes = piece.tensor.nbytes
        self.rows_written[key] = self.rows_written.get(key, 0) + rows.stop - rows.start
        if self.rows_written[key] >= stored.spec.shape[0] and self.filed(stored):
            self.file(key, stored)
        return num_bytes

    def write_codes(self, piece: QuantizedPiece, target: TensorView, rows: slice) -> int:
        """Codes of a quantised checkpoint as they are where the home has the same bits and a group that divides
        theirs, else expanded."""
        num_bytes = piece.codes.nbytes + piece.parameters.nbytes
        if (
            target.codes is None
            or target.parameters is None
            or target.stored.bits != piece.bits
            or piece.group % target.stored.group
        ):
            self.write_dense(piece.dense(self.store.dtype).tensor, target, rows)
        else:
            target.codes[rows].copy_(piece.codes)
            target.parameters[rows].copy_(piece.regrouped(target.stored.group).parameters)
        return num_bytes

    def write_dense(self, tensor: Tensor, target: TensorView, rows: slice) -> None:
        if target.dense is not None:
            target.dense[rows].copy_(tensor)
            return
        assert target.codes is not None and target.parameters is not None
        stored, device = target.stored, self.store.device
        num_bytes = QUANTIZE_BLOCK_BYTES if device.type == "cuda" else CACHED_BLOCK_BYTES * torch.get_num_threads()
        step = max(1, num_bytes // (4 * tensor.shape[1]))
        for start in range(0, tensor.shape[0], step):
            block = tensor[start : start + step].to(device=device, dtype=self.store.dtype)
            codes, parameters = (
                ops.fit(block, stored.bits, stored.group)
                if stored.bits == 4
                else ops.quantize(block, stored.bits, stored.group)
            )
            place = slice(rows.start + start, rows.start + start + len(block))
            target.codes[place].copy_(codes)
            target.parameters[place].copy_(parameters)

    def target(self, key: Key, stored: StoredTensor) -> TensorView:
        """Views to write into: the home itself, or a buffer for a tensor that becomes a file."""
        if stored.tier != "disk":
            return self.store.homes[key]
        if key not in self.building:
            buffer = empty_buffer(stored)
            self.building[key] = (buffer, view_of(buffer, stored, 0, self.store.dtype))
        return self.building[key][1]

    def file(self, key: Key, stored: StoredTensor) -> None:
        """Write a complete tensor to its file, atomically, and keep it open when the disk is its home."""
        assert self.folder is not None
        if stored.tier == "disk":
            buffer, _ = self.building.pop(key)
        else:
            home, buffer = self.store.homes[key], empty_buffer(stored).zero_()
            copy = view_of(buffer, stored, 0, self.store.dtype)
            assert home.codes is not None and home.parameters is not None
            assert copy.codes is not None and copy.parameters is not None
            copy.codes.copy_(home.codes)
            copy.parameters.copy_(home.parameters)
        self.check_source()
        file = write_layer_file(self.folder, stored, buffer, self.store.queues.disk_chunks)
        if stored.tier == "disk":
            self.store.files[key] = file
        else:
            file.close()
