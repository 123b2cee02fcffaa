"""A stand-in for CUDA graphs on the CPU that knows what a graph knows: operations and addresses, and no Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
HOST = {aten._local_scalar_dense.default}
"""Numbers for Python, which are in the graph as they were."""


@dataclass(frozen=True)
class Place:
    """A tensor by where it lies."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class RecordedOps(TorchDispatchMode):
    """One graph: runs its operations again, on the memory that they had. What was there before is not kept alive."""

    def __init__(self, pool: dict[int, torch.UntypedStorage]) -> None:
        super().__init__()
        self.pool, self.given = pool, dict[int, StorageWeakRef]()
        self.calls: list[tuple[Any, Any, Any, list[Place]]] = []
        self.replays, self.gone = 0, False

    def place(self, tensor: Tensor, made: bool) -> Place:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.pool and key not in self.given:
            if made:
                self.pool[key] = storage
            else:
                self.given[key] = StorageWeakRef(storage)
        return Place(key, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())

    def tensor(self, place: Place) -> Tensor:
        storage = self.pool.get(place.storage)
        if storage is None:
            storage = torch.UntypedStorage._new_with_weak_ptr(self.given[place.storage].cdata)
        assert storage is not None, f"a graph reads {list(place.size)} {place.dtype} which is gone"
        return torch.empty(0, dtype=place.dtype).set_(storage, place.offset, place.size, place.stride)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        constant = func is aten.lift_fresh.default  # of a number in the code
        given = tree_map_only(Tensor, lambda tensor: self.place(tensor, made=constant), (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func not in HOST:
            made = [self.place(each, made=True) for each in tree_leaves(result) if isinstance(each, Tensor)]
            self.calls.append((func, *given, made))
        return result

    def replay(self) -> None:
        assert not self.gone, "a graph is replayed after it was evicted"
        for func, args, kwargs, made in self.calls:
            read = {place.storage for place in tree_leaves((args, kwargs)) if isinstance(place, Place)}
            args, kwargs = tree_map_only(Place, self.tensor, (args, kwargs))
            result = [each for each in tree_leaves(func(*args, **kwargs)) if isinstance(each, Tensor)]
            for place, value in zip(made, result, strict=True):
                if place.storage not in read:
                    self.tensor(place).copy_(value)
        self.replays += 1

    def reset(self) -> None:
        assert not self.gone, "a graph is evicted twice"
        self.gone = True


class OpsRecorder:
    """Records operations, once they have run; memory of what is recorded is one pool."""

    def __init__(self) -> None:
        self.made: list[RecordedOps] = []
        self.pool: dict[int, torch.UntypedStorage] = {}

    def __call__(self, work: Callable[[], Tensor]) -> tuple[RecordedOps, Tensor]:
        work()
        self.made.append(RecordedOps(self.pool))
        with self.made[-1]:
            result = work()
        return self.made[-1], result

    @property
    def kept(self) -> int:
        return sum(not graph.gone for graph in self.made)
