"""Digests of model files: every byte counts, a second look reads samples alone, and no record outlives what it says."""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flexbatch.models import fingerprint
from flexbatch.models.checkpoint import CheckpointError
from flexbatch.models.fingerprint import OTHER_FILES, WeightFiles, file_digest, model_files_digest
from tests.tiny_models import make_model


def later() -> float:
    """A clock by which every file has been left alone for an hour."""
    return time.time() + 3600


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    make_model("llama", folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


def test_every_file_that_is_read_is_covered(folder: Path) -> None:
    """One byte more in any of them, and the digests differ in that file alone; what is not read does not count."""
    extra = (
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "tokenizer.model",
        "special_tokens_map.json",
    )
    for name in (*extra, "generation_config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for name in ("README.md", "trainer_state.json", "optimizer.pt", "modeling_x.py"):
        (folder / name).write_text("{}")
    before = model_files_digest(folder)
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(before) == wanted | set(extra)
    for name in before:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b"\n")
        after = model_files_digest(folder)
        assert {other for other in after if after[other] != before[other]} == {name}
        (folder / name).write_bytes(content)
    assert model_files_digest(folder) == before


def test_no_tokenizer_of_transformers_reads_another_file() -> None:
    """By the tables of names in its sources."""
    names = {"tokenizer.4.0.json", "chat_template.jinja", "chat_template.json", "tekken.json"}
    for path in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "VOCAB_FILES_NAMES":
                values = node.value.values if isinstance(node.value, ast.Dict) else []
                names |= {value.value for value in values if isinstance(value, ast.Constant)}
    assert len(names) > 12
    assert not [name for name in names if not any(Path(name).match(pattern) for pattern in OTHER_FILES)]


def test_a_retrained_twentieth_gives_another_identity(folder: Path) -> None:
    """Every layer's output projection: the same names, shapes and size, and the same time of the last change."""
    path, first = folder / "model.safetensors", WeightFiles(folder).identity
    tensors, status = load_file(path), path.stat()
    changed = [name for name in tensors if name.endswith("o_proj.weight")]
    assert len(changed) == 3
    for name in changed:
        tensors[name] = tensors[name] + 0.25
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and WeightFiles(folder).identity != first


@pytest.mark.parametrize("size", [1, 4096, fingerprint.CHUNK_BYTES, 2 * fingerprint.CHUNK_BYTES + 77])
def test_every_byte_counts_and_so_does_the_size(size: int, tmp_path: Path) -> None:
    path, chance = tmp_path / "file", random.Random(size)
    content = chance.randbytes(size)
    path.write_bytes(content)
    seen = {file_digest(path)}
    positions = {0, size - 1, *(chance.randrange(size) for _ in range(10))}
    for position in positions:
        changed = bytearray(content)
        changed[position] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        seen.add(file_digest(path))
    for other in (content + b"\0", content[:-1]):
        path.write_bytes(other)
        seen.add(file_digest(path))
    assert len(seen) == 1 + len(positions) + 2


def test_a_copy_is_the_same_model_and_a_shard_less_is_not(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (1, 1))
    assert WeightFiles(copy).identity == WeightFiles(folder).identity
    tensors = load_file(folder / "model.safetensors")
    halves = (sorted(tensors)[::2], sorted(tensors)[1::2])
    (copy / "model.safetensors").unlink()
    for i, names in enumerate(halves):
        save_file({name: tensors[name] for name in names}, copy / f"model-{i}.safetensors")
    index = {name: f"model-{i}.safetensors" for i, names in enumerate(halves) for name in names}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    sharded = WeightFiles(copy)
    assert [path.name for path in sharded.paths] == [
        *("config.json", "model.safetensors.index.json", "model-0.safetensors", "model-1.safetensors")
    ]
    tensors[halves[1][0]] += 1
    save_file({name: tensors[name] for name in halves[1]}, copy / "model-1.safetensors")
    assert WeightFiles(copy).identity != sharded.identity


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the files whose every byte was read."""
    sizes: list[int] = []
    read = fingerprint._read_digest
    monkeypatch.setattr(fingerprint, "_read_digest", lambda file, size: sizes.append(size) or read(file, size))
    return sizes


def test_a_second_start_reads_samples_alone(tmp_path: Path, counted: list[int]) -> None:
    path, records = tmp_path / "weights", tmp_path / "records"
    path.write_bytes(random.Random(1).randbytes(3_000_000))
    first = file_digest(path, records, later)
    assert counted == [3_000_000]
    assert file_digest(path, records, later) == first and counted == [3_000_000]
    moved = path.rename(tmp_path / "elsewhere")
    assert file_digest(moved, records, later) == first and len(counted) == 2, "a record is of one place"
    for record in records.iterdir():
        assert record.stat().st_mode & 0o077 == 0 and records.stat().st_mode & 0o077 == 0


CHANGES = ("in place", "replaced", "mapped", "same mtime")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_equal_size_ends_a_record(change: str, tmp_path: Path, counted: list[int]) -> None:
    """Where no sample lies: 64 samples of 4 KiB leave 46 of 47 bytes of 12 MB unseen."""
    path, records, position = tmp_path / "weights", tmp_path / "records", 100_000
    content = bytearray(random.Random(2).randbytes(12_000_000))
    path.write_bytes(content)
    status = path.stat()
    first = file_digest(path, records, later)
    time.sleep(0.02)  # a tick of the clock, which two seconds are in life
    content[position] ^= 1
    if change == "replaced":
        (tmp_path / "new").write_bytes(content)
        os.replace(tmp_path / "new", path)
    elif change == "mapped":
        mapped = torch.from_file(str(path), shared=True, size=len(content), dtype=torch.uint8)
        mapped[position] ^= 1
        del mapped
    else:
        with path.open("r+b") as file:
            file.seek(position)
            file.write(content[position : position + 1])
    if change in ("same mtime", "replaced"):
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert file_digest(path, records, later) != first and len(counted) == 2


def test_samples_notice_what_the_file_system_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that invents its times."""
    path, records = tmp_path / "weights", tmp_path / "records"
    monkeypatch.setattr(fingerprint.Signature, "of", lambda status: fingerprint.Signature(1, status.st_size, 3, 4))
    path.write_bytes(random.Random(3).randbytes(12_000_000))
    first = file_digest(path, records, later)
    path.write_bytes(random.Random(4).randbytes(12_000_000))
    assert file_digest(path, records, later) != first


def test_a_file_that_has_just_changed_leaves_no_record(tmp_path: Path, counted: list[int]) -> None:
    """Its next change might come within the same tick of the clock. A file from the future is never settled."""
    path, records = tmp_path / "weights", tmp_path / "records"
    path.write_bytes(bytes(100))
    for _ in range(2):
        file_digest(path, records)
    os.utime(path, (time.time() + 9e4, time.time() + 9e4))
    file_digest(path, records, later)
    assert len(counted) == 3 and not records.exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"digest": 5}', bytes(300), b"\xff\xfe", "link", "folder"]
)
def test_a_damaged_record_is_none(content: bytes | str, tmp_path: Path, counted: list[int]) -> None:
    path, records = tmp_path / "weights", tmp_path / "records"
    path.write_bytes(b"12345")
    first = file_digest(path, records, later)
    (record,) = records.iterdir()
    if content == "link":
        shutil.move(record, tmp_path / "target")
        record.symlink_to(tmp_path / "target")
    elif content == "folder":
        record.unlink()
        record.mkdir()
    else:
        record.write_bytes(content)
    assert file_digest(path, records, later) == first and len(counted) == 2
    if content != "folder":
        assert file_digest(path, records, later) == first and len(counted) == 2, "written again"
    assert not list(records.glob("*.tmp"))


def test_records_that_cannot_be_written_cost_reading_alone(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"12345")
    (tmp_path / "records").write_text("no folder")
    assert file_digest(tmp_path / "weights", tmp_path / "records", later) == file_digest(tmp_path / "weights")


def test_weights_that_change_while_they_are_used_are_noticed(folder: Path) -> None:
    files = WeightFiles(folder)
    files.check()
    os.utime(folder / "model.safetensors", (5, 5))
    files.check()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was loaded; start again"):
        files.check()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: No such file"):
        files.check()


def test_a_file_that_changes_under_the_reading_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(5000))
    combined = fingerprint.combined

    def slowly(*arguments: Any) -> str:
        os.utime(path, (7, 7))
        return combined(*arguments)

    monkeypatch.setattr(fingerprint, "combined", slowly)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        file_digest(path)


def test_files_that_change_before_they_are_digested_are_refused(folder: Path) -> None:
    """Tensors may have been read before: they would get the name of what came later."""
    files = WeightFiles(folder, later=True)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="changed while it was loaded"):
        assert files.identity
    assert WeightFiles(folder, later=True).identity == WeightFiles(folder).identity
