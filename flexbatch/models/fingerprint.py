"""What tells one model from another: a digest of every file of its folder that is read, of all of its bytes.

Samples do not do: fine-tuning that touches one matrix in twenty leaves the others, and the size, as they were. A whole
file takes 0.7 s per GiB and thread (SHA-256; BLAKE2b takes twice as long where the processor has instructions for SHA),
and it must not be paid at every start. So a digest may be recorded beside what the operating system says of the file:
inode, size, and the times of the last change of its content and of anything about it. No program can set the latter
(ctime), so that a file of equal size with its old mtime is noticed. A record counts only while all of that, and 64
samples of the content, are as they were, and it is written only for files that had been left alone for a while: two
changes within one tick of the file system's clock look like one. What this cannot see is a change behind the back of
the file system (an image that was swapped, a network file system that invents times) that keeps all of it and misses
every sample; where that is possible, remove the records.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flexbatch.files.atomic import replacing
from flexbatch.kernels.threads import usable_processors
from flexbatch.models.config_types import QUANTIZERS
from flexbatch.models.gguf.parts import WEIGHT_FILES, is_gguf, parts_of
from flexbatch.validation.errors import CheckpointError, reason

CHUNK_BYTES = 8 << 20
"""Digested by one thread at a time."""
PIECE_BYTES = 1 << 20
"""Read at one time: with 8 threads, whole chunks took 64 MiB of the host beside the model."""
THREADS = 8
SAMPLES, SAMPLE_BYTES = 64, 4096
SETTLED_SECONDS = 2.0
"""Since the last change of a file before its digest is recorded: the coarsest clock of a file system in use (FAT) ticks
every two seconds.
"""
RECORD_FORMAT = 1
RECORDS = "digests"
"""Folder of the records inside the offload folder."""

OTHER_FILES = (
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", *QUANTIZERS),
    *("tokenizer*", "chat_template*", "additional_chat_templates/*.jinja", "*vocab*", "merges.txt", "tekken.json"),
    *("*.model", "*.tiktoken", "*.tokenizer", "*.spm", "*.codes", "dict.txt"),
    *("emoji.json", "byte_maps.json", "normalizer.json", "word_shape.json", "word_pronunciation.json"),
)
"""Patterns of what is read beside the weights: by us, and by the tokenizers of transformers."""


def chunk_digest(data: Any) -> bytes:
    return hashlib.sha256(data).digest()


def combined(label: str, chunks: Iterable[bytes]) -> str:
    """Hex digest of a content by the digests of its chunks; another ``label`` gives another one."""
    return hashlib.sha256(label.encode() + b"\0" + b"".join(chunks)).hexdigest()


@dataclass(frozen=True)
class Signature:
    """What the operating system says of a file. The device is left out: its number changes from mount to mount."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def settled(self, now: float) -> bool:
        """Whether the file was left alone for long enough that any later change gives other times. A file from the
        future is not.
        """
        return now - max(self.mtime_ns, self.ctime_ns) / 1e9 > SETTLED_SECONDS


def file_digest(path: Path, records: Path | None = None, clock: Callable[[], float] = time.time) -> str:
    """Hex digest of all bytes of a file, from its record in the folder ``records`` if that still holds. Raises
    CheckpointError.

    ``clock``: seconds since the epoch, as in the file system's times.
    """
    try:
        with open(path, "rb") as file:
            started, signature = clock(), Signature.of(os.fstat(file.fileno()))
            samples = _samples(file.fileno(), signature.size) if records is not None else ""
            known = {"format": RECORD_FORMAT, "path": os.path.realpath(path), **asdict(signature), "samples": samples}
            record = (
                None if records is None else records / f"{hashlib.sha256(known['path'].encode()).hexdigest()[:32]}.json"
            )
            if record is not None and (digest := _recorded(record, known)):
                return digest
            digest = _read_digest(file.fileno(), signature.size)
            if Signature.of(os.fstat(file.fileno())) != signature:
                raise CheckpointError(f"{path} changed while it was read; start again when nobody writes to it")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if record is not None and signature.settled(started):
        _write_record(record, {**known, "digest": digest})
    return digest


def _samples(descriptor: int, size: int) -> str:
    """Digest of pieces spread evenly from the first to the last byte."""
    last = max(size - SAMPLE_BYTES, 0)
    return combined(
        "samples",
        (
            os.pread(descriptor, SAMPLE_BYTES, start)
            for start in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
        ),
    )


def _read_digest(descriptor: int, size: int) -> str:
    def read(start: int) -> bytes:
        digest, end = hashlib.sha256(), min(start + CHUNK_BYTES, size)
        while start < end and (piece := os.pread(descriptor, min(PIECE_BYTES, end - start), start)):
            digest.update(piece)
            start += len(piece)
        return digest.digest()

    starts = range(0, size, CHUNK_BYTES)
    if len(starts) < 2:
        return combined(str(size), map(read, starts))
    with ThreadPoolExecutor(min(THREADS, usable_processors()), thread_name_prefix="flexbatch digest") as pool:
        return combined(str(size), pool.map(read, starts))


def _recorded(record: Path, known: dict[str, Any]) -> str:
    """The digest of a record that says the same of the file; empty without one. A record that is damaged, or a symbolic
    link, is none.
    """
    try:
        with open(
            os.open(record, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), encoding="utf-8"
        ) as file:
            found = json.load(file)
    except (OSError, ValueError):
        return ""
    digest = found.pop("digest", "") if isinstance(found, dict) else ""
    return digest if found == known and isinstance(digest, str) and len(digest) == 64 else ""


def _write_record(record: Path, content: dict[str, Any]) -> None:
    """Atomically. A folder that cannot be written to costs the next start the reading, no more."""
    with contextlib.suppress(OSError):
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(record, 0o600, durable=False) as file:
            file.write(json.dumps(content).encode())


def weight_identity_files(folder: Path) -> list[Path]:
    """What the converted weights depend on: the configuration, which says how they are packed, and the files that hold
    them. Those of a GGUF model hold everything.
    """
    if is_gguf(folder):
        return parts_of(folder)
    from flexbatch.models.source import weight_files  # torch, which nothing else here needs

    index = next((name for name in WEIGHT_FILES if (folder / name).is_file()), "")
    told = ["config.json", *(name for name in QUANTIZERS if (folder / name).is_file())]
    told += [index] if index.endswith(".index.json") else []
    return [*(folder / name for name in told), *weight_files(folder)]


def model_files_digest(folder: Path | str, records: Path | None = None) -> dict[str, str]:
    """Hex digests by name of every file of the model and its tokenizer that is read. Raises CheckpointError.

    ``records``: a folder that keeps digests between starts (see above), for instance the one of the offload folder;
    without it every byte is read.
    """
    folder = Path(folder)
    if is_gguf(folder):
        return {path.name: file_digest(path, records) for path in parts_of(folder)}
    paths = sorted({*weight_identity_files(folder), *_other_files(folder)})
    return {path.relative_to(folder).as_posix(): file_digest(path, records) for path in paths}


def tokenizer_files_digest(folder: Path | str) -> dict[str, str]:
    """The same of a folder of which only the tokenizer is read."""
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(_other_files(folder))}


def _other_files(folder: Path) -> set[Path]:
    return {path for pattern in OTHER_FILES for path in folder.glob(pattern) if path.is_file()}


class WeightFiles:
    """The files of a checkpoint from their digest to their use: what is made of their content must be of the content
    that was digested.

    ``identity``: 32 hex digits that name the weights, the same for a copy of the folder, others when a single byte
    differs. Raises CheckpointError.
    """

    def __init__(self, folder: Path | str, records: Path | None = None, later: bool = False) -> None:
        """later: digest the files when `digests` or `identity` are first asked for, beside their use."""
        self.paths = weight_identity_files(Path(folder))
        self.signatures = {path: _signature(path) for path in self.paths}
        self.records = records
        if not later:
            assert self.digests

    @cached_property
    def digests(self) -> dict[Path, str]:
        """Hex digests by file. Raises CheckpointError for a file that is no longer what it was at the beginning: what
        was read of it may be of another content than the digest."""
        digests = {path: file_digest(path, self.records) for path in self.paths}
        for path, before in self.signatures.items():
            if _signature(path) != before:
                raise CheckpointError(f"{path} changed while it was loaded; start again when nobody writes to it")
        return digests

    @cached_property
    def identity(self) -> str:
        return combined("weights", (f"{path.name} {self.digests[path]}\n".encode() for path in self.paths))[:32]

    def check(self) -> None:
        """Raises CheckpointError when one of the files holds something else by now. One that was touched or linked is
        digested again.
        """
        for path, before in self.signatures.items():
            now = _signature(path)
            if now == before:
                continue
            if file_digest(path) != self.digests[path]:
                raise CheckpointError(f"{path} changed while it was loaded; start again when nobody writes to it")
            self.signatures[path] = now


def _signature(path: Path) -> Signature:
    try:
        return Signature.of(path.stat())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
