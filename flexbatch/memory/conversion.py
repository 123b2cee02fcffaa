"""Pieces of a checkpoint -> the form in which a tensor is stored: dense, or quantized on the compute device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from flexbatch.kernels import ops
from flexbatch.memory.load_stages import COMPILE, CONVERT, COPY_IN, LoadStages
from flexbatch.memory.staging import Staging
from flexbatch.memory.tensor_views import TensorView
from flexbatch.memory.weight_plan import PlacedTensor
from flexbatch.models.quantized.scheme import QuantizedPiece
from flexbatch.models.specs import Piece

logger = logging.getLogger("flexbatch")

QUANTIZE_CHUNK_BYTES = 16 << 20
"""Bytes of fp32 of the rows that are quantized at a time: what a thread of a load holds on a GPU is less than that."""
CACHED_CHUNK_BYTES = 1 << 20
"""The same for every thread of a CPU, whose caches hold the search for parameters then, which takes eight times as
much: 5 million weights a second, where chunks of 16 MiB leave 1.4."""

Key = tuple[int, str]


def parts_of(piece: Piece | QuantizedPiece, most_bytes: int) -> Iterator[Piece | QuantizedPiece]:
    """A dense piece in rows of at most ``most_bytes``, or one; codes stay together."""
    if isinstance(piece, QuantizedPiece) or piece.num_bytes <= most_bytes:
        yield piece
        return
    first = 0 if piece.rows is None else piece.rows.start
    step = max(1, most_bytes * len(piece.tensor) // piece.num_bytes)
    for start in range(0, len(piece.tensor), step):
        part = piece.tensor[start : start + step]
        yield replace(piece, rows=slice(first + start, first + start + len(part)), tensor=part)


def quantized(chunk: Tensor, placed: PlacedTensor) -> tuple[Tensor, Tensor]:
    """Codes and parameters of rows, as ``placed`` is stored."""
    return (ops.fit if placed.bits == 4 else ops.quantize)(chunk, placed.bits, placed.group)


class Converter:
    """Writes pieces into views of tensors, in any thread, and knows what quantized checkpoints lost on the way."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, staged: bool = False, stages: LoadStages | None = None
    ) -> None:
        """staged: tensors go to a GPU by way of `Staging`, not by the driver's own copies from the mapped file."""
        self.device, self.dtype, self.stages = device, dtype, stages or LoadStages()
        self.staging = Staging(device) if staged and device.type == "cuda" else None
        self.rounded: set[Key] = set()
        """Matrices of a quantized checkpoint whose scales lost bits in the compute dtype."""
        self.requantized: set[Key] = set()
        """Matrices of a quantized checkpoint that a store at --weight-bits does not hold as they are."""
        self.squared_error = self.squared_sum = 0.0
        """Of these: what their weights changed by, and the weights."""
        self._prepared: set[tuple[int, int, int]] = set()
        self._lock, self._preparing = threading.Lock(), threading.Lock()

    def prepare(self, placed: PlacedTensor) -> None:
        """Compile the kernels that quantize a tensor, in one thread, before their first use: several that wanted the
        same one at once would each compile it. Loading what an earlier process compiled takes some 20 ms."""
        form = placed.spec.shape[1], placed.bits, placed.group
        if self.device.type != "cuda" or form in self._prepared:
            return
        with self.stages.timing(COMPILE), self._preparing:
            if form not in self._prepared:
                quantized(torch.zeros(16, form[0], dtype=self.dtype, device=self.device), placed)
                self._prepared.add(form)

    def write(self, piece: Piece | QuantizedPiece, target: TensorView, rows: slice) -> None:
        """``rows`` of a tensor."""
        if isinstance(piece, QuantizedPiece):
            self.write_codes(piece, target, rows)
        else:
            self.write_dense(piece, target, rows)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with self.stages.timing(COPY_IN):
            if self.staging is None:
                target.copy_(source)
            else:
                self.staging.copy(target, source)

    def on_device(self, source: Tensor) -> Tensor:
        """In the compute dtype."""
        with self.stages.timing(COPY_IN):
            there = source if self.staging is None else self.staging.to_device(source)
            return there.to(device=self.device, dtype=self.dtype)

    def write_codes(self, piece: QuantizedPiece, target: TensorView, rows: slice) -> None:
        """Write codes of a quantized checkpoint as they are where ``target`` holds them, else dequantized."""
        if target.codes is None or target.parameters is None or not piece.fits(target.placed.form):
            self.write_dense(piece.dense(), target, rows)
        elif piece.floats:
            self.copy(target.codes[rows], piece.codes)
            self.copy(target.parameters[rows], piece.parameters)
        else:
            piece = piece.stored_as(target.placed.bits, target.placed.group)
            self.copy(target.codes[rows], piece.codes)
            self.copy(target.parameters[rows], piece.parameters)
            # Minima of float16 are rounded no more than the weights that are computed of them.
            told = piece.parameters if self.dtype == torch.bfloat16 else piece.parameters[..., :1]
            if not torch.equal(told.to(self.dtype).float(), told.float()):
                with self._lock:
                    self.rounded.add((piece.layer, piece.role))

    def write_dense(self, piece: Piece, target: TensorView, rows: slice) -> None:
        """Write rows of a dense tensor, quantized where ``target`` is."""
        tensor = piece.tensor
        if target.dense is not None:
            self.copy(target.dense[rows], tensor)
            return
        assert target.codes is not None and target.parameters is not None
        placed = target.placed
        assert not placed.floats, f"{placed.spec.role} is MXFP4, which is kept and never made"
        self.prepare(placed)
        num_bytes = QUANTIZE_CHUNK_BYTES if self.device.type == "cuda" else CACHED_CHUNK_BYTES * torch.get_num_threads()
        step = max(1, num_bytes // (4 * tensor.shape[1]))
        losses: list[tuple[Tensor, Tensor]] = []
        for start in range(0, tensor.shape[0], step):
            chunk = self.on_device(tensor[start : start + step])
            target_rows = slice(rows.start + start, rows.start + start + len(chunk))
            with self.stages.timing(CONVERT):
                codes, parameters = quantized(chunk, placed)
                target.codes[target_rows].copy_(codes)
                target.parameters[target_rows].copy_(parameters)
            if piece.from_codes:
                found = ops.dequantize(codes, parameters, tensor.shape[1], placed.bits, placed.group)
                error = (found.float() - chunk.float()).square().sum(dtype=torch.float64)
                losses.append((error, chunk.float().square().sum(dtype=torch.float64)))
        if piece.from_codes:
            with self._lock:
                self.requantized.add((piece.layer, piece.role))
                # Read here, after all chunks: a number on the host waits for the device.
                self.squared_error += sum(float(error) for error, _ in losses)
                self.squared_sum += sum(float(total) for _, total in losses)

    def close(self) -> None:
        if self.staging is not None:
            self.staging.close()

    def warn_of_losses(self, placed: Mapping[Key, PlacedTensor]) -> None:
        """Say what a quantized checkpoint lost on its way."""
        bits = {torch.bfloat16: 8, torch.float16: 11}.get(self.dtype)
        if self.rounded and bits is not None:
            name = str(self.dtype).removeprefix("torch.")
            wider = "float32" if self.dtype == torch.float16 else "float16 or float32"
            logger.warning(
                "the scales of %d quantized matrices are rounded to the %d bits of %s; the files have more: --dtype %s "
                "keeps them",
                len(self.rounded), bits, name, wider,
            )  # fmt: skip
        if self.requantized:
            share = 100 * (self.squared_error / self.squared_sum) ** 0.5 if self.squared_sum else 0.0
            logger.warning(
                "%d matrices that are quantized in the checkpoint were quantized anew, in the %d bits of "
                "--weight-bits: their weights changed by %.2g %% (root mean square); --weight-bits 16 keeps them",
                len(self.requantized), min(placed[key].bits for key in self.requantized), share,
            )  # fmt: skip
