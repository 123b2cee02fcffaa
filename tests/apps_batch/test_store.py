from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexbatch.apps.jobs.manifest import differences
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.apps.jobs.store import OutputStore
from flexbatch.validation.errors import ConfigurationError

JOB = {"model": {"weights": "a"}, "seed": 0}


def test_the_manifest_refuses_another_job_and_lists_what_differs(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, JOB)
    created = store.created
    store.close()
    again = OutputStore(tmp_path, JOB)
    assert again.created == created
    again.close()
    with pytest.raises(ConfigurationError) as caught:
        OutputStore(tmp_path, {"model": {"weights": "b"}, "new": [1]})
    for line in (
        "model.weights: a in the output, b now",
        "new: absent in the output, [1] now",
        "seed: 0 in the output, absent now",
        "--overwrite",
    ):
        assert line in str(caught.value)


def test_differences_name_leaves() -> None:
    assert list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})) == ["a.c: 2 in the output, 3 now"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    OutputStore(tmp_path, JOB).close()
    (tmp_path / ".flexbatch" / "manifest.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"manifest\.json is damaged"):
        OutputStore(tmp_path, JOB)


def test_one_process_per_shard_and_one_count_of_shards(tmp_path: Path) -> None:
    first = OutputStore(tmp_path, JOB, (0, 2))
    with pytest.raises(ConfigurationError, match="by another process, as shard 0-of-2"):
        OutputStore(tmp_path, JOB, (0, 2))
    with pytest.raises(ConfigurationError, match="by another process, as shard 0-of-2"):
        OutputStore(tmp_path, JOB, (1, 3))
    OutputStore(tmp_path, JOB, (1, 2)).close()
    first.close()
    OutputStore(tmp_path, JOB, (1, 3)).close()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigurationError, match=r"already holds thesis\.doc and no job"):
            OutputStore(tmp_path, JOB, overwrite=overwrite)


def test_overwrite_removes_the_job_and_nothing_else(tmp_path: Path) -> None:
    OutputStore(tmp_path, JOB).close()
    for name in (
        "part-00000.parquet",
        "k=v/part-00001.parquet",
        ".part-00002.parquet.tmp",
        "k=v/notes.txt",
        "part-list.txt",
        "k=v/l=w/part-00003.parquet",
        "of another job/part-00000.parquet",
        "of another job/k=v/part-00001.parquet",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")
    OutputStore(tmp_path, {"other": 1}, overwrite=True).close()
    left = sorted(
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*")
        if path.is_file() and ".flexbatch" not in path.parts
    )
    others = [f"of another job/{name}" for name in ("k=v/part-00001.parquet", "part-00000.parquet")]
    assert left == ["k=v/notes.txt", *others, "part-list.txt"] and not (tmp_path / "k=v" / "l=w").exists()
    assert json.loads((tmp_path / ".flexbatch" / "manifest.json").read_text())["fingerprint"] == {"other": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_column": "a", "prompt_template": "b"}, {"shard": "2/2"}, {"shard": "x"}, {"max_errors": "-1"},
        {"max_errors": "200%"}, {"part_rows": 0}, {"temperature": -1.0}, {"overwrite": True, "shard": "0/2"},
        {"overwrite": True, "retry_failed": True}, {"ray": True, "shard": "0/2"},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigurationError):
        JobConfig(**settings)


def test_error_limits_are_numbers_or_shares() -> None:
    assert JobConfig(max_errors="3").error_limit(1000) == 3
    assert JobConfig(max_errors="0.5%").error_limit(1000) == 5
    assert JobConfig().error_limit(1000) is None
