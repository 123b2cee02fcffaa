"""GGUF files that lie: a CheckpointError that names the file, in little time and memory, whatever the bytes are."""

from __future__ import annotations

import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flexbatch.models.gguf.header import read_header
from flexbatch.models.opened import open_model
from flexbatch.validation.errors import CheckpointError
from tests.gguf_writer import write_gguf
from tests.tiny_models import make_model, make_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
GIB = 2**30


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("sound")
    model = make_model("llama", folder, tokenizer=False, **SIZES)
    kinds = {"attn_q": "Q4_0", "attn_k": "Q4_1", "ffn_up": "Q8_0", "ffn_down": "Q5_1"}
    write_gguf(
        model,
        folder / "sound.gguf",
        kind_of=lambda name: kinds.get(name.split(".")[-2], "F16"),
        tokenizer=make_tokenizer(),
        chat_template="{{ messages }}",
    )
    return (folder / "sound.gguf").read_bytes()


def read_everything(path: Path) -> None:
    """All that an engine reads of a model."""
    model = open_model(str(path))
    assert model.arch.num_layers
    for _ in model.pieces(set(), 0, torch.float32, packed=True):
        pass
    assert model.prequantized is not None
    assert len(model.tokenizer) > 0


def text(value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(
    name: str, sizes: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, dimensions: int | None = None
) -> bytes:
    count = len(sizes) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, offset)


def file_of(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: int = 1024,
    counts: tuple[int, int] | None = None,
) -> bytes:
    keys = (key("general.architecture", 8, text("llama")), *keys)
    number = (len(tensors), len(keys)) if counts is None else counts
    head = b"GGUF" + struct.pack("<IQQ", 3, *number) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file: it has 0 bytes"),
    "magic": (b"GGML" + bytes(100), "begins with b'GGML'"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(8), "version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(8), "big-endian"),
    "many keys": (file_of(counts=(0, 2**60)), "counts 1,152,921,504,606,846,976 keys"),
    "many tensors": (file_of(counts=(2**63, 1)), "counts 9,223,372,036,854,775,808 tensors"),
    "more keys than bytes": (file_of(counts=(0, 1000)), "counts 1,000 keys"),
    "a key of 2 GiB": (file_of((struct.pack("<Q", 2 * GIB),)), "a key at byte .* length of 2,147,483,648 bytes"),
    "a string of 2 GiB": (file_of((key("a", 8, struct.pack("<Q", 2 * GIB)),)), "a at byte .* 2,147,483,648 bytes"),
    "a string of 2^64": (file_of((key("a", 8, struct.pack("<Q", 2**64 - 1)),)), "18,446,744,073,709,551,615 bytes"),
    "a string beyond the end": (file_of((key("a", 8, struct.pack("<Q", 5000)),)), "a of 5,000 bytes .* ends beyond"),
    "no text": (file_of((key("a", 8, text(b"\xff\xfe")),)), "is not UTF-8"),
    "a type": (file_of((key("a", 13, b""),)), "type 13; types are 0 to 12"),
    "a list of many": (file_of((key("a", 9, array(0, 2**61)),)), "counts 2,305,843,009,213,693,952 elements"),
    "a list beyond the end": (file_of((key("a", 9, array(12, 10**6)),)), "8,000,000 bytes"),
    "strings beyond the end": (file_of((key("a", 9, array(8, 10**6)),), data=64), "string .* of list a .* ends beyond"),
    "strings of 2^63": (file_of((key("a", 9, array(8, 2, struct.pack("<QQ", 2**63, 2**63))),)), "string 0 of list a"),
    "lists in a list": (file_of((key("a", 9, array(9, 1, array(0, 0))),)), "elements of type 9"),
    "a key twice": (file_of((key("a", 0, b"1"), key("a", 0, b"2"))), "key a is there twice"),
    "an alignment of 0": (file_of((key("general.alignment", 4, struct.pack("<I", 0)),)), "general.alignment=0"),
    "an alignment of 48": (file_of((key("general.alignment", 4, struct.pack("<I", 48)),)), "general.alignment=48"),
    "an alignment of text": (file_of((key("general.alignment", 8, text("32")),)), "general.alignment='32'"),
    "a tensor twice": (file_of(tensors=(tensor("t"), tensor("t", offset=32))), "tensor t is there twice"),
    "tensors over each other": (file_of(tensors=(tensor("t", (16,)), tensor("u", offset=32))), "t and u lie over each"),
    "beyond the end": (file_of(tensors=(tensor("t", (8,), offset=1024),)), r"tensor t \[8\] F32 needs 32 bytes"),
    "an offset of 2^64": (file_of(tensors=(tensor("t", offset=2**64 - 32),)), "needs 32 bytes from byte 18,446"),
    "off the alignment": (file_of(tensors=(tensor("t", offset=4),)), "offsets are multiples of 32"),
    "sizes that overflow": (file_of(tensors=(tensor("t", (2**32, 2**32)),)), "needs 73,786,976,294,838,206,464 bytes"),
    "no size": (file_of(tensors=(tensor("t", (8, 0)),)), "no elements"),
    "no dimensions": (file_of(tensors=(tensor("t", ()),)), "has 0 dimensions"),
    "many dimensions": (file_of(tensors=(tensor("t", (1,), dimensions=2**31),)), "has 2147483648 dimensions"),
    "an unknown type": (file_of(tensors=(tensor("t", kind=99),)), "type 99, which is not known"),
    "an integer type": (file_of(tensors=(tensor("t", kind=24),)), "type 24, which is not known"),
    "cut blocks": (file_of(tensors=(tensor("t", (33,), kind=2),)), "rows of 33 numbers in blocks of 32"),
    "a name of 1 MB": (file_of(tensors=(tensor("t" * 2**20),)), "the name of a tensor .* the most is 1,024"),
    "no architecture": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("a", 0, b"1") + bytes(64),
        "general.architecture is missing",
    ),
    "nothing else": (file_of(), "lacks llama.block_count"),
    "an unknown architecture": (file_of((key("b", 0, b"1"),)).replace(b"llama", b"lhama"), "'lhama' is unknown; known"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lies_are_told_apart(name: str, tmp_path: Path) -> None:
    content, message = LIES[name]
    path = tmp_path / "lying.gguf"
    path.write_bytes(content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(str(path))
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024, "KiB"
    assert time.process_time() - start < 10


def test_a_list_of_long_strings_in_a_sparse_file(tmp_path: Path) -> None:
    """4 GiB of a file without content: a header is not read beyond 128 MiB."""
    path = tmp_path / "sparse.gguf"
    strings = key("a", 9, array(8, 4, struct.pack("<Q", GIB)))
    path.write_bytes(file_of((strings,), data=0))
    with open(path, "r+b") as file:
        file.truncate(4 * GIB)
    with pytest.raises(CheckpointError, match="ends beyond byte 134,217,728"):
        read_header(path)


CHANGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "fewer layers than tensors": ("llama.block_count", lambda value: struct.pack("<I", 10**6)),
    "no heads": ("llama.attention.head_count", lambda value: struct.pack("<I", 0)),
    "heads that do not divide": ("llama.attention.head_count", lambda value: struct.pack("<I", 3)),
    "another width": ("llama.embedding_length", lambda value: struct.pack("<I", 64)),
    "a rotation of part": ("llama.rope.dimension_count", lambda value: struct.pack("<I", 8)),
    "no context": ("llama.context_length", lambda value: struct.pack("<I", 0)),
    "values of another size": ("llama.attention.value_length", lambda value: struct.pack("<I", 8)),
    "an epsilon that is none": (
        "llama.attention.layer_norm_rms_epsilon",
        lambda value: struct.pack("<f", float("nan")),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_metadata_that_contradicts_the_tensors(name: str, sound: bytes, tmp_path: Path) -> None:
    field, change = CHANGES[name]
    start = sound.index(text(field)) + len(text(field)) + 4
    path = tmp_path / "changed.gguf"
    path.write_bytes(sound[:start] + change(sound[start : start + 4]) + sound[start + 4 :])
    with pytest.raises(CheckpointError, match=str(path)):
        read_everything(path)


def test_every_cut_is_noticed(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for length in (*range(0, len(sound) // 4, 997), len(sound) - 1, len(sound) // 2):
        path.write_bytes(sound[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            read_everything(path)


EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**60, 2**63, 2**64 - 1)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A few changes, most of them in the header."""
    data = bytearray(content)
    header = content.index(b"token_embd.weight") + 2000
    for _ in range(draw.choice((1, 1, 2, 5))):
        position = draw.randrange(min(len(data), header if draw.random() < 0.85 else len(data)))
        length = draw.choice((1, 4, 8, 100, 3000))
        change = draw.randrange(7)
        if change == 0:
            data[position] ^= 1 << draw.randrange(8)
        elif change == 1:
            data[position] = draw.randrange(256)
        elif change == 2:
            data[position : position + 8] = struct.pack("<Q", draw.choice(EXTREMES))
        elif change == 3:
            data[position : position + 4] = struct.pack("<I", draw.choice(EXTREMES) % 2**32)
        elif change == 4:
            del data[position : position + length]
        elif change == 5:
            data[position:position] = data[position : position + length]
        else:
            data[position : position + length] = bytes(min(length, len(data) - position))
        if len(data) < 2:
            break
    return bytes(data)


@pytest.mark.parametrize("part", [pytest.param(n, marks=[pytest.mark.slow] * (n > 0)) for n in range(10)])
def test_two_thousand_mutations(part: int, sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(sound)
    read_everything(path)
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for number in range(200):
        path.write_bytes(mutated(sound, random.Random(1000 * part + number)))
        try:
            read_everything(path)
        except CheckpointError as error:
            assert str(path) in str(error), f"mutation {number}: {error}"
            refused += 1
    assert 50 < refused < 200, "mutations that all do the same would prove nothing"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024, "KiB"
