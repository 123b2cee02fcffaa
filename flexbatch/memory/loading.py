"""From a checkpoint's stream of tensors to their tiers, one tensor in memory at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.memory.layer_files import empty_buffer, open_layer_file, write_layer_file
from flexbatch.memory.tensor_views import TensorView, view_of
from flexbatch.memory.weight_plan import PlacedTensor
from flexbatch.memory.weights import WeightStore
from flexbatch.models.checkpoint import CheckpointError, Piece, QuantizedPiece
from flexbatch.policy.units import duration_text, size_text

logger = logging.getLogger("flexbatch")

SECONDS_PER_LINE = 5.0
"""Of loading that takes longer."""
QUANTIZE_CHUNK_BYTES = 32 << 20
"""Bytes of fp32 of the rows that are quantized at a time; the search for their parameters holds eight times as many."""
CACHED_CHUNK_BYTES = 1 << 20
"""The same for every thread of a CPU, whose caches hold the search then: 5 million weights a second, where chunks of
16 MiB leave 1.4."""

Key = tuple[int, str]


class LoadMeter:
    """Says every few seconds how far loading is, and how fast."""

    def __init__(self, total_bytes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_bytes, self.clock = total_bytes, clock
        self.started = self.said = clock()
        self.stored_bytes = 0.0

    def loaded(self, stored_bytes: float, read_bytes: int) -> None:
        """``stored_bytes`` more are on their tier; ``read_bytes`` were read from the checkpoint so far."""
        self.stored_bytes += stored_bytes
        now = self.clock()
        if now - self.said < SECONDS_PER_LINE:
            return
        self.said, seconds = now, now - self.started
        left = seconds * (self.total_bytes / self.stored_bytes - 1)
        logger.info(
            "loading: %s of %s are on their tiers, %.2f GB/s read, %s left",
            *(
                size_text(self.stored_bytes),
                size_text(self.total_bytes),
                read_bytes / seconds / 1e9,
                duration_text(left),
            ),
        )


class Loader:
    """Writes pieces to their tiers; converted tensors of the disk tier (and quantized ones, with ``cache_quantized``)
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
        self.placed: dict[Key, PlacedTensor] = {(tensor.spec.layer, tensor.spec.role): tensor for tensor in tensors}
        self.cache_quantized = cache_quantized and folder is not None
        self.building: dict[Key, tuple[Tensor, TensorView]] = {}
        self.rows_written: dict[Key, int] = {}
        self.reused_bytes = 0
        """Bytes of the tensors that came from files of earlier runs, as they are stored."""
        self.rounded: set[Key] = set()
        """Matrices of a quantized checkpoint whose scales lost bits in the compute dtype."""
        self.requantized: set[Key] = set()
        """Matrices of a quantized checkpoint that a store at --weight-bits does not hold as they are."""
        self.squared_error = self.squared_sum = torch.zeros((), dtype=torch.float64, device=store.device)
        """Of these: what their weights changed by, and the weights."""

    def filed(self, placed: PlacedTensor) -> bool:
        """Whether this tensor has a file in the offload folder."""
        return placed.tier == "disk" or (self.cache_quantized and placed.quantized)

    def reuse(self) -> set[Key]:
        """Use the files of earlier runs; returns the keys that need not be read from the checkpoint."""
        reused = set()
        for key, placed in self.placed.items():
            if self.filed(placed) and self.reuse_file(key, placed):
                reused.add(key)
                self.reused_bytes += placed.num_bytes
        return reused

    def reuse_file(self, key: Key, placed: PlacedTensor) -> bool:
        """Whether an earlier run's file of this tensor was found and used."""
        assert self.folder is not None
        pool = self.store.queues.disk_chunks
        if placed.tier == "disk":
            file = open_layer_file(self.folder, placed, pool)
            if file is not None:
                self.store.files[key] = file
            return file is not None
        data = empty_buffer(placed)
        file = open_layer_file(self.folder, placed, pool, data)
        if file is None:
            return False
        file.close()
        self.store.views[key].copy_codes(view_of(data, placed, 0, self.store.dtype))
        return True

    def load(self, stream: Callable[[set[Key]], Iterator[Piece | QuantizedPiece]]) -> int:
        """Read what is not there yet; ``stream(skip)`` yields the pieces of all other tensors. Returns the bytes
        that came from the checkpoint."""
        reused = self.reuse()
        read_bytes = 0
        if len(reused) < len(self.placed):
            meter = LoadMeter(sum(placed.num_bytes for key, placed in self.placed.items() if key not in reused))
            for piece in stream(reused):
                read_bytes += self.write(piece)
                meter.loaded(self.stored_bytes(piece), read_bytes)
        self.warn_of_losses()
        missing = [
            key
            for key, placed in self.placed.items()
            if key not in reused and self.rows_written.get(key, 0) < placed.spec.shape[0]
        ]
        if missing:
            raise CheckpointError(
                f"incomplete weights: {missing[:5]}{' ...' if len(missing) > 5 else ''} were not delivered in full"
            )
        return read_bytes

    def stored_bytes(self, piece: Piece | QuantizedPiece) -> float:
        """Bytes that a piece takes on its tier."""
        placed = self.placed[(piece.layer, piece.role)]
        rows = placed.spec.shape[0]
        return placed.num_bytes * (rows if piece.rows is None else piece.rows.stop - piece.rows.start) / rows

    def check(self) -> None:
        """Invariants: no row is delivered twice; only unfinished tensors of the disk tier are held in memory."""
        for key, rows in self.rows_written.items():
            assert rows <= self.placed[key].spec.shape[0], (key, rows)
        for key in self.building:
            assert self.placed[key].tier == "disk" and key not in self.store.files, key

    def write(self, piece: Piece | QuantizedPiece) -> int:
        """Write one piece, and the file of a tensor that is complete with it; returns the piece's bytes."""
        key = (piece.layer, piece.role)
        placed = self.placed[key]
        target = self.target(key, placed)
        rows = piece.rows or slice(0, placed.spec.shape[0])
        if isinstance(piece, QuantizedPiece):
            num_bytes = self.write_codes(piece, target, rows)
        else:
            self.write_dense(piece, target, rows)
            num_bytes = piece.tensor.nbytes
        self.rows_written[key] = self.rows_written.get(key, 0) + rows.stop - rows.start
        if self.rows_written[key] >= placed.spec.shape[0] and self.filed(placed):
            self.file(key, placed)
        return num_bytes

    def write_codes(self, piece: QuantizedPiece, target: TensorView, rows: slice) -> int:
        """Write codes of a quantized checkpoint as they are where ``target`` holds them, else dequantized. Returns the
        bytes of the codes and parameters."""
        num_bytes = piece.codes.nbytes + piece.parameters.nbytes
        if target.codes is None or target.parameters is None or not piece.fits(target.placed.form):
            self.write_dense(piece.dense(), target, rows)
        elif piece.floats:
            target.codes[rows].copy_(piece.codes)
            target.parameters[rows].copy_(piece.parameters)
        else:
            piece = piece.stored_as(target.placed.bits, target.placed.group)
            target.codes[rows].copy_(piece.codes)
            target.parameters[rows].copy_(piece.parameters)
            # Minima of float16 are rounded no more than the weights that are computed of them.
            told = piece.parameters if self.store.dtype == torch.bfloat16 else piece.parameters[..., :1]
            if not torch.equal(told.to(self.store.dtype).float(), told.float()):
                self.rounded.add((piece.layer, piece.role))
        return num_bytes

    def write_dense(self, piece: Piece, target: TensorView, rows: slice) -> None:
        """Write rows of a dense tensor, quantized where ``target`` is."""
        tensor = piece.tensor
        if target.dense is not None:
            target.dense[rows].copy_(tensor)
            return
        assert target.codes is not None and target.parameters is not None
        placed, device = target.placed, self.store.device
        assert not placed.floats, f"{placed.spec.role} is MXFP4, which is kept and never made"
        num_bytes = QUANTIZE_CHUNK_BYTES if device.type == "cuda" else CACHED_CHUNK_BYTES * torch.get_num_threads()
        step = max(1, num_bytes // (4 * tensor.shape[1]))
        for start in range(0, tensor.shape[0], step):
            chunk = tensor[start : start + step].to(device=device, dtype=self.store.dtype)
            codes, parameters = (
                ops.fit(chunk, placed.bits, placed.group)
                if placed.bits == 4
                else ops.quantize(chunk, placed.bits, placed.group)
            )
            target_rows = slice(rows.start + start, rows.start + start + len(chunk))
            target.codes[target_rows].copy_(codes)
            target.parameters[target_rows].copy_(parameters)
            if piece.from_codes:
                self.requantized.add((piece.layer, piece.role))
                found = ops.dequantize(codes, parameters, tensor.shape[1], placed.bits, placed.group)
                # Read when all is loaded: a number on the host would wait for the device at every chunk.
                self.squared_error = self.squared_error + (found.float() - chunk.float()).square().sum()
                self.squared_sum = self.squared_sum + chunk.float().square().sum()

    def warn_of_losses(self) -> None:
        """Say what a quantized checkpoint lost on its way."""
        bits = {torch.bfloat16: 8, torch.float16: 11}.get(self.store.dtype)
        if self.rounded and bits is not None:
            name = str(self.store.dtype).removeprefix("torch.")
            wider = "float32" if self.store.dtype == torch.float16 else "float16 or float32"
            logger.warning(
                "the scales of %d quantized matrices are rounded to the %d bits of %s; the files have more: --dtype %s "
                "keeps them",
                len(self.rounded), bits, name, wider,
            )  # fmt: skip
        if self.requantized:
            error, total = float(self.squared_error), float(self.squared_sum)
            share = 100 * (error / total) ** 0.5 if total else 0.0
            logger.warning(
                "%d matrices that are quantized in the checkpoint were quantized anew, in the %d bits of "
                "--weight-bits: their weights changed by %.2g %% (root mean square); --weight-bits 16 keeps them",
                len(self.requantized), min(self.placed[key].bits for key in self.requantized), share,
            )  # fmt: skip

    def target(self, key: Key, placed: PlacedTensor) -> TensorView:
        """The view to write into: the tensor on its tier, or a buffer for a tensor that becomes a file."""
        if placed.tier != "disk":
            return self.store.views[key]
        if key not in self.building:
            buffer = empty_buffer(placed)
            self.building[key] = (buffer, view_of(buffer, placed, 0, self.store.dtype))
        return self.building[key][1]

    def file(self, key: Key, placed: PlacedTensor) -> None:
        """Write a complete tensor to its file, atomically, and keep it open when it is placed on disk."""
        assert self.folder is not None
        if placed.tier == "disk":
            buffer, _ = self.building.pop(key)
        else:
            buffer = empty_buffer(placed).zero_()
            view_of(buffer, placed, 0, self.store.dtype).copy_codes(self.store.views[key])
        self.check_source()
        file = write_layer_file(self.folder, placed, buffer, self.store.queues.disk_chunks)
        if placed.tier == "disk":
            self.store.files[key] = file
        else:
            file.close()
