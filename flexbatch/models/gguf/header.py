"""The header of a GGUF file, checked in full before anything relies on it: no count, length or offset of a file is
believed.

The reader of the package gguf is not used for it: it trusts every number (a count of 2^60 keeps it in a loop, a wrong
offset yields a view of other data) and makes an object of every token, which takes 4 s for a vocabulary of 49,000.
This one walks over such lists in 0.05 s.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from flexbatch.models.gguf.blocks import block_sizes, type_names
from flexbatch.models.gguf.parts import MAGIC, parts_of, pointer_remedy
from flexbatch.models.source import StoredTensor
from flexbatch.validation.checks import short
from flexbatch.validation.errors import CheckpointError, reason

VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value types of the metadata -> formats of `struct`."""
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 2**16
MAX_DIMENSIONS = 4
MAX_KEYS, MAX_TENSORS = 2**16, 2**18
MAX_NAME_BYTES = 2**10
MAX_STRING_BYTES = 2**24
"""A chat template has some kilobytes, the character map of a tokenizer some hundred."""
MAX_ELEMENTS = 2**22
"""Of one list. The largest vocabularies have 262,144 tokens and half a million merges."""
MAX_HEADER_BYTES = 2**27
"""Vocabularies of 262,144 tokens make headers of 15 MB."""
KEPT_ELEMENTS = 2**13
"""Lists of numbers up to this length are kept (one value for each layer), of others the length."""
LEAST_KEY_BYTES, LEAST_TENSOR_BYTES = 13, 32
"""With an empty name, and one byte or one dimension."""


TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>", "<|EOT|>")
"""What chat templates write behind an answer."""


@dataclass(frozen=True)
class Length:
    """Stands for a list that is not kept. turn_ends: where `TURN_ENDS` stand in it, by their texts."""

    elements: int
    turn_ends: Mapping[str, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Header:
    """What the parts of a model say together. ``metadata`` is that of the first part."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    num_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def of_model(self, key: str) -> Any:
        """The value of a key below the architecture's name, None without it."""
        return self.metadata.get(f"{self.architecture}.{key}")


def read_header(path: Path) -> Header:
    """Raises CheckpointError that names the file and the field for whatever does not fit together."""
    parts = parts_of(path)
    headers = [_read_part(part) for part in parts]
    metadata = headers[0].metadata
    if not isinstance(metadata.get("general.architecture"), str):
        raise CheckpointError(f"{parts[0]}: general.architecture is missing, or no string: the file names no model")
    tensors: dict[str, StoredTensor] = {}
    for number, (part, header) in enumerate(zip(parts, headers, strict=True)):
        count, own = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
        if count not in (0, 1, len(parts)) or (len(parts) > 1 and own != number):
            raise CheckpointError(
                f"{part} says split.no={short(own)} and split.count={short(count)}, but is file {number} (from 0) of "
                f"{len(parts)}: parts are named NAME-00001-of-0000N.gguf, and all of them are needed"
            )
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{part}: tensor {name} is also in {tensors[name].file}")
            tensors[name] = tensor
    return Header(parts[0], headers[0].version, metadata, tensors, sum(header.num_bytes for header in headers))


def _read_part(path: Path) -> Header:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise CheckpointError(f"{path} is no GGUF file: it has {size} bytes, less than the shortest header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error


class _Reader:
    """Walks over one mapped file; ``position`` is the byte that is read next."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size = path, data, len(data)
        self.position = 0

    def wrong(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or no GGUF file ({self.size} bytes): {message}")

    def take(self, num_bytes: int, what: str) -> int:
        """Moves on by that many bytes and returns where they start."""
        start, limit = self.position, min(self.size, MAX_HEADER_BYTES)
        if num_bytes > limit - start:
            raise self.wrong(f"{what} of {num_bytes:,} bytes at byte {start:,} ends beyond byte {limit:,}")
        self.position = start + num_bytes
        return start

    def numbers(self, form: str, what: str) -> tuple[Any, ...]:
        form = f"<{form}"
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form), what))

    def string(self, what: str, most: int = MAX_STRING_BYTES) -> str:
        (length,) = self.numbers("Q", f"the length of {what}")
        if length > most:
            raise self.wrong(f"{what} at byte {self.position:,} has a length of {length:,} bytes, the most is {most:,}")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} at byte {start:,} is not UTF-8: {error.reason}") from error

    def read(self) -> Header:
        self.take(4, "the magic number")
        if self.data[:4] != MAGIC:
            raise self.wrong(f"it begins with {self.data[:4]!r}, not {MAGIC!r}{pointer_remedy(self.path)}")
        (version,) = self.numbers("I", "the version")
        if version not in VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS)
            raise self.wrong(
                "it is in big-endian byte order, for other machines"
                if big
                else f"version {version} is not supported; supported: {' and '.join(map(str, VERSIONS))}"
            )
        num_tensors, num_keys = self.numbers("QQ", "the counts")
        self.check_count("keys", num_keys, MAX_KEYS, LEAST_KEY_BYTES)
        self.check_count("tensors", num_tensors, MAX_TENSORS, LEAST_TENSOR_BYTES)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string("a key", MAX_NAME_BYTES)
            if key in metadata:
                raise self.wrong(f"key {key} is there twice")
            metadata[key] = self.value(key)
        found = [self.tensor() for _ in range(num_tensors)]
        tensors = self.placed(found, self.alignment(metadata))
        return Header(self.path, version, metadata, tensors, self.size)

    def check_count(self, what: str, count: int, most: int, least_bytes: int) -> None:
        left = self.size - self.position
        if count > most or count * least_bytes > left:
            raise self.wrong(
                f"it counts {count:,} {what}; the most is {most:,}, and {left:,} bytes follow, of which each takes "
                f"{least_bytes} or more"
            )

    def value(self, key: str) -> Any:
        (kind,) = self.numbers("I", f"the type of {key}")
        if kind in SCALARS:
            return self.numbers(SCALARS[kind], key)[0]
        if kind == STRING:
            return self.string(key)
        if kind != ARRAY:
            raise self.wrong(f"key {key} has type {kind}; types are 0 to 12")
        inner, count = self.numbers("IQ", f"the list {key}")
        if count > MAX_ELEMENTS:
            raise self.wrong(f"list {key} counts {count:,} elements; the most is {MAX_ELEMENTS:,}")
        if inner == STRING:
            return Length(count, self.skip_strings(key, count))
        if inner not in SCALARS:
            raise self.wrong(f"list {key} has elements of type {inner}, wanted numbers or strings")
        if count <= KEPT_ELEMENTS:
            return self.numbers(f"{count}{SCALARS[inner]}", f"list {key}")
        self.take(count * struct.calcsize(f"<{SCALARS[inner]}"), f"list {key}")
        return Length(count)

    def skip_strings(self, key: str, count: int) -> dict[str, int]:
        data, position, limit = self.data, self.position, min(self.size, MAX_HEADER_BYTES)
        ends = {text.encode(): text for text in TURN_ENDS}
        lengths, found = {len(text) for text in ends}, {}
        unpack = struct.Struct("<Q").unpack_from
        for number in range(count):
            if position + 8 > limit or (length := unpack(data, position)[0]) > limit - position - 8:
                raise self.wrong(f"string {number:,} of list {key} at byte {position:,} ends beyond byte {limit:,}")
            if length in lengths and (text := ends.get(data[position + 8 : position + 8 + length])) is not None:
                found[text] = number
            position += 8 + length
        self.position = position
        return found

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.wrong(f"general.alignment={short(alignment)} must be a power of two up to {MAX_ALIGNMENT:,}")
        return alignment

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape with rows first, type and offset."""
        name = self.string("the name of a tensor", MAX_NAME_BYTES)
        (count,) = self.numbers("I", f"tensor {name}")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise self.wrong(f"tensor {name} has {count} dimensions, wanted 1 to {MAX_DIMENSIONS}")
        *sizes, kind, offset = self.numbers(f"{count}QIQ", f"tensor {name}")
        if 0 in sizes:
            raise self.wrong(f"tensor {name} has shape {sizes[::-1]}, with no elements")
        return name, tuple(reversed(sizes)), kind, offset

    def placed(self, found: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, StoredTensor]:
        """The tensors with their first byte in the file, where each lies within it and over no other."""
        base = -(-self.position // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        spans: list[tuple[int, int, str]] = []
        for name, shape, kind, offset in found:
            if name in tensors:
                raise self.wrong(f"tensor {name} is there twice")
            num_bytes = self.tensor_bytes(name, shape, kind)
            start = base + offset
            if offset % alignment or start + num_bytes > self.size:
                raise self.wrong(
                    f"tensor {name} {list(shape)} {type_names()[kind]} needs {num_bytes:,} bytes from byte {start:,} "
                    f"on; the file has {self.size:,}, and offsets are multiples of {alignment}"
                )
            tensors[name] = StoredTensor(name, self.path, shape, type_names()[kind], start)
            spans.append((start, start + num_bytes, name))
        spans.sort()
        for (_, end, first), (start, _, second) in pairwise(spans):
            if start < end:
                raise self.wrong(f"tensors {first} and {second} lie over each other at byte {start:,}")
        return tensors

    def tensor_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        if kind not in type_names():
            known = ", ".join(type_names().values())
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {kind}, which is not known here; known: {known}"
            )
        elements, num_bytes = block_sizes(type_names()[kind])
        if shape[-1] % elements:
            raise self.wrong(f"tensor {name} has rows of {shape[-1]:,} numbers in blocks of {elements}")
        return math.prod(shape) // elements * num_bytes
