"""Files and batches of the official client: results are those of `flexbatch batch`, and every state is the API's."""

from __future__ import annotations

import json
import time
from pathlib import Path

import openai
import pytest

from tests.apps_serve.helpers import (
    MEMORY,
    PLACED,
    Server,
    batch_file,
    begin_batch,
    content,
    ended,
    line,
    records,
    some_lines,
    wait_for,
)
from tests.processes import Forked

BAD = [
    line("row 0", "again", max_tokens=2),
    "no JSON",
    line("other", "x", model="gpt-4o"),
    line("chat", "x", url="/v1/chat/completions", max_tokens=4),
    {"custom_id": "method", "method": "GET", "url": "/v1/completions", "body": {"prompt": "x"}},
    line("hot", "x", temperature="hot"),
    line("long", "x " * 3000, max_tokens=5),
    {"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}},
]


def test_the_results_of_a_batch_are_those_of_the_command(server: Server, tmp_path: Path) -> None:
    lines = [*some_lines(30), *BAD, line("several", ["a =", "b ="], n=2, max_tokens=5, logprobs=1)]
    client = server.client()
    batch = ended(client, begin_batch(client, lines, metadata={"who": "me"}))
    assert (batch.status, batch.metadata, batch.errors) == ("completed", {"who": "me"}, None)
    assert batch.request_counts.model_dump() == {"total": 39, "completed": 31, "failed": 8}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at <= batch.expires_at
    (tmp_path / "in.jsonl").write_bytes(batch_file(lines))
    flags = ("--input-format", "openai", *MEMORY, *PLACED, "--offload-dir", str(tmp_path / "offload"))
    job = Forked(
        "flexbatch.apps.batch", [str(tmp_path / "in.jsonl"), str(tmp_path / "out"), *flags], {"OMP_NUM_THREADS": "1"}
    )
    assert job.wait(300) == 3, job.communicate()[1]
    wanted = records((tmp_path / "out" / "part-00000.jsonl").read_bytes())
    good, bad = records(content(client, batch.output_file_id)), records(content(client, batch.error_file_id))
    # The command takes requests whatever their model and endpoint are.
    mine = {each["custom_id"]: each for each in good}
    for each in wanted:
        if each["error"] is None and each["custom_id"] in mine:
            found, expected = mine.pop(each["custom_id"])["response"]["body"], each["response"]["body"]
            assert [shown(choice) for choice in found["choices"]] == [shown(choice) for choice in expected["choices"]]
            assert found["usage"] == expected["usage"]
    assert not mine and [each["custom_id"] for each in good] == [f"row {i}" for i in range(30)] + ["several"]
    assert [each["error"]["code"] for each in bad] == [
        "duplicate_custom_id", "invalid_json_line", "model_not_found", "invalid_url", "invalid_method", "invalid_type",
        "invalid_request", "missing_required_parameter",
    ]  # fmt: skip


def shown(choice: dict) -> tuple:
    """Without log-probabilities, whose last digits depend on what else is in the block."""
    tokens = choice["logprobs"] and choice["logprobs"]["tokens"]
    return choice["index"], choice["text"], choice["finish_reason"], tokens


def test_files_are_uploaded_listed_read_and_deleted(server: Server) -> None:
    client = server.client()
    data = batch_file(some_lines(3)) + "Übung \u2028".encode()
    names = ["a.jsonl", "../../etc/passwd", 'quote".jsonl', "x" * 400]
    files = [client.files.create(file=(name, data), purpose="batch") for name in names]
    assert [file.filename for file in files] == ["a.jsonl", "passwd", "quote%22.jsonl", "x" * 255]
    assert all(file.bytes == len(data) and content(client, file.id) == data for file in files)
    assert client.files.retrieve(files[0].id) == files[0]
    listed = [file.id for file in client.files.list(limit=2)]  # the client asks for all pages
    assert listed[:4] == [file.id for file in reversed(files)] and len(set(listed)) == len(listed)
    for file in files:
        assert client.files.delete(file.id).deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file.id)
    for bad in ("../server.db", "file-" + "0" * 24, "file-x", "%2e%2e%2flock"):
        with pytest.raises(openai.NotFoundError):
            client.files.content(bad)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "99999d"}, "completion_window"),
        ({"metadata": {"a": "x" * 600}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ],
    ids=str,
)
def test_a_batch_that_cannot_be_made_is_refused_by_its_field(settings, field, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        begin_batch(server.client(), some_lines(1), **settings)
    assert caught.value.param == field


def test_an_input_that_holds_no_requests_fails(server: Server) -> None:
    client = server.client()
    for data in (b"\n \n", b"\xff\xfe\x00"):
        file = client.files.create(file=("x", data), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="1h")
        batch = ended(client, made.id)
        assert batch.status in ("failed", "completed") and batch.output_file_id is None
        assert (batch.status == "failed") == bool(batch.errors and batch.errors.data[0].message)


def test_a_batch_is_cancelled_within_a_pass_and_keeps_what_it_has(server: Server) -> None:
    client = server.client()
    batch_id = begin_batch(client, some_lines(500, 40))
    wait_for(lambda: client.batches.retrieve(batch_id).request_counts.completed > 3)
    assert client.batches.cancel(batch_id).status == "cancelling"
    began = time.monotonic()
    batch = ended(client, batch_id)
    assert batch.status == "cancelled" and time.monotonic() - began < 60
    rows = records(content(client, batch.output_file_id))
    assert 3 < len(rows) == batch.request_counts.completed < 500 and batch.request_counts.total == 500
    with pytest.raises(openai.APIStatusError):
        client.batches.cancel(begin_batch_and_wait(client))
    wait_for(lambda: not server_status(server)["sequences"]["running"])
    assert server_status(server)["sequences"]["batch"] == 0


def begin_batch_and_wait(client: openai.OpenAI) -> str:
    return ended(client, begin_batch(client, some_lines(1, 8))).id


def server_status(server: Server) -> dict:
    import httpx

    return json.loads(httpx.get(f"{server.url}/status", timeout=60).text)


def test_a_batch_that_is_late_expires_with_its_lines_told(server: Server) -> None:
    client = server.client()
    batch_id = begin_batch(client, some_lines(400, 40), completion_window="1s")
    batch = ended(client, batch_id)
    assert batch.status == "expired" and batch.expired_at >= batch.expires_at
    good, bad = records(content(client, batch.output_file_id)), records(content(client, batch.error_file_id))
    assert len(good) + len(bad) == 400 and {each["error"]["code"] for each in bad} == {"batch_expired"}
    assert {each["custom_id"] for each in good + bad} == {f"row {i}" for i in range(400)}


def test_batches_are_listed_and_looked_at(server: Server) -> None:
    import httpx

    client = server.client()
    made = [begin_batch(client, some_lines(2, 8)) for _ in range(3)]
    for batch_id in made:
        assert ended(client, batch_id).status == "completed"
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == made[::-1]
    for bad in ("batch_" + "0" * 24, "../files", "batch_x"):
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve(bad)
    status = server_status(server)
    assert (
        status["model"] == "demo" and status["uptime_seconds"] > 0 and status["engine"]["policy"]["gpu_batch_size"] == 4
    )
    metrics = httpx.get(f"{server.url}/metrics").text
    assert "flexbatch_generated_tokens_total" in metrics and 'route="/v1/batches",status="200"' in metrics
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert "text/html" in httpx.get(server.url).headers["content-type"]
