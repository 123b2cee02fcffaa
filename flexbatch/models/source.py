"""The weight files of a folder as a stream of named tensors, one at a time. Nothing in a file is executed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexbatch.models.gguf import blocks
from flexbatch.models.gguf.parts import WEIGHT_FILES, is_gguf, pointer_remedy
from flexbatch.validation.errors import CheckpointError, reason

REMAP_BYTES = 256 * 2**20
AHEAD_BYTES = 256 * 2**20
"""Of the files that the system is asked to read before they are touched: a mapping alone is read page by page, 128 KiB
at a time, which leaves a disk idle while tensors are converted."""
COMPARED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its name there, its shape, its dtype as the file says it; of safetensors and GGUF files also
    the byte where it begins, of safetensors how many there are."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    num_bytes: int = 0


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, wanted an object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises CheckpointError when there are none, or an index names a file that is
    absent or lies elsewhere."""
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no weights; looked for {', '.join(WEIGHT_FILES)}")
    if not found.name.endswith(".index.json"):
        return [found]
    weight_map = read_json(found).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"{found} has no weight_map from tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{found} points outside its folder: {name!r}")
        if not (folder / name).is_file():
            tensors = [tensor for tensor, file in weight_map.items() if file == name]
            raise CheckpointError(
                f"{folder / name} does not exist; {found.name} expects {len(tensors)} tensors in it, e.g. {tensors[0]}"
            )
    return [folder / name for name in names]


def list_tensors(folder: Path) -> list[StoredTensor]:
    """Every stored tensor in the order of the files; reads headers only."""
    return [tensor for file in weight_files(folder) for tensor in list_file(file)]


def list_file(file: Path) -> list[StoredTensor]:
    """The tensors of one file in their order; reads its header only."""
    return _list_safetensors(file) if file.suffix == ".safetensors" else _list_bin(file)


def read_tensors(stored: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """The tensors themselves, in the given order. They are views of the mapped file: copy or drop each before the next.

    A mapping keeps every page that was touched in the process's resident memory (measured: 1.0 GB for a file of 1.0
    GB), so the file is mapped anew after every REMAP_BYTES; opening costs about a millisecond.
    """
    file: Path | None = None
    handle: Any = None
    touched = 0
    for tensor in reading_ahead(stored):
        if is_gguf(tensor.file):
            rows, _ = blocks.rows_and_columns(tensor)
            yield tensor, blocks.numbers(blocks.raw_rows(tensor, 0, rows), tensor.dtype).view(tensor.shape)
            continue
        if tensor.file != file or touched >= REMAP_BYTES:
            handle = None
            file, handle, touched = tensor.file, _open(tensor.file), 0
        try:
            value = handle[tensor.name] if isinstance(handle, dict) else handle.get_tensor(tensor.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name} cannot be read: {reason(error)}") from error
        touched += value.nbytes
        yield tensor, value
        del value


def reading_ahead(stored: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
    """The tensors in their order, with the system reading those that come next; of files without offsets nothing is
    known."""
    coming: deque[StoredTensor] = deque()
    ahead, file, descriptor = 0, Path(), -1
    try:
        for tensor in stored:
            with contextlib.suppress(OSError):  # a file system that takes no advice; whoever reads says what is wrong
                if tensor.num_bytes and hasattr(os, "posix_fadvise"):
                    if tensor.file != file and descriptor >= 0:
                        os.close(descriptor)
                        descriptor = -1
                    if descriptor < 0:
                        descriptor, file = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC), tensor.file
                    os.posix_fadvise(descriptor, tensor.offset, tensor.num_bytes, os.POSIX_FADV_WILLNEED)
            coming.append(tensor)
            ahead += tensor.num_bytes
            while coming and ahead > AHEAD_BYTES:
                ahead -= coming[0].num_bytes
                yield coming.popleft()
        yield from coming
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors hold the same values in the same form; a few MB of them at a time."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    row_bytes = 8 * math.prod(first.shape[1:])
    step = max(1, COMPARED_BYTES // max(1, row_bytes))
    rows = first.shape[0] if first.shape else 0
    if not rows:
        return all(torch.equal(a, b) for a, b in zip(_whole(first), _whole(second), strict=True))
    parts = [_sliceable(tensor) for tensor in (first, second)]
    return all(
        torch.equal(*(part[i : i + step].contiguous().view(torch.uint8) for part in parts))
        for i in range(0, rows, step)
    )


def _whole(stored: StoredTensor) -> list[Tensor]:
    return [value.view(torch.uint8) if value.dim() else value for _, value in read_tensors([stored])]


def _sliceable(stored: StoredTensor) -> Any:
    if is_gguf(stored.file):
        return _GGUFRows(stored)
    handle = _open(stored.file)
    return handle[stored.name] if isinstance(handle, dict) else handle.get_slice(stored.name)


@dataclass(frozen=True)
class _GGUFRows:
    """Rows as they are stored, by slices."""

    stored: StoredTensor

    def __getitem__(self, rows: slice) -> Tensor:
        return torch.from_numpy(np.array(blocks.raw_rows(self.stored, *rows.indices(self.stored.shape[0])[:2])))


def _open(file: Path) -> Any:
    """A dictionary, or safetensors' handle."""
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file)


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged or truncated ({file.stat().st_size} bytes): {reason(error)}{pointer_remedy(file)}"
        ) from error


def _list_safetensors(file: Path) -> list[StoredTensor]:
    handle = _open_safetensors(file)
    with open(file, "rb") as opened:  # safetensors has checked the header, and tells no offsets
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    found = []
    for name in handle.offset_keys():
        part, (begin, end) = handle.get_slice(name), header[name]["data_offsets"]
        shape = tuple(part.get_shape())
        found.append(StoredTensor(name, file, shape, part.get_dtype(), 8 + size + begin, end - begin))
    return found


def _open_bin(file: Path) -> dict[str, Tensor]:
    """weights_only refuses every pickle that would call anything but tensor constructors; mmap keeps the file out of
    memory."""
    try:
        # The format before PyTorch 1.6 is no zip file and cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is refused: it is damaged, or holds more than tensors, and nothing in a checkpoint is "
            f"executed: {str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged or truncated ({file.stat().st_size} bytes): {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} is no dictionary of tensors")
    return state


def _list_bin(file: Path) -> list[StoredTensor]:
    return [StoredTensor(name, file, tuple(value.shape), str(value.dtype)) for name, value in _open_bin(file).items()]
