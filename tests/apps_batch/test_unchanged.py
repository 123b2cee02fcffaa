"""Files of the input that change while a job runs: rows of two versions never mix, and what is the same serves on."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexbatch.apps.jobs.files import SourceError
from flexbatch.apps.jobs.layout import plan_parts
from flexbatch.apps.jobs.plan import open_source
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.apps.jobs.sources import read_parts
from tests.apps_batch.fake import FakeLLM
from tests.apps_batch.helpers import parts_of, read_output, run_here

KINDS = ("parquet", "csv", "jsonl", "jsonl.gz")
FILES, ROWS = 3, 60


def packed(kind: str, word: str, number: int, rows: Iterable[int] = range(ROWS)) -> bytes:
    """A file of rows with a word; with another word it has the same size, as far as its kind lets it."""
    texts = [f"{word} {number} {row:03}" for row in rows]
    if kind == "parquet":
        pq.write_table(pa.table({"prompt": texts}), buffer := pa.BufferOutputStream(), row_group_size=10)
        return buffer.getvalue().to_pybytes()
    lines = ["prompt", *texts] if kind == "csv" else [json.dumps({"prompt": text}) for text in texts]
    data = "".join(f"{line}\n" for line in lines).encode()
    return gzip.compress(data) if kind.endswith("gz") else data


def write(folder: Path, kind: str, word: str) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(FILES):
        (folder / f"{number}.{kind}").write_bytes(packed(kind, word, number))


def change(folder: Path, kind: str, how: str) -> None:
    """Does to every file what programs do to files that others read."""
    for path in sorted(folder.iterdir()):
        if how == "touched":
            os.utime(path)
        elif how == "copied over itself":
            path.write_bytes(path.read_bytes())
        elif how == "grown":
            more = packed(kind, "new", 0)
            path.write_bytes(path.read_bytes() + (more.partition(b"\n")[2] if kind == "csv" else more))
        elif how == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            new = packed(kind, "new", int(path.name[0]))
            if how == "replaced":
                path.unlink()
            path.write_bytes(new)


@pytest.mark.parametrize("how", ["touched", "copied over itself", "grown", "cut", "rewritten", "replaced"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sent", [False, True])
def test_rows_are_those_that_the_job_began_with(kind: str, how: str, sent: bool, tmp_path: Path) -> None:
    if kind == "parquet" and how == "grown":
        pytest.skip("what has no footer at its end is no Parquet")
    write(tmp_path / "in", kind, "old")
    source = open_source(str(tmp_path / "in"), JobConfig())
    if sent:  # to an actor
        source = pickle.loads(pickle.dumps(source))
    rows: list[str] = []
    wanted = [f"old {number} {row:03}" for number in range(FILES) for row in range(ROWS)]
    stream = read_parts(source, plan_parts(source.row_groups, 7))
    rows += next(stream)[1]["prompt"].to_pylist()
    change(tmp_path / "in", kind, how)
    if how in ("touched", "copied over itself", "grown"):
        for _, table in stream:
            rows += table["prompt"].to_pylist()
        assert rows == wanted
        return
    with pytest.raises(SourceError, match=r"\d\.\S+ has changed since the job began|\d\.\S+: .* cannot be read"):
        for _, table in stream:
            rows += table["prompt"].to_pylist()
    assert 7 <= len(rows) < len(wanted) and rows == wanted[: len(rows)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_goes_on_when_the_old_files_are_back(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in", kind, "old")
    words = [tmp_path / "in", tmp_path / "out", "--part-rows", 10, "--window-rows", 4, "--max-tokens", 4]

    class Meanwhile(FakeLLM):
        def stream(self, items, on_tokens=None):  # type: ignore[no-untyped-def]
            for count, pair in enumerate(super().stream(items)):
                if count == 10:
                    change(tmp_path / "in", kind, "rewritten")
                yield pair

    assert run_here(*words, fake=Meanwhile(block=4)) == 1
    assert "has changed since the job began" in (said := capsys.readouterr().err) and "resume with" in said
    assert parts_of(tmp_path / "out")
    assert run_here(*words) == 2 and "belongs to another job" in capsys.readouterr().err
    write(tmp_path / "in", kind, "old")
    assert run_here(*words) == 0
    assert read_output(tmp_path / "out")["prompt"].to_pylist() == [
        f"old {number} {row:03}" for number in range(FILES) for row in range(ROWS)
    ]
