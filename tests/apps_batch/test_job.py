"""Whole jobs with the fake engine in this process."""

from __future__ import annotations

import os
import signal
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest

from flexbatch.apps.jobs.plan import plan_job
from flexbatch.apps.jobs.preview import preview
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.apps.jobs.sources import read_parts
from flexbatch.config import EngineConfig
from flexbatch.request import SamplingParams
from tests.apps_batch.fake import FakeLLM, FakeTokenizer, fake_tokens
from tests.apps_batch.helpers import RESULTS, parts_of, read_output, run_here, write_input


def test_every_row_once_in_order_with_its_own_text(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(200)]
    source = write_input(tmp_path / "in.parquet", prompts)
    assert run_here(source, tmp_path / "out", "--temperature", 0, "--part-rows", 30) == 0
    table = read_output(tmp_path / "out")
    assert table["id"].to_pylist() == list(range(200)) and table["prompt"].to_pylist() == prompts
    tokenizer, params = FakeTokenizer(), SamplingParams(max_tokens=64, temperature=0)
    for row in table.to_pylist():
        ids = tokenizer(row["prompt"])["input_ids"]
        tokens = fake_tokens(ids, params)
        assert row["generated_text"] == tokenizer.decode(tokens) and row["error"] == ""
        assert (row["num_input_tokens"], row["num_generated_tokens"]) == (len(ids), len(tokens))
    assert [len(pq.read_table(path)) for path in parts_of(tmp_path / "out")] == [30] * 6 + [20]


def test_results_depend_on_neither_block_window_nor_parts(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", [f"p{i}" for i in range(120)])
    tables = []
    for name, flags, block in (("a", ["--part-rows", 7], 3), ("b", ["--window-rows", 10], 50)):
        assert run_here(source, tmp_path / name, "--temperature", 1, *flags, block=block) == 0
        tables.append(read_output(tmp_path / name))
    assert tables[0].equals(tables[1])
    assert run_here(source, tmp_path / "c", "--temperature", 1, "--seed", 1) == 0
    assert not read_output(tmp_path / "c").equals(tables[0])


def test_odd_rows_become_errors_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["fine", None, "", "x" * 100_000, "\U0001f600 emoji \U0001f468‍\U0001f469", "a\x00b"]
    columns = {
        "raw": pa.array([b"\xff\xfe", None, b"", b"ok", b"\x80", b"x"]),
        "nested": pa.array([[{"a": 1}], None, [], [{"a": None}], [], []], pa.list_(pa.struct([("a", pa.int64())]))),
        "kind": pa.array(["a", "b", None, "a", "a", "b"]).dictionary_encode(),
        "at": pa.array([datetime(2024, 1, 1, tzinfo=timezone.utc)] * 6, pa.timestamp("ms", "Asia/Tokyo")),
        "void": pa.nulls(6),
    }
    source = write_input(tmp_path / "in.parquet", prompts, row_group_size=4, **columns)
    assert run_here(source, tmp_path / "out") == 3
    table = read_output(tmp_path / "out")
    before = pq.read_table(source)
    assert (
        table.select(before.schema.names).equals(before)
        and table.schema.types[: len(before.schema)] == before.schema.types
    )
    errors = table["error"].to_pylist()
    assert errors[0] == errors[2] == errors[4] == errors[5] == ""
    assert errors[1] == "'prompt' is null" and "100001 tokens" in errors[3] and "context of 512" in errors[3]
    assert [text is None for text in table["generated_text"].to_pylist()] == [bool(error) for error in errors]
    assert table["finish_reason"].to_pylist()[1] == "error"
    assert "2 of 6 rows have an error" in capsys.readouterr().err
    torn = pq.read_table(source).append_column(
        "torn", pa.array([b"a", b"\xff", b"", b"b", b"c", b"\x80"]).view(pa.string())
    )
    pq.write_table(torn, tmp_path / "torn.parquet")
    assert run_here(tmp_path / "torn.parquet", tmp_path / "out-torn", "--prompt-column", "torn") == 3
    table = read_output(tmp_path / "out-torn")
    assert ["is not UTF-8" in error for error in table["error"].to_pylist()] == [False, True, False, False, False, True]
    assert table["torn"].equals(torn["torn"])


@pytest.mark.parametrize(("side", "kept"), [("left", "END"), ("right", "BEGIN")])
def test_truncation_keeps_room_for_the_output(tmp_path: Path, side: str, kept: str) -> None:
    source = write_input(tmp_path / "in.parquet", ["BEGIN" + "x" * 1000 + "END"])
    seen: list[list[int]] = []

    class Watching(FakeLLM):
        def stream(self, items, on_tokens=None):  # type: ignore[no-untyped-def]
            return super().stream(seen.append(item[1]) or item for item in items)

    assert run_here(source, tmp_path / "out", "--truncate", side, "--max-tokens", 12, fake=Watching()) == 0
    assert len(seen[0]) == 500 and seen[0][0] == 1
    text = FakeTokenizer().decode(seen[0])
    assert text.startswith(kept) if side == "right" else text.endswith(kept)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_an_input_without_rows_gives_an_output_with_the_schema(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"in.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    else:
        path.write_text("prompt\n" if kind == "csv" else "")
    code = run_here(path, tmp_path / "out")
    if kind == "jsonl":
        assert code == 2 and "no rows: its columns are unknown" in capsys.readouterr().err
        return
    assert code == 0
    table = pq.read_table(tmp_path / "out")
    assert len(table) == 0 and tuple(table.schema.names) == ("prompt", *RESULTS)


def test_partition_folders_stay(tmp_path: Path) -> None:
    for lang in ("de", "fr"):
        write_input(tmp_path / "in" / f"lang={lang}" / "x.parquet", [f"{lang}{i}" for i in range(50)])
    assert run_here(tmp_path / "in", tmp_path / "out", "--part-rows", 40, "--prompt-template", "{lang}: {prompt}") == 0
    names = [str(path.relative_to(tmp_path / "out")) for path in parts_of(tmp_path / "out")]
    assert names == [
        "lang=de/part-00000.parquet",
        "lang=de/part-00001.parquet",
        "lang=fr/part-00002.parquet",
        "lang=fr/part-00003.parquet",
    ]
    frame = pd.read_parquet(tmp_path / "out")
    assert frame["lang"].tolist() == ["de"] * 50 + ["fr"] * 50


def test_readers_read_the_output(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    frame = pd.DataFrame(
        {"prompt": [f"p{i}" for i in range(250)]}, index=pd.Index([f"k{i}" for i in range(250)], name="key")
    )
    frame.to_parquet(tmp_path / "in.parquet")
    assert run_here(tmp_path / "in.parquet", tmp_path / "out", "--logprobs", 2, "--generated-tokens") == 0
    assert pd.read_parquet(tmp_path / "out").index.tolist() == [f"k{i}" for i in range(250)]
    assert pds.dataset(tmp_path / "out").count_rows() == 250
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded.num_rows == 250 and loaded[3]["logprobs"][0] == [
        {"token_id": loaded[3]["generated_tokens"][0], "logprob": -0.5, "rank": 1},
        {"token_id": 2, "logprob": -1.5, "rank": 2},
    ]


def test_metadata_that_no_longer_holds_is_dropped(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_pandas(pd.DataFrame({"prompt": ["a", "b", "c"]})).to_parquet(str(tmp_path / "in.parquet"))
    assert run_here(tmp_path / "in.parquet", tmp_path / "out", "--part-rows", 2) == 0
    assert len(pd.read_parquet(tmp_path / "out")) == 3
    table = pa.table(
        {"prompt": ["a"]},
        metadata={
            "huggingface": '{"info": {"features": {"prompt": {"dtype": "string", "_type": "Value"}}}}',
            "mine": "kept",
        },
    )
    pq.write_table(table, tmp_path / "hf.parquet")
    assert run_here(tmp_path / "hf.parquet", tmp_path / "hf") == 0
    metadata = pq.read_schema(parts_of(tmp_path / "hf")[0]).metadata
    assert b"huggingface" not in metadata and metadata[b"mine"] == b"kept"
    assert (
        "generated_text"
        in datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"].features
    )


def test_a_name_clash_is_found_before_the_model_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_input(tmp_path / "in.parquet", ["a"], error=["x"])

    def no_model(config: object, seen: object) -> None:
        raise AssertionError("the model was loaded")

    from flexbatch.apps.batch import main

    words = [str(source), str(tmp_path / "out")]
    assert main(words, open_engine=no_model, identity=lambda config: {}) == 2
    assert "already has the column error" in capsys.readouterr().err
    assert run_here(*words, "--output-prefix", "fb_") == 0
    assert read_output(tmp_path / "out").schema.names == ["id", "prompt", "error", *("fb_" + name for name in RESULTS)]


def test_a_finished_job_does_not_load_the_model_again(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", ["a", "b"])
    assert run_here(source, tmp_path / "out") == 0
    engine = FakeLLM()
    assert run_here(source, tmp_path / "out", fake=engine) == 0 and engine.prompts_seen == 0


def test_another_job_is_refused_with_its_differences_until_it_may_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (write_input(tmp_path / "in.parquet", ["a", "b"]), tmp_path / "out", "--temperature", 0)
    assert run_here(*words) == 0
    first = read_output(tmp_path / "out")
    other = (*words, "--max-tokens", 3, "--seed", 5)
    assert run_here(*other) == 2
    err = capsys.readouterr().err
    assert (
        "generation.max_tokens: 64 in the output, 3 now" in err
        and "seed: 0 in the output, 5 now" in err
        and "generation.temperature" not in err
    )
    assert read_output(tmp_path / "out").equals(first)
    assert run_here(*words, "--window-rows", 1, "--gpu-batch-size", 3) == 0, (
        "placement, window and block are not part of a job"
    )
    assert (
        run_here(*other, "--overwrite") == 0
        and max(read_output(tmp_path / "out")["num_generated_tokens"].to_pylist()) <= 3
    )


def test_an_engine_failure_keeps_what_is_finished_and_prints_the_resume_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_input(tmp_path / "in.parquet", [f"p{i}" for i in range(100)])
    assert run_here(source, tmp_path / "out", fail_after=40) == 1
    err = capsys.readouterr().err
    assert "the fake device is lost" in err and "resume with: " in err
    engine = FakeLLM()
    assert run_here(source, tmp_path / "out", fake=engine) == 0
    assert 0 < engine.prompts_seen < 100 and len(read_output(tmp_path / "out")) == 100


def test_failed_rows_are_run_again_on_request_and_their_part_replaced_in_one_step(tmp_path: Path) -> None:
    prompts = [f"p{i}" + "x" * (600 if i % 10 == 3 else 0) for i in range(60)]
    source = write_input(tmp_path / "in.parquet", prompts)
    assert run_here(source, tmp_path / "out", "--part-rows", 20) == 3
    first = read_output(tmp_path / "out")
    engine = FakeLLM()
    assert run_here(source, tmp_path / "out", "--part-rows", 20, fake=engine) == 3 and engine.prompts_seen == 0
    engine = FakeLLM(max_positions=2000)
    assert run_here(source, tmp_path / "out", "--part-rows", 20, "--retry-failed", fake=engine) == 0
    second = read_output(tmp_path / "out")
    assert engine.prompts_seen == 6 and set(second["error"].to_pylist()) == {""}
    kept = [i for i in range(60) if i % 10 != 3]
    assert second.take(kept).equals(first.take(kept))
    assert run_here(source, tmp_path / "out", "--part-rows", 20, fake=FakeLLM()) == 0


def test_failed_rows_of_an_unfinished_part_are_run_again_on_request(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", ["x" * 600, *(f"p{i}" for i in range(60))])
    assert run_here(source, tmp_path / "out", fail_after=30) == 1
    assert run_here(source, tmp_path / "out", "--retry-failed", max_positions=2000) == 0
    assert set(read_output(tmp_path / "out")["error"].to_pylist()) == {""}


def test_the_first_interrupt_stops_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_input(tmp_path / "in.parquet", [f"p{i}" for i in range(2000)])
    read: list[int] = []

    def counted(source, parts):  # type: ignore[no-untyped-def]
        for part, table in read_parts(source, parts):
            read.append(part.number)
            yield part, table

    class Interrupted(FakeLLM):
        def stream(self, items, on_tokens=None):  # type: ignore[no-untyped-def]
            for position, pair in enumerate(super().stream(items)):
                if position == 5:
                    os.kill(os.getpid(), signal.SIGINT)
                yield pair

    monkeypatch.setattr("flexbatch.apps.jobs.pipeline.read_parts", counted)
    assert run_here(source, tmp_path / "out", "--part-rows", 10, "--window-rows", 10, fake=Interrupted(block=4)) == 130
    assert len(read) < 20 and len(parts_of(tmp_path / "out")) < 20
    assert run_here(source, tmp_path / "out", "--part-rows", 10, "--window-rows", 10) == 0
    assert read_output(tmp_path / "out")["id"].to_pylist() == list(range(2000))


@pytest.mark.parametrize("limit", ["2", "4%"])
def test_too_many_errors_stop_the_job(tmp_path: Path, limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_input(tmp_path / "in.parquet", ["ok", None] * 25 + ["ok"] * 10)
    assert run_here(source, tmp_path / "out", "--max-errors", limit) == 1
    err = capsys.readouterr().err
    assert "3 rows failed, more than the 2" in err and "row 5: 'prompt' is null" in err and "resume with" in err
    assert run_here(source, tmp_path / "out") == 3


def test_a_damaged_row_group_stops_the_job_after_what_was_in_flight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.parquet"
    table = pa.table({"prompt": [f"prompt {i}" for i in range(90)]})
    pq.write_table(table, source, row_group_size=30, write_page_checksum=True, compression="none", use_dictionary=False)
    data = source.read_bytes()

    class Damages(FakeLLM):
        """The disk fails when the job has begun."""

        def __enter__(self) -> FakeLLM:
            before = source.stat()
            source.write_bytes(data.replace(b"prompt 45", b"PROMPT 45", 1))
            os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
            return self

    assert run_here(source, tmp_path / "out", "--part-rows", 10, fake=Damages()) == 1
    assert "in.parquet: row group 1 cannot be read" in capsys.readouterr().err
    assert read_output(tmp_path / "out")["prompt"].to_pylist() == [f"prompt {i}" for i in range(30)]
    assert run_here(source, tmp_path / "out", "--part-rows", 10) == 2
    assert "input.files.in.parquet.content: sha256 " in capsys.readouterr().err
    source.write_bytes(data)
    assert run_here(source, tmp_path / "out", "--part-rows", 10) == 0
    assert read_output(tmp_path / "out")["prompt"].to_pylist() == table["prompt"].to_pylist()


@pytest.mark.parametrize(
    "name",
    [b"a b", b"new\nline", b"'\"", b"100%25", b"[x]*?", b"k=v", b"#h?x=1", b"~", b"{x}", b"\xff\xfe", b"-x"],
    ids=repr,
)
def test_an_output_may_have_any_name(tmp_path: Path, name: bytes) -> None:
    """Parts are written, found again, and read to be written anew."""
    source, out = write_input(tmp_path / "in.parquet", ["a", None, "b"] * 20), tmp_path / os.fsdecode(name)
    words = [source, out, "--part-rows", 10, "--window-rows", 4]
    assert run_here(*words, block=4, fail_after=100) == 1
    assert run_here(*words) == 3
    for path in out.rglob("*.parquet"):
        os.utime(path)
    assert run_here(*words, "--retry-failed") == 3
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path.open("rb")).to_pylist()]
    assert [row["id"] for row in rows] == list(range(60)) and sum(bool(row["error"]) for row in rows) == 20


def test_a_torn_or_foreign_part_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_input(tmp_path / "in.parquet", [f"p{i}" for i in range(10)])
    assert run_here(source, tmp_path / "out") == 0
    (tmp_path / "out" / ".flexbatch" / "commits-0-of-1.log").unlink()
    assert run_here(source, tmp_path / "out") == 0
    (tmp_path / "out" / ".flexbatch" / "commits-0-of-1.log").unlink()
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"PAR1")
    assert run_here(source, tmp_path / "out") == 2
    assert "part-00000.parquet" in capsys.readouterr().err


def test_output_inside_the_input_and_remote_output_are_refused(tmp_path: Path) -> None:
    write_input(tmp_path / "in" / "a.parquet", ["a"])
    assert run_here(tmp_path / "in", tmp_path / "in" / "out") == 2
    assert run_here(tmp_path / "in", "s3://bucket/out") == 2


def test_metrics_are_a_prometheus_file(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", ["a", None, "c"])
    assert run_here(source, tmp_path / "out", "--metrics-file", tmp_path / "m.prom", "--shard", "0/1") == 3
    lines = (tmp_path / "m.prom").read_text().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert (
        values["flexbatch_rows_done"] == "3"
        and values["flexbatch_row_errors"] == "1"
        and values["flexbatch_parts_committed"] == "1"
    )
    assert "# TYPE flexbatch_generated_tokens_total counter" in lines and not list(tmp_path.glob(".m.prom*"))
    assert run_here(source, tmp_path / "out2", "--metrics-file", tmp_path / "no" / "m.prom") == 3


def test_shards_write_the_same_parts_as_one_process(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", [f"p{i}" for i in range(100)])
    assert run_here(source, tmp_path / "one", "--part-rows", 9) == 0
    for shard in range(3):
        assert run_here(source, tmp_path / "three", "--part-rows", 9, "--shard", f"{shard}/3") == 0
    one, three = parts_of(tmp_path / "one"), parts_of(tmp_path / "three")
    assert [path.name for path in one] == [path.name for path in three]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, three, strict=True))
    assert run_here(source, tmp_path / "three", "--part-rows", 9) == 0


def test_the_planner_sees_the_lengths_of_the_job(tmp_path: Path) -> None:
    prompts = ["x" * (i // 100 + 1) for i in range(1000)] + [None]
    source = write_input(tmp_path / "in.parquet", prompts)
    job = plan_job(
        str(source), str(tmp_path / "out"), JobConfig(max_tokens=9, part_rows=50), EngineConfig(), lambda engine: {}
    )
    seen = preview(job, job.parts[2:])
    engine = FakeLLM(max_positions=12)
    planned = seen.job(engine.tokenizer, engine.arch)
    assert planned is not None
    cache, prompt = planned.cache_tokens, planned.prompt_tokens
    assert seen.num_rows == len(cache) == len(prompt) == 901
    assert min(prompt) <= 4 and max(prompt) == 11 and len(set(prompt)) >= 7
    assert all(total == min(length + 8, 11) for total, length in zip(cache, prompt, strict=True))
