"""Credentials of a URI: planted in every form, and looked for in all that a job prints and leaves."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexbatch import run
from flexbatch.apps import completion
from flexbatch.apps.batch import main
from flexbatch.apps.jobs.files import list_files
from flexbatch.apps.wrangle import __main__ as wrangle
from flexbatch.cli.command import resume_command
from flexbatch.validation.errors import ConfigurationError
from flexbatch.validation.secrets import hide_uri, redact_logs, redacted, secrets_of
from tests.apps_batch.fake import FakeLLM
from tests.apps_batch.helpers import run_here

MARKER = "S3CRETmarker"
URIS = (
    f"s3://AKIA{MARKER}:{MARKER}@bucket/in.parquet",
    f"s3://AKIAEXAMPLEEXAMPLE00:{MARKER}/with/slashes+{MARKER}@bucket/in/*.parquet",
    f"s3://bucket/in.parquet?access_key=AKIA{MARKER}&secret_key={MARKER}&region=eu-west-1",
    f"s3://bucket/in.parquet?session_token={MARKER}%2Fmore%3D",
    f"s3://{MARKER}%40user:{MARKER}%2Fx@bucket/in.parquet?scheme=http",
    f"s3://bucket/x?endpoint_override=http://u:{MARKER}@host:9000",
    f"gs://token:{MARKER}@bucket/in.parquet?access_token={MARKER}",
    f"https://user:{MARKER}@example.invalid/in.parquet",
    f"https://{MARKER}@example.invalid/in.parquet",
    f"https://example.invalid/in.parquet?X-Amz-Signature={MARKER}&X-Amz-Credential={MARKER}%2F2026",
    f"https://acc.blob.core.windows.net/c/in.parquet?sv=2024-01-01&sp=r&sig={MARKER}%3D",
    f"https://example.invalid/in.parquet#access_token={MARKER}",
    f"az://container/in.parquet?account_key={MARKER}",
    f"abfs://account:{MARKER}@container/in.parquet",
    f"abfss://:{MARKER}@account.dfs.core.windows.net/c/in.parquet",
    f"hdfs://user:{MARKER}@host:8020/in.parquet?anything={MARKER}",
    f"simplecache::https://user:{MARKER}@example.invalid/in.parquet",
    f"nonsense://user:{MARKER}@x/y?key={MARKER}",
)  # fmt: skip


@pytest.mark.parametrize("uri", URIS)
def test_a_uri_is_shown_without_its_credentials(uri: str) -> None:
    for shown in (
        hide_uri(uri),
        redacted(f"cannot read '{uri}' (see {uri}): no"),
        resume_command(["flexbatch", uri, f"--x={uri}", "--overwrite"]),
    ):
        assert MARKER not in shown and "***" in shown
    assert MARKER not in redacted(f"bad key AKIA{MARKER}/{MARKER}", [MARKER])


@pytest.mark.parametrize("uri", URIS)
def test_other_commands_show_no_credentials_either(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also where a path was made of the URI, which has lost a slash and is none any more."""
    wrong = (
        (run.main, ["--prompts", uri]),
        (run.main, ["--prompts", uri, "--output", str(tmp_path / "out.jsonl")]),
        (run.main, ["--output", uri]),
        (run.main, ["--config", uri]),
        (run.main, ["--model", uri, "--prompt-len", "3"]),
        (run.main, ["--nonsense", uri]),
        (completion.main, ["--prompts", uri]),
        (completion.main, ["--model", uri, "a"]),
        (wrangle.main, [uri]),
    )
    for command, words in wrong:
        try:
            code = command(words)
        except SystemExit as error:
            code = error.code
        shown = "".join(capsys.readouterr())
        assert code == 2 and shown and MARKER not in shown, (words, shown)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/in/*.parquet?endpoint_override=minio:9000&scheme=http&region=eu-west-1",
        "s3://bucket/x@v1/in?.parquet",
        "http://host:8080/path@v/in.parquet",
        "gs://anonymous@bucket/in.parquet",
        "abfss://container@account.dfs.core.windows.net/in.parquet",
        "file:///data/in.parquet",
        "memory://bucket/k=v/x.parquet",
    ],
)
def test_what_is_no_secret_is_shown(uri: str) -> None:
    assert hide_uri(uri) == uri == redacted(uri) and not secrets_of([uri])


def test_secrets_are_known_in_every_spelling() -> None:
    found = secrets_of(["in", "s3://AKIAEXAMPLEEXAMPLE00:a%2Fb%2Bc%3D@bucket/x?token=t%20ken&region=x"])
    assert {"AKIAEXAMPLEEXAMPLE00", "a%2Fb%2Bc%3D", "a/b+c=", "t%20ken", "t ken", "t+ken"} <= set(
        found
    ) and "x" not in found
    assert list(found) == sorted(found, key=lambda value: (-len(value), value))


def test_logs_and_tracebacks_show_no_credentials() -> None:
    sink, logger = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(sink)
    logger.addHandler(handler)
    try:
        redact_logs(secrets_of([f"s3://k:{MARKER}@b/x"]))
        redact_logs(secrets_of([f"s3://k:{MARKER}@b/x"]))
        try:
            try:
                raise ValueError(f"the key {MARKER} is not valid")
            except ValueError as error:
                raise OSError(f"https://u:other{MARKER}@host/x cannot be opened") from error
        except OSError:
            logging.exception("failed with %s", MARKER)
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert (
        MARKER not in sink.getvalue()
        and "Traceback" in sink.getvalue()
        and "***@host/x cannot be opened" in sink.getvalue()
    )


@pytest.mark.parametrize("uri", URIS)
def test_a_refused_input_shows_no_credentials(
    uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems that cannot be reached say so in words of their own."""

    class Unreachable:
        def get_file_info(self, base: str) -> None:
            raise OSError(f"cannot connect to {uri}, {unquote(uri)}")

    monkeypatch.setattr("flexbatch.apps.jobs.files.resolve", lambda given: (Unreachable(), "bucket/in.parquet"))
    monkeypatch.setattr(sys, "orig_argv", ["flexbatch", "batch", uri, "out"])
    assert run_here(uri, tmp_path / "out") == 2
    printed = capfd.readouterr()
    assert MARKER not in printed.err + printed.out and "cannot be listed" in printed.err
    with pytest.raises(ConfigurationError) as caught:
        list_files(uri)
    assert MARKER not in str(caught.value)
    with pytest.raises(SystemExit):
        main([uri, str(tmp_path / "out"), uri])
    assert MARKER not in capfd.readouterr().err


def test_an_unknown_scheme_and_a_remote_output_show_no_credentials(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_here(f"nonsense://u:{MARKER}@x/y?key={MARKER}", tmp_path / "out") == 2
    assert run_here(tmp_path / "in.parquet", f"s3://k:{MARKER}@bucket/out") == 2
    err = capfd.readouterr().err
    assert MARKER not in err and "no file system for this URI" in err and "object stores lack" in err


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Address of an HTTP server that wants a signature, and fails with 500 from the third range on when ``fail`` is
    there.
    """
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(40)] + [None]}), sink, row_group_size=10)
    data = sink.getvalue()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            if MARKER not in self.path or (tmp_path / "fail").exists():
                self.send_error(403)
                return
            wanted = self.headers.get("Range", "")
            first, last = (
                (int(part or len(data) - 1) for part in wanted.removeprefix("bytes=").split("-"))
                if wanted
                else (0, len(data) - 1)
            )
            body = data[first : last + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def traces(folder: Path) -> list[str]:
    """Files that hold the marker, in their names or contents."""
    return [
        str(path)
        for path in folder.rglob("*")
        if MARKER in str(path) or (path.is_file() and MARKER.encode() in path.read_bytes())
    ]


def test_a_job_that_fails_and_resumes_leaves_no_credentials(
    tmp_path: Path, served: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signed address, with a row that fails, an engine that fails with the address in its message, an input that
    goes away, and a new signature.
    """
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    uri, out = f"http://{served}/in.parquet?sig={MARKER}%3D&x=1", tmp_path / "out"
    monkeypatch.setattr(sys, "orig_argv", ["flexbatch", "batch", uri, str(out)])

    class Telling(FakeLLM):
        def stream(self, items, on_tokens=None):  # type: ignore[no-untyped-def]
            for position, pair in enumerate(super().stream(items)):
                if position == 5:
                    raise RuntimeError(f"lost while reading {uri} ({MARKER}=)")
                yield pair

    class Refusing(FakeLLM):
        def stream(self, items, on_tokens=None):  # type: ignore[no-untyped-def]
            for key, answer in super().stream(items):
                answer.finish_reason, answer.error = "error", f"{uri} is not a prompt"
                yield key, answer

    words = (uri, out, "--part-rows", 10, "--input-format", "parquet")
    assert run_here(*words, fake=Telling()) == 1
    (tmp_path / "fail").touch()
    assert run_here(*words) == 2
    (tmp_path / "fail").unlink()
    assert run_here(*words, fake=Refusing()) == 3
    assert run_here(uri.replace("sig=", "sig=new"), out, "--part-rows", 10, "--retry-failed") == 3
    printed = capfd.readouterr()
    assert MARKER not in printed.out + printed.err and "sig=***" in printed.err and "lost while reading" in printed.err
    assert traces(out) == [] and pq.read_table(out, partitioning=None)["prompt"].to_pylist()[:40] == [
        f"p{i}" for i in range(40)
    ]


def test_parameters_of_rows_are_no_place_for_credentials(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = pa.table({"prompt": ["a"], "stop": [f"https://u:{MARKER}@x"], "n": [f"s3://k:{MARKER}@x"]})
    pq.write_table(table, tmp_path / "in.parquet")
    assert run_here(tmp_path / "in.parquet", tmp_path / "out", "--max-tokens-column", "n") == 3
    error = pq.read_table(tmp_path / "out", partitioning=None)["error"][0].as_py()
    assert MARKER not in error + capfd.readouterr().err and error.startswith("setting max_tokens is 's3://***@x'")
