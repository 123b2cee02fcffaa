"""Where the pieces of a tensor are written while it is loaded: on its tier, or in a buffer that becomes its file."""

from __future__ import annotations

import math
import threading

from torch import Tensor

from flexbatch.memory.load_buffers import LoadBuffers
from flexbatch.memory.tensor_views import TensorView, view_of
from flexbatch.memory.weight_plan import PlacedTensor
from flexbatch.memory.weights import WeightStore

Key = tuple[int, str]


class LoadTargets:
    """Views to write into, by tensor, for several threads."""

    def __init__(self, store: WeightStore, buffers: LoadBuffers) -> None:
        self.store, self.buffers = store, buffers
        self.building: dict[Key, tuple[Tensor, TensorView]] = {}
        """Buffers of tensors of the disk tier that are not whole yet."""
        self._lock = threading.Lock()

    def of(self, key: Key, placed: PlacedTensor) -> TensorView:
        """The tensor on its tier, or a buffer for a tensor of the disk tier."""
        if placed.tier != "disk":
            return self.store.views[key]
        with self._lock:
            if key not in self.building:
                buffer = self._buffer_of(placed)
                self.building[key] = (buffer, view_of(buffer, placed, 0, self.store.dtype))
            return self.building[key][1]

    def content_of(self, key: Key, placed: PlacedTensor) -> Tensor:
        """What a tensor's file holds, in a buffer that is the caller's: of a tensor in memory, which is quantized, a
        copy."""
        if placed.tier == "disk":
            with self._lock:
                return self.building.pop(key)[0]
        buffer = self._buffer_of(placed)
        view_of(buffer, placed, 0, self.store.dtype).copy_codes(self.store.views[key])
        return buffer

    def _buffer_of(self, placed: PlacedTensor) -> Tensor:
        """What no number fills is zero, so that equal tensors are equal files."""
        buffer = self.buffers.take(placed.num_bytes)
        if placed.quantized:
            buffer[math.prod(placed.codes_shape) : placed.codes_bytes] = 0
        return buffer

    def check(self) -> None:
        """Invariant: a tensor that has its file is held no more."""
        for key, (_, view) in self.building.items():
            assert view.placed.tier == "disk" and key not in self.store.files, key
