"""Files that an earlier start left in the offload folder: read, checked and brought to their tiers, some at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from flexbatch.memory.files import align
from flexbatch.memory.layer_files import layer_file, open_layer_file
from flexbatch.memory.load_buffers import ByteBudget, LoadBuffers
from flexbatch.memory.load_meter import LoadMeter
from flexbatch.memory.load_stages import REUSE_COPY, REUSE_READ, LoadStages
from flexbatch.memory.load_threads import LoadThreads
from flexbatch.memory.tensor_views import view_of
from flexbatch.memory.weight_plan import PlacedTensor
from flexbatch.memory.weights import WeightStore
from flexbatch.policy.limits import DISK_THREADS

Key = tuple[int, str]


class ReusedFiles:
    """Reads the files of ``wanted`` in threads of its own, from `begin` to `finish`. What waits on the way is taken
    from ``budget``; the threads of ``pool`` read and digest chunks."""

    def __init__(
        self, store: WeightStore, folder: Path, wanted: dict[Key, PlacedTensor], pool: ThreadPoolExecutor,
        budget: ByteBudget, buffers: LoadBuffers, meter: LoadMeter, stages: LoadStages,
    ) -> None:  # fmt: skip
        self.store, self.folder, self.pool, self.budget, self.buffers = store, folder, pool, budget, buffers
        self.meter, self.stages = meter, stages
        self.wanted = {key: placed for key, placed in wanted.items() if layer_file(folder, placed).exists()}
        """Those that have a file, whatever it holds."""
        self.found: set[Key] = set()
        self.threads = LoadThreads(store.device, DISK_THREADS, name="flexbatch-reuse")

    def begin(self) -> None:
        for key in self.wanted:
            self.threads.run(partial(self._reuse, key), 0)

    def finish(self) -> set[Key]:
        """The keys of those whose files can be trusted, which are on their tiers now. Raises the first error."""
        self.threads.finish()
        return self.found

    def close(self) -> None:
        """Leave out what is not begun."""
        self.threads.close(dropped=True)

    def _reuse(self, key: Key) -> None:
        placed = self.wanted[key]
        if self._to_tier(key, placed):
            self.found.add(key)
            self.meter.reused(placed.num_bytes)

    def _to_tier(self, key: Key, placed: PlacedTensor) -> bool:
        """Whether the file was whole, and is used."""
        if placed.tier == "disk":
            with self.stages.timing(REUSE_READ):
                file = open_layer_file(self.folder, placed, self.pool)
            if file is not None:
                self.store.files[key] = file
            return file is not None
        self.budget.take(align(placed.num_bytes))
        data = self.buffers.take(placed.num_bytes)
        try:
            with self.stages.timing(REUSE_READ):
                file = open_layer_file(self.folder, placed, self.pool, data)
            if file is None:
                return False
            file.close()
            with self.stages.timing(REUSE_COPY):
                self.store.views[key].copy_codes(view_of(data, placed, 0, self.store.dtype))
                self.threads.wait_for_device()
            return True
        finally:
            self.buffers.give(data)
            self.budget.give(align(placed.num_bytes))
