"""What a glob finds, and that it reads only folders that it can match: what lies beside them may be huge, unreadable,
or have names that nobody can write."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flexbatch.apps.jobs import listing
from flexbatch.apps.jobs.files import list_files
from flexbatch.validation.errors import ConfigurationError
from tests.apps_batch.helpers import parts_of, run_here

FILES = [
    "a.jsonl",
    "b.jsonl",
    "b.txt",
    "rows_1.jsonl",
    "rows_22.jsonl",
    ".hidden.jsonl",
    "_left/out.jsonl",
    "day=1/a.jsonl",
    "day=1/deep/a.jsonl",
    "day=2/a.jsonl",
    "day=2/_success.jsonl",
    "day=2/.git/a.jsonl",
    "day=3.jsonl/inner.jsonl",  # a folder that is called like a file
    "é/ü.jsonl",
]
DAYS = ["day=1/a.jsonl", "day=2/a.jsonl"]
TOP = ["a.jsonl", "b.jsonl", "rows_1.jsonl", "rows_22.jsonl"]
ALL = [*TOP[:2], DAYS[0], "day=1/deep/a.jsonl", DAYS[1], "day=3.jsonl/inner.jsonl", *TOP[2:], "é/ü.jsonl"]
FOUND = {
    "*.jsonl": TOP,
    "?.jsonl": ["a.jsonl", "b.jsonl"],
    "rows_*.jsonl": ["rows_1.jsonl", "rows_22.jsonl"],
    "day=[12]/*.jsonl": DAYS,
    "rows_?.jsonl": ["rows_1.jsonl"],
    "[ab].jsonl": ["a.jsonl", "b.jsonl"],
    "[!a].jsonl": ["b.jsonl"],
    "[!a]*.jsonl": TOP[1:],
    "b.*": ["b.jsonl", "b.txt"],
    "*": sorted([*TOP, "b.txt"]),
    "*/a.jsonl": DAYS,
    "day=*/a.jsonl": DAYS,
    "day=[!2]/*.jsonl": ["day=1/a.jsonl"],
    "*/*/*": ["day=1/deep/a.jsonl"],
    "*/deep/a.jsonl": ["day=1/deep/a.jsonl"],
    "day=[12]/d*/?.jsonl": ["day=1/deep/a.jsonl"],
    "**": sorted([*ALL, "b.txt"]),
    "**/": sorted([*ALL, "b.txt"]),
    "**/*.jsonl": ALL,
    "**/a.jsonl": ["a.jsonl", DAYS[0], "day=1/deep/a.jsonl", DAYS[1]],
    "*/**/a.jsonl": [DAYS[0], "day=1/deep/a.jsonl", DAYS[1]],
    "day=**.jsonl": [DAYS[0], "day=1/deep/a.jsonl", DAYS[1], "day=3.jsonl/inner.jsonl"],
    "é*/?.jsonl": ["é/ü.jsonl"],
    "": ALL,
}
"""By pattern, the names below its folder."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def names(location: object) -> list[str]:
    return [file.name for file in list_files(str(location))[1]]


def broken(folder: Path) -> Path:
    """A folder with a name in it that is not UTF-8."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        Path(os.fsdecode(bytes(folder) + b"/rows_\xff.jsonl")).write_text("")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    return folder


@pytest.mark.parametrize("pattern", FOUND)
def test_what_is_found(pattern: str, folder: Path) -> None:
    filesystem, files = list_files(f"{folder}/{pattern}")
    assert [file.name for file in files] == FOUND[pattern]
    for file in files:
        path = folder / file.name
        assert (file.path, file.size, file.changed_ns) == (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        assert filesystem.open_input_stream(file.path).read().decode() == file.name


@pytest.mark.parametrize("pattern", FOUND)
def test_another_file_system_finds_the_same(pattern: str, folder: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in FILES:
        memory.pipe(f"/listing/{name}", name.encode())
    assert names(f"memory://listing/{pattern}") == FOUND[pattern]


@pytest.mark.parametrize("pattern", [pattern for pattern in FOUND if pattern and "**" not in pattern])
def test_only_folders_that_can_match_are_read(pattern: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many levels as the pattern has parts, none to look for a name that is given, and none that is hidden."""
    seen, listdir = [], os.listdir
    monkeypatch.setattr(listing.os, "listdir", lambda path: seen.append(os.path.relpath(path, folder)) or listdir(path))
    monkeypatch.setattr(listing.os, "scandir", lambda path: pytest.fail(f"reads all that is below {path}"))
    assert names(f"{folder}/{pattern}") == FOUND[pattern]
    levels = {0 if path == "." else path.count("/") + 1 for path in seen}
    assert levels == {depth for depth, part in enumerate(pattern.split("/")) if set(part) & set("*?[")}
    assert not [path for path in seen if path.startswith(("_", "day=2/.")) or "_left" in path]


@pytest.mark.parametrize("beside", ["far/below/it", "_hidden", "day=2/.git", "other"])
def test_names_that_are_not_utf8_and_cannot_match(beside: str, folder: Path) -> None:
    broken(folder / beside)
    for pattern in ("rows_*.jsonl", "day=*/a.jsonl", "day=[12]/*.jsonl", "*.jsonl"):
        assert names(f"{folder}/{pattern}") == FOUND[pattern]


def test_names_that_are_not_utf8_and_match(folder: Path) -> None:
    broken(folder / "day=1")
    for pattern in ("day=1/*", "*/rows_*", "**/*.jsonl", "**", ""):
        with pytest.raises(
            ConfigurationError, match=r"the name of a file in .* is not UTF-8 \(b'.*rows_\\xff\.jsonl'\)"
        ):
            names(f"{folder}/{pattern}")
    assert names(f"{folder}/**/a.jsonl") == FOUND["**/a.jsonl"]
    assert names(f"{folder}/day=1/?.jsonl") == ["a.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read(folder: Path) -> None:
    (folder / "day=2").chmod(0)
    try:
        assert names(f"{folder}/*.jsonl") == TOP and names(f"{folder}/day=1/*") == ["a.jsonl"]
        for pattern in ("*/a.jsonl", "day=*/*", "**", ""):
            with pytest.raises(ConfigurationError, match=r"cannot be listed.*day=2"):
                names(f"{folder}/{pattern}")
    finally:
        (folder / "day=2").chmod(0o700)


def test_the_error_of_a_folder_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, where root runs the tests."""

    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(listing.os, "listdir", refuse)
    with pytest.raises(ConfigurationError, match=rf"cannot be listed: .*Permission denied: '{folder}"):
        names(f"{folder}/*.jsonl")


def test_links(folder: Path) -> None:
    """To a file and to a folder they are followed; those that lead back or nowhere, and themselves in circles, not."""
    (folder / "to_file.jsonl").symlink_to("a.jsonl")
    (folder / "to_folder").symlink_to("day=1")
    (folder / "day=1" / "back").symlink_to("..")
    (folder / "day=1" / "here").symlink_to(".")
    (folder / "nowhere.jsonl").symlink_to("gone")
    (folder / "circle.jsonl").symlink_to("circle.jsonl")
    assert names(f"{folder}/*.jsonl") == sorted([*TOP, "to_file.jsonl"])
    assert names(f"{folder}/*/a.jsonl") == [*DAYS, "to_folder/a.jsonl"]
    linked = ["to_file.jsonl", "to_folder/a.jsonl", "to_folder/deep/a.jsonl"]
    assert names(folder) == sorted([*ALL, *linked])
    os.mkfifo(folder / "pipe.jsonl")
    assert names(f"{folder}/[!t]*.jsonl") == TOP


@pytest.mark.parametrize("pattern", ["*/", "day=*/", "day=1/*/"])
def test_folders_are_no_files(pattern: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="ends with a slash stands for folders"):
        names(f"{folder}/{pattern}")


def test_a_file_with_wildcards_in_its_name(folder: Path) -> None:
    (folder / "x[1]*.jsonl").write_text("{}")
    assert names(f"{folder}/x[1]*.jsonl") == ["x[1]*.jsonl"]


def test_a_job_beside_a_tree_of_strange_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken(tmp_path / "other" / "three" / "below")
    for number in (1, 2):
        (tmp_path / f"rows_{number}.jsonl").write_text(f'{{"prompt": "p{number}"}}\n')
    assert run_here(f"{tmp_path}/rows_*.jsonl", tmp_path / "out") == 0, capsys.readouterr().err
    assert sum(pq.read_table(path.open("rb")).num_rows for path in parts_of(tmp_path / "out")) == 2
