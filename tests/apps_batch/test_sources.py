from __future__ import annotations

import io
import json
import pickle
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexbatch.apps.jobs.files import SourceError, list_files, partition_values
from flexbatch.apps.jobs.layout import plan_parts
from flexbatch.apps.jobs.plan import open_source
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.apps.jobs.sources import RowSource, read_parts
from flexbatch.apps.jobs.text_source import chunks_of
from flexbatch.validation.errors import ConfigurationError
from tests.apps_batch.invariants import check_layout


def source_of(location: object, **settings: object) -> RowSource:
    return open_source(str(location), JobConfig(**settings))  # type: ignore[arg-type]


def rows_in_parts(source: RowSource, part_rows: int, every: int = 1) -> list[dict]:
    parts = plan_parts(source.row_groups, part_rows)
    check_layout(parts, source.row_groups)
    rows = []
    for part, table in read_parts(source, parts[::every]):
        assert len(table) == part.rows and table.schema.equals(source.schema)
        rows += table.to_pylist()
    return rows


def test_a_source_that_has_read_can_go_to_another_process(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(9)}), tmp_path / "x.parquet")
    source = source_of(tmp_path)
    assert rows_in_parts(source, 5) == rows_in_parts(pickle.loads(pickle.dumps(source)), 5)


@pytest.mark.parametrize("part_rows", [1, 7, 40, 1000])
def test_row_groups_of_many_files_come_in_order(tmp_path: Path, part_rows: int) -> None:
    for name, first, group in (("a", 0, 9), ("b", 50, 50), ("c", 100, 1)):
        pq.write_table(pa.table({"n": range(first, first + 50)}), tmp_path / f"{name}.parquet", row_group_size=group)
    source = source_of(tmp_path)
    assert [row["n"] for row in rows_in_parts(source, part_rows)] == list(range(150))
    skipped = rows_in_parts(source, part_rows, every=2)
    assert [row["n"] for row in skipped] == [n for n in range(150) if n // part_rows % 2 == 0]


def test_types_survive(tmp_path: Path) -> None:
    table = pa.table(
        {
            "d": pa.array(["x", "y", None]).dictionary_encode(),
            "t": pa.array([datetime(2024, 1, 1, tzinfo=timezone.utc)] * 3, pa.timestamp("us", "Europe/Berlin")),
            "nested": pa.array([[{"a": [1]}], None, []], pa.list_(pa.struct([("a", pa.list_(pa.int8()))]))),
            "nothing": pa.nulls(3),
            "bytes": pa.array([b"\xff\x00", None, b""]),
            "money": pa.array([1, None, 3], pa.decimal128(10, 2)),
            "large": pa.array(["a", "b", "c"], pa.large_string()),
            "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int32())),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    source = source_of(tmp_path / "x.parquet")
    assert source.schema.equals(table.schema)
    assert rows_in_parts(source, 2) == table.to_pylist()


def test_hive_folders_hidden_files_and_globs(tmp_path: Path) -> None:
    for name in (
        "year=2024/lang=de/x.parquet",
        "year=2024/lang=%C3%A9/x.parquet",
        "year=2025/x.parquet",
        "_tmp/x.parquet",
        ".hid.parquet",
        "plain/y.parquet",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"a": [name]}), tmp_path / name)
    (tmp_path / "readme.txt").write_text("no data")
    source = source_of(tmp_path)
    assert [group.folder for group in source.row_groups] == [
        "",
        "year=2024/lang=%C3%A9",
        "year=2024/lang=de",
        "year=2025",
    ]
    assert partition_values("year=2024/lang=%C3%A9") == {"year": "2024", "lang": "é"}
    assert partition_values("a=__HIVE_DEFAULT_PARTITION__") == {"a": None}

    def names(pattern: str) -> list[str]:
        return [file.name for file in list_files(f"{tmp_path}/{pattern}")[1]]

    assert names("year=*/*.parquet") == ["year=2025/x.parquet"]
    assert names("**/x.parquet") == [
        "year=2024/lang=%C3%A9/x.parquet",
        "year=2024/lang=de/x.parquet",
        "year=2025/x.parquet",
    ]
    assert names("year=202[!4]/?.parquet") == ["year=2025/x.parquet"]
    with pytest.raises(ConfigurationError, match="does not exist"):
        names("nowhere")
    with pytest.raises(ConfigurationError, match="no Parquet, CSV or JSONL"):
        names("nowhere*")


def test_uris_go_through_file_systems(tmp_path: Path) -> None:
    import fsspec

    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1, 2]}), sink)
    fsspec.filesystem("memory").pipe("/bucket/k=v/x.parquet", sink.getvalue())
    source = source_of("memory://bucket")
    assert rows_in_parts(source, 1) == [{"a": 1}, {"a": 2}] and source.row_groups[0].folder == "k=v"
    (tmp_path / "x.parquet").write_bytes(sink.getvalue())
    assert rows_in_parts(source_of(f"file://{tmp_path}/*.parquet"), 5) == [{"a": 1}, {"a": 2}]
    with pytest.raises(ConfigurationError, match="no file system"):
        source_of("nonsense://x")


def test_files_with_other_columns_are_united_and_misfits_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([1], pa.int32())}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"b": ["x"], "a": [2]}), tmp_path / "2.parquet")
    assert rows_in_parts(source_of(tmp_path), 9) == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]
    pq.write_table(pa.table({"a": ["text"]}), tmp_path / "3.parquet")
    with pytest.raises(ConfigurationError, match=r"3\.parquet: its columns do not fit"):
        source_of(tmp_path)


def test_what_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ConfigurationError, match=r"x\.parquet: not a readable Parquet file"):
        source_of(tmp_path)
    pq.write_table(pa.table({}), tmp_path / "x.parquet")
    with pytest.raises(ConfigurationError, match="has no columns"):
        source_of(tmp_path)
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "x.parquet")
    with pytest.raises(ConfigurationError, match="column names repeat: a"):
        source_of(tmp_path)
    (tmp_path / "x.csv").write_text("a\n1\n")
    with pytest.raises(ConfigurationError, match="several kinds"):
        source_of(tmp_path)


def test_a_damaged_row_group_and_a_file_that_is_gone_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"a": [f"row {i}" for i in range(300)]}),
        path,
        row_group_size=100,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    data = bytearray(path.read_bytes())
    position = data.index(b"row 150")
    data[position : position + 7] = b"ROW 150"
    path.write_bytes(data)
    source = source_of(path)
    stream = read_parts(source, plan_parts(source.row_groups, 100))
    assert next(stream)[1]["a"][0].as_py() == "row 0"
    with pytest.raises(SourceError, match=r"x\.parquet: row group 1 cannot be read"):
        next(stream)
    source = source_of(path)
    path.unlink()
    with pytest.raises(SourceError, match="row group 0 cannot be read"):
        next(read_parts(source, plan_parts(source.row_groups, 100)))


def test_csv_cells_are_text_unless_the_user_types_them(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('n,f,b,t,zip,empty\n1,1,true,"a\nb",02139,\n2,1.10,False,,x1,""\n')
    source = source_of(tmp_path / "x.csv")
    assert set(source.schema.types) == {pa.string()}
    assert rows_in_parts(source, 1) == [
        {"n": "1", "f": "1", "b": "true", "t": "a\nb", "zip": "02139", "empty": ""},
        {"n": "2", "f": "1.10", "b": "False", "t": "", "zip": "x1", "empty": ""},
    ]
    types = ("n=int64", "f=decimal(5,2)", "b=bool", "empty=float64")
    assert rows_in_parts(source_of(tmp_path / "x.csv", column_types=types), 1) == [
        {"n": 1, "f": Decimal("1.00"), "b": True, "t": "a\nb", "zip": "02139", "empty": None},
        {"n": 2, "f": Decimal("1.10"), "b": False, "t": "", "zip": "x1", "empty": None},
    ]
    (tmp_path / "y.tsv").write_text("a\tb\n")
    assert source_of(tmp_path / "y.tsv").row_groups[0].rows == 0


class Opened:
    """A file system that counts how often a file is opened to be read from its beginning."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem, self.times = filesystem, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._filesystem, name)

    def open_input_stream(self, path: str) -> Any:
        self.times += 1
        return self._filesystem.open_input_stream(path)


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".zst"])
def test_json_lines_in_chunks(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed file is unpacked once for all the chunks that are read in order."""
    monkeypatch.setattr(
        "flexbatch.apps.jobs.text_source.chunks_of", lambda stream, path, max_line: chunks_of(stream, path, 100)
    )
    rows = [
        {"n": i, "when": "2024-01-01T00:00:00", "m": [{"role": "user", "content": "ü" * (i % 5)}]} for i in range(40)
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    path = tmp_path / f"x.jsonl{ending}"
    with pa.output_stream(str(path), compression="detect") as file:
        file.write(text)
    source: Any = source_of(path)
    assert len(source.row_groups) > 10
    source._filesystem = opened = Opened(source._filesystem)
    assert rows_in_parts(source, 7) == rows and opened.times == bool(ending)
    assert rows_in_parts(source, 7, every=3) == [row for i, row in enumerate(rows) if i // 7 % 3 == 0]
    assert opened.times == 2 * bool(ending)
    source._filesystem = opened._filesystem
    assert rows_in_parts(pickle.loads(pickle.dumps(source)), 7) == rows
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SourceError, match="has changed since the job began"):
        rows_in_parts(source, 7)


def test_a_saved_data_set_and_its_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"prompt": [f"p{i}" for i in range(2300)]})
    data.save_to_disk(str(tmp_path / "one"))
    source = source_of(tmp_path / "one")
    assert [group.rows for group in source.row_groups] == [1000, 1000, 300]
    assert [row["prompt"] for row in rows_in_parts(source, 170)] == [f"p{i}" for i in range(2300)]
    datasets.DatasetDict({"train": data, "test": data.select(range(5))}).save_to_disk(str(tmp_path / "two"))
    assert sum(group.rows for group in source_of(tmp_path / "two", split="test").row_groups) == 5
    with pytest.raises(ConfigurationError, match="splits train, test: choose one"):
        source_of(tmp_path / "two")
    with pytest.raises(ConfigurationError, match="no split 'x'"):
        source_of(tmp_path / "two", split="x")


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    identities = []
    for values in ([1, 2], [1, 3], [1, 2]):
        pq.write_table(pa.table({"a": values}), path)
        identities.append(source_of(path).identity)
    assert identities[0] == identities[2] != identities[1]
