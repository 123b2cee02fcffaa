"""Jobs that read from an S3 server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from flexbatch.apps.jobs.files import list_files, resolve
from tests.apps_batch.fake import FakeLLM
from tests.apps_batch.helpers import parts_of, read_output, run_here

moto = pytest.importorskip("moto.server")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of an S3 server with an empty bucket ``prompts``."""
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    address = "{}:{}".format(*served.get_host_and_port())
    pafs.S3FileSystem(
        endpoint_override=address, scheme="http", region="us-east-1", allow_bucket_creation=True
    ).create_dir("prompts")
    yield address
    served.stop()


def uri(server: str, path: str) -> str:
    return f"s3://prompts/{path}?endpoint_override={server}&scheme=http&region=us-east-1"


def put(server: str, path: str, prompts: list[str]) -> pafs.FileSystem:
    filesystem, folder = resolve(uri(server, path))
    pq.write_table(pa.table({"prompt": prompts}), folder, filesystem=filesystem, row_group_size=30)
    return filesystem


def test_a_partitioned_data_set_in_a_bucket_and_globs_in_it(server: str, tmp_path: Path) -> None:
    for lang in ("de", "fr"):
        put(server, f"in/lang={lang}/x.parquet", [f"{lang}{i}" for i in range(70)])
    assert [file.name for file in list_files(uri(server, "in/lang=f?/*"))[1]] == ["lang=fr/x.parquet"]
    assert (
        run_here(uri(server, "in"), tmp_path / "out", "--part-rows", 50, "--prompt-template", "{lang}: {prompt}") == 0
    )
    assert [path.parent.name for path in parts_of(tmp_path / "out")] == ["lang=de"] * 2 + ["lang=fr"] * 2
    assert read_output(tmp_path / "out")["prompt"].to_pylist() == [
        f"{lang}{i}" for lang in ("de", "fr") for i in range(70)
    ]


def test_a_job_on_a_bucket_resumes_and_names_an_object_that_is_gone(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (uri(server, "in/*.parquet"), tmp_path / "out", "--part-rows", 10)
    filesystem = put(server, "in/x.parquet", [f"p{i}" for i in range(100)])
    assert run_here(*words, fail_after=40) == 1
    engine = FakeLLM()
    assert run_here(*words, fake=engine) == 0 and 0 < engine.prompts_seen < 100
    assert read_output(tmp_path / "out")["prompt"].to_pylist() == [f"p{i}" for i in range(100)]

    class Loses(FakeLLM):
        def stream(self, items, on_tokens=None):  # type: ignore[no-untyped-def]
            filesystem.delete_file("prompts/in/x.parquet")
            return super().stream(items)

    put(server, "in/x.parquet", [f"q{i}" for i in range(100)])
    words = (words[0], tmp_path / "lost", "--part-rows", 10, "--window-rows", 10)
    assert run_here(*words, fake=Loses()) == 1
    err = capsys.readouterr().err
    assert "x.parquet: row group" in err and "cannot be read" in err and "resume with: " in err
    assert run_here(*words) == 2
    assert "holds no Parquet" in capsys.readouterr().err


def test_an_object_that_was_rewritten_is_refused(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its size and statistics are equal, so is perhaps its time: the server says that it is another version."""
    prompts = [f"p{i:02d}" for i in range(20)]
    words = (uri(server, "in/*.parquet"), tmp_path / "out")
    put(server, "in/x.parquet", prompts)
    assert run_here(*words) == 0
    put(server, "in/x.parquet", [prompts[0], *prompts[2:0:-1], *prompts[3:]])
    capsys.readouterr()
    assert run_here(*words) == 2
    assert "input.files.x.parquet.version: etag " in capsys.readouterr().err
    put(server, "in/x.parquet", prompts)
    assert run_here(*words) == 0
