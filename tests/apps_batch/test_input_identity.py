"""What a job's answers depend on is in its fingerprint: a change is refused, by name, before anything is mixed."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from flexbatch.apps.jobs import content
from flexbatch.apps.jobs.plan import open_source
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.validation.errors import ConfigurationError
from tests.apps_batch.fake import FakeLLM
from tests.apps_batch.helpers import read_output, run_here

ROWS = 600


def write_parquet(path: Path, prompts: list[str], **settings: Any) -> None:
    """Uncompressed and without dictionary, so that equal lengths give equal sizes."""
    table = pa.table({"id": range(len(prompts)), "prompt": prompts})
    pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=200, **settings)


def prompts_of(text: str = "prompt") -> list[str]:
    return [f"{text} {row:05d}" for row in range(ROWS)]


def swapped(values: list[str]) -> list[str]:
    """Two in the middle of a row group change places: sizes, counts and statistics stay."""
    values = list(values)
    values[310], values[311] = values[311], values[310]
    return values


def one_letter(values: list[str]) -> list[str]:
    return [*values[:450], "prompt 00450"[:-1] + "x", *values[451:]] if values[450] == "prompt 00450" else values


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {"swapped": swapped, "one letter": one_letter}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "settings", [{}, {"write_page_checksum": True}, {"write_statistics": False}, {"data_page_version": "2.0"}]
)
def test_a_rewritten_file_of_equal_size_statistics_and_time_is_refused(
    tmp_path: Path, change: str, settings: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.parquet", tmp_path / "out"
    write_parquet(source, prompts_of(), **settings)
    before, groups = source.stat(), pq.read_metadata(source).to_dict()["row_groups"]
    assert run_here(source, out, "--part-rows", 50, fail_after=200) == 1
    kept = read_output(out)
    write_parquet(source, CHANGES[change](prompts_of()), **settings)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_size == before.st_size and pq.read_metadata(source).to_dict()["row_groups"] == groups
    assert run_here(source, out, "--part-rows", 50) == 2
    err = capsys.readouterr().err
    assert "belongs to another job" in err and "input.files.in.parquet.content: sha256" in err and "rows:" not in err
    assert read_output(out).equals(kept)
    write_parquet(source, prompts_of(), **settings)
    engine = FakeLLM()
    assert run_here(source, out, "--part-rows", 50, fake=engine) == 0 and engine.prompts_seen < ROWS
    assert read_output(out)["prompt"].to_pylist() == prompts_of()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "openai", "dataset"])
def test_other_inputs_of_equal_size_are_refused(tmp_path: Path, kind: str) -> None:
    source, out = tmp_path / {"dataset": "in", "csv": "in.csv"}.get(kind, "in.jsonl"), tmp_path / "out"

    def write(prompts: list[str]) -> None:
        if kind == "csv":
            source.write_text("\n".join(["prompt", *prompts, ""]))
        elif kind == "jsonl":
            source.write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
        elif kind == "openai":
            line = '{{"custom_id": "{0}", "method": "POST", "url": "/v1/completions", "body": {{"prompt": "{1}"}}}}\n'
            source.write_text("".join(line.format(index, prompt) for index, prompt in enumerate(prompts)))
        else:
            datasets = pytest.importorskip("datasets")
            state = (source / "state.json").read_bytes() if source.exists() else None
            shutil.rmtree(source, ignore_errors=True)
            datasets.Dataset.from_dict({"prompt": prompts}).save_to_disk(str(source))
            if state is not None:
                (source / "state.json").write_bytes(state)

    words = (source, out, *(("--input-format", "openai") if kind == "openai" else ()))
    write(prompts_of())
    assert run_here(*words) == 0
    write(swapped(prompts_of()))
    assert run_here(*words) == 2
    write(prompts_of())
    assert run_here(*words) == 0


def identity_of(path: object) -> dict[str, Any]:
    source = open_source(str(path), JobConfig())
    return next(iter(source.identity["files"].values()))


def test_a_copy_that_was_touched_is_the_same_input(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", prompts_of())
    before = identity_of(tmp_path / "x.parquet")
    (tmp_path / "other").mkdir()
    shutil.copyfile(tmp_path / "x.parquet", tmp_path / "other" / "x.parquet")
    os.utime(tmp_path / "x.parquet", (1, 1))
    assert identity_of(tmp_path / "x.parquet") == before == identity_of(tmp_path / "other" / "x.parquet")
    assert set(before) == {"rows", "bytes", "content"}


def test_an_input_too_large_to_be_read_whole_is_known_by_samples_and_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, prompts_of())
    monkeypatch.setattr(content, "WHOLE_BYTES", path.stat().st_size - 1)
    os.utime(path, (1000, 1000))
    before = identity_of(path)
    assert set(before) == {"rows", "bytes", "samples", "changed", "footer"} and identity_of(path) == before
    os.utime(path, (1000, 1001))
    assert {name for name, value in identity_of(path).items() if value != before[name]} == {"changed"}
    write_parquet(path, swapped(prompts_of()))
    os.utime(path, (1000, 1000))
    assert {name for name, value in identity_of(path).items() if value != before[name]} == {"samples"}


@pytest.mark.parametrize(
    ("says", "known_by"),
    [
        ({"ETag": '"abc"'}, {"version": "etag abc"}),
        ({"etag": "abc", "VersionId": "7"}, {"version": "etag abc, versionid 7"}),
        ({"generation": 12}, {"version": "generation 12"}),
        ({"ETag": 'W/"abc"'}, None),
        ({"ETag": None}, None),
        ({"VersionId": "null"}, None),
        ({"created": 1, "mtime": 5}, None),
        ({}, None),
    ],
)
def test_object_stores_say_which_version_they_serve_and_others_are_read(says: dict, known_by: dict | None) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")

    class Store(type(memory)):  # type: ignore[misc]
        cachable = False

        def info(self, path: str, **words: object) -> dict:
            found = super().info(path, **words)
            return {"name": found["name"], "size": found["size"], "type": found["type"], **says}

    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b"]}), sink)
    memory.pipe("/bucket/x.parquet", sink.getvalue())
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(Store()))
    file = content.InputFile("bucket/x.parquet", "x.parquet", len(sink.getvalue()))
    with filesystem.open_input_file(file.path) as handle:
        first = content.content(filesystem, file, handle, True)
    memory.pipe("/bucket/x.parquet", sink.getvalue().replace(b"a", b"c", 1))
    with filesystem.open_input_file(file.path) as handle:
        second = content.content(filesystem, file, handle, True)
    memory.rm("/bucket", recursive=True)
    if known_by is None:
        assert set(first) == {"content"} and first != second
    else:
        assert first == second == known_by


def test_a_file_that_is_written_meanwhile_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.parquet cannot be read"):
        content.local_digest(str(tmp_path / "gone.parquet"))


NOT_ANSWERS = {
    "prompts", "output", "dry_run", "window_rows", "retry_failed", "retry_truncated",
    "max_errors", "overwrite", "metrics_file",
    "shard", "ray", "ray_actors", "ray_address", "ray_cpus",
}  # fmt: skip
BY_THE_INPUT = {"input_format", "dataset_config", "split"}
BY_THE_LAYOUT = {"part_rows"}
OTHER_VALUES: dict[str, Any] = {
    "max_tokens": 3, "temperature": 0.5, "top_p": 0.5, "top_k": 7, "stop": ("x",), "logprobs": 2, "truncate": "left",
    "generated_tokens": True, "output_prefix": "y_", "limit": 3, "n": 2, "min_p": 0.1, "prompt_logprobs": 1,
    "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5, "stop_token_ids": (3,),
    "allowed_token_ids": (3,), "bad_words": ("x",), "min_tokens": 2, "ignore_eos": True, "skip_special_tokens": False,
    "include_stop_str_in_output": True, "choice": ("x",), "regex": "x",
    "json_schema": str(Path(__file__).parents[1] / "data" / "person.schema.json"),
    "disable_any_whitespace": True, "parse_json": True,
}  # fmt: skip
SCHEMA = {"json_schema": OTHER_VALUES["json_schema"]}
WITH = {"disable_any_whitespace": SCHEMA, "parse_json": SCHEMA}
"""What a setting needs beside it."""


def test_every_setting_is_either_in_the_fingerprint_or_changes_no_answer() -> None:
    for field in dataclasses.fields(JobConfig):
        if field.name in NOT_ANSWERS | BY_THE_INPUT | BY_THE_LAYOUT:
            continue
        value = OTHER_VALUES.get(field.name, ("a=string",) if field.name == "column_types" else "a")
        beside = WITH.get(field.name, {})
        changed, unchanged = JobConfig(**{field.name: value}, **beside), JobConfig(**beside)
        # What is given goes into the fingerprint with what the model's generation_config.json adds to it.
        assert (changed.identity(), changed.given()) != (unchanged.identity(), unchanged.given()), field.name


@pytest.mark.parametrize("placement", ["flexbatch.apps.jobs.plan.SAMPLING_RULES", "flexbatch.apps.jobs.plan.FORMAT"])
def test_versions_of_rules_and_files_are_part_of_a_job(
    tmp_path: Path, placement: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "in.parquet", prompts_of()[:5])
    assert run_here(tmp_path / "in.parquet", tmp_path / "out") == 0
    monkeypatch.setattr(placement, 1000)
    assert run_here(tmp_path / "in.parquet", tmp_path / "out") == 2
    name = "sampling" if "SAMPLING" in placement else "output folder"
    assert f"versions.{name}: " in capsys.readouterr().err
