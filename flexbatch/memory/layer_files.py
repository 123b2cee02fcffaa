"""Converted tensors as files of the offload folder: each says of which weights and which tensor it is, and proves it.

A file holds the tensor's bytes, padded to ALIGNMENT, and one more page with a digest of them and of the file's label:
checkpoint, dtype, layer, role, layout and size. It is checked before use, by reading all of it. That costs about what
one pass costs that reads the disk tier, and a job has hundreds: damage to a single byte, a file that was cut off and
filled up again, and one that belongs to another tensor or checkpoint are written anew instead of computed with.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.memory.disk_cache import aligned_empty
from flexbatch.memory.files import (
    ALIGNMENT,
    DiskFile,
    OffloadError,
    align,
    chunks,
    make_folder,
    map_all,
    write_atomically,
)
from flexbatch.memory.weight_plan import PlacedTensor
from flexbatch.models.fingerprint import chunk_digest, combined

logger = logging.getLogger("flexbatch")

FORMAT = b"FlexBatch tensor 2\n"
"""Raise the number when tensors are converted in another way: then files of the old way are not trusted."""


def layer_file(folder: Path, placed: PlacedTensor) -> Path:
    """The path of a converted tensor: the folder names checkpoint and dtype, the name bits and group; the split is in
    neither.
    """
    layout = (
        ("float32" if placed.spec.wide else "dense")
        if not placed.quantized
        else "mxfp4"
        if placed.floats
        else f"{placed.bits}bit-g{placed.group}" + ("-fit" if placed.bits == 4 else "")
    )
    layer = "embedding" if placed.spec.layer < 0 else f"layer-{placed.spec.layer:04d}"
    return folder / layer / f"{placed.spec.role}.{layout}.bin"


def label_of(folder: Path, placed: PlacedTensor) -> str:
    path = layer_file(folder, placed)
    return f"{folder.name}/{path.parent.name}/{path.name} {list(placed.spec.shape)} {placed.num_bytes}"


def file_bytes(placed: PlacedTensor) -> int:
    return align(placed.num_bytes) + ALIGNMENT


def seal(label: str, digests: list[bytes]) -> Tensor:
    """The last ALIGNMENT bytes of a file."""
    content = FORMAT + combined(label, digests).encode() + b"\n"
    return torch.frombuffer(bytearray(content.ljust(ALIGNMENT, b"\0")), dtype=torch.uint8)


def write_layer_file(folder: Path, placed: PlacedTensor, buffer: Tensor, pool: ThreadPoolExecutor) -> DiskFile:
    """Write a tensor's bytes, padded with zeros to ALIGNMENT, atomically, and open what was written. Raises
    OffloadError."""
    path = layer_file(folder, placed)
    make_folder(folder)
    make_folder(path.parent)
    digests = map_all(pool, lambda part: chunk_digest(buffer[part[0] : part[1]].numpy().data), chunks(len(buffer)))
    last = seal(label_of(folder, placed), digests)
    write_atomically(path, [buffer, last], file_bytes(placed), pool)
    with contextlib.ExitStack() as stack:
        file = DiskFile(path)
        stack.callback(file.close)
        # Another process may have replaced it meanwhile, but only with its equal.
        if file.num_bytes != file_bytes(placed) or not torch.equal(read_seal(file, len(buffer)), last):
            problem = f"{path} was replaced by something else; name a folder of its own in --offload-dir"
            raise OffloadError(errno.EEXIST, problem)
        stack.pop_all()
    return file


def read_seal(file: DiskFile, offset: int) -> Tensor:
    """The ALIGNMENT bytes at ``offset``."""
    last = aligned_empty(ALIGNMENT)
    file.read(last, offset)
    return last


def open_layer_file(
    folder: Path, placed: PlacedTensor, pool: ThreadPoolExecutor, buffer: Tensor | None = None
) -> DiskFile | None:
    """The tensor's file, checked whole; None where there is none that can be trusted. ``buffer`` (as long as
    that, at a multiple of ALIGNMENT) takes its content.
    """
    path = layer_file(folder, placed)
    try:
        # A symbolic link in place of a folder is nobody's weights, whatever it leads to.
        if (
            not path.parent.exists()
            or path.parent.resolve() != folder.parent.resolve() / folder.name / path.parent.name
        ):
            return None
        file = DiskFile(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENOTDIR):
            return None
        raise
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        with contextlib.suppress(OffloadError):
            if whole(file, folder, placed, pool, buffer):
                stack.pop_all()
                return file
    logger.warning("%s is damaged, or not what its name says: it is written again", path)
    return None


def whole(file: DiskFile, folder: Path, placed: PlacedTensor, pool: ThreadPoolExecutor, buffer: Tensor | None) -> bool:
    """Whether size, format, label and every byte are right."""
    if file.num_bytes != file_bytes(placed):
        return False

    def digest(part: tuple[int, int]) -> bytes:
        start, end = part
        data = aligned_empty(end - start) if buffer is None else buffer[start:end]
        file.read(data, start)
        return chunk_digest(data.numpy().data)

    digests = map_all(pool, digest, chunks(align(placed.num_bytes)))
    return torch.equal(read_seal(file, align(placed.num_bytes)), seal(label_of(folder, placed), digests))
