"""What a server refuses, and what it survives: keys, sizes, queues, clients that go away, and hostile input."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from flexbatch.apps.serve.process import names_of
from flexbatch.apps.serve.settings import ServeConfig
from flexbatch.config import EngineConfig
from flexbatch.validation.errors import ConfigurationError
from tests.apps_serve.helpers import PLACED, Server, begin_batch, content, ended, line, records, some_lines, wait_for

LONG = {"model": "demo", "prompt": "x", "max_tokens": 1900, "temperature": 0, "ignore_eos": True}


def status(server: Server) -> dict:
    return httpx.get(f"{server.url}/status", timeout=60).json()


def exchange(server: Server, data: bytes, answered: bool = True) -> bytes:
    """Send bytes as they are; returns what came back until the server closes the connection. answered: whether to wait
    for that, and not to go away at once."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(data)
        found = b""
        if not answered:
            return found
        while part := connection.recv(65536):
            found += part
        return found


def request(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {size}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    made = b"".join(
        b"--b\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + body + b"\r\n"
        for head, body in parts
    )
    return made + end


FORM = "Content-Type: multipart/form-data; boundary=b"
FILE, PURPOSE = ('name="file"; filename="x"', b"{}"), ('name="purpose"', b"batch")
CHAT_URL = "/v1/chat/completions"
HOSTILE: dict[str, tuple[bytes, int]] = {
    "no JSON": (request(CHAT_URL, b"{"), 400),
    "no object": (request(CHAT_URL, b"[1]"), 400),
    "not UTF-8": (request(CHAT_URL, b'{"model": "\xff"}'), 400),
    "deep JSON": (request(CHAT_URL, b'{"a":' * 5000 + b"1" + b"}" * 5000), 400),
    "a number of a million digits": (request(CHAT_URL, b'{"n": ' + b"9" * 10**6 + b"}"), 400),
    "a key twice": (request(CHAT_URL, b'{"n": 1, "n": 2}'), 400),
    "larger than it may be": (request(CHAT_URL, b"x" * 2**21), 413),
    "says that it is larger": (request(CHAT_URL, b"", length=10**15), 413),
    "a length that is none": (request(CHAT_URL, b"", length=-5), 400),
    "cut JSON": (request(CHAT_URL, b'{"model": "demo"', length=100), 0),
    "a batch of nothing": (request("/v1/batches", b"{}"), 400),
    "a batch of a path": (
        request(
            "/v1/batches",
            json.dumps({"input_file_id": "../../x", "endpoint": "/v1/completions", "completion_window": "1h"}).encode(),
        ),
        404,
    ),
    "no form": (request("/v1/files", b"{}", "Content-Type: application/json"), 400),
    "a form without boundary": (request("/v1/files", b"", "Content-Type: multipart/form-data"), 400),
    "a form without file": (request("/v1/files", form(PURPOSE), FORM), 400),
    "a form without purpose": (request("/v1/files", form(FILE), FORM), 400),
    "another purpose": (request("/v1/files", form(FILE, ('name="purpose"', b"fine-tune")), FORM), 400),
    "two files": (request("/v1/files", form(FILE, FILE, PURPOSE), FORM), 400),
    "a form without end": (request("/v1/files", form(FILE, PURPOSE, end=b""), FORM), 400),
    "a form of garbage": (request("/v1/files", b"\x00\xff" * 500, FORM), 400),
    "a thousand fields": (request("/v1/files", form(*[('name="x"', b"")] * 1000), FORM), 400),
    "a long field": (request("/v1/files", form(('name="purpose"', b"x" * 10**5)), FORM), 400),
    "a truncated upload": (request("/v1/files", form(FILE, PURPOSE, end=b""), FORM, length=10**6), 0),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01", 400),
    "an unknown address": (request("/v1/../../etc/passwd", b""), 404),
    "another method": (request("/v1/models", b""), 405),
    "a file by path": (
        b"GET /v1/files/..%2f..%2fserver.db/content HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        404,
    ),
    "a page of minus one": (b"GET /v1/files?limit=-1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
    "a page of many": (
        b"GET /v1/batches?limit=99999999999999999999 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        400,
    ),
    "a page after nothing": (
        b"GET /v1/batches?after=' OR 1=1 -- HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        400,
    ),
    "another site's page": (request(CHAT_URL, b"{}", "Origin: http://evil.example"), 403),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_get_an_error_and_nothing_stays(name: str, server: Server) -> None:
    data, wanted = HOSTILE[name]
    folder = Path(f"/proc/{server.process.pid}/fd")
    found = exchange(server, data, bool(wanted))
    if wanted:
        assert found.split(b" ")[1:2] == [str(wanted).encode()], found[:300]
        if name != "no HTTP" and "length that is none" not in name and "after nothing" not in name:
            assert set(json.loads(found.split(b"\r\n\r\n", 1)[1])["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{server.url}/health").status_code == 200
    # What is left of an upload is gone, and no path is told.
    named = {file.id for file in server.client().files.list()}
    wait_for(lambda: {path.name for path in state_of(server).joinpath("files").iterdir()} <= named)
    assert str(state_of(server)).encode() not in found and folder.exists()


def state_of(server: Server) -> Path:
    words = psutil.Process(server.process.pid).open_files()
    return next(Path(each.path).parent for each in words if each.path.endswith("server.db"))


def test_a_file_may_hold_lines_that_are_too_long(server: Server) -> None:
    """Longer than the context, or than a request may be, which is not parsed either."""
    client = server.client()
    lines = [line("long", "x" * 900_000, max_tokens=1), line("longer", "x" * 8_000_000), *some_lines(2, 4)]
    batch = ended(client, begin_batch(client, lines))
    assert batch.request_counts.model_dump() == {"total": 4, "completed": 2, "failed": 2}
    told = [record["error"]["message"] for record in records(content(client, batch.error_file_id))]
    assert "tokens" in told[0] and "line 2 is 7.629 MiB long, more than the 1 MiB that are read" in told[1], told
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("x", b"x" * (17 * 2**20)), purpose="batch")
    assert caught.value.status_code == 413


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_gives_its_slot_back(stream: bool, server: Server) -> None:
    body = json.dumps({**LONG, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request("/v1/completions", body))
        wait_for(lambda: status(server)["sequences"]["running"] >= 1)
    wait_for(lambda: status(server)["sequences"] | {"running": 0, "interactive": 0} == status(server)["sequences"])


def test_more_than_the_queue_holds_are_told_when_to_come_back(server: Server) -> None:
    client, codes = server.client(), []

    def ask() -> None:
        found = httpx.post(f"{server.url}/v1/completions", json={**LONG, "n": 40, "max_tokens": 12}, timeout=120)
        codes.append((found.status_code, found.headers.get("retry-after"), found.json().get("error", {}).get("code")))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [code for code in codes if code[0] == 429]
    assert refused and all(code[2] == "rate_limit_exceeded" and int(code[1]) >= 1 for code in refused)
    assert (200, None, None) in codes and len(refused) < 4
    assert client.completions.create(model="demo", prompt="x", max_tokens=2).choices


def test_interactive_requests_overtake_batches(server: Server) -> None:
    """The block is full of a batch, whose lines take long; the answer comes before any of them ends."""
    client = server.client()
    body = {name: value for name, value in LONG.items() if name not in ("model", "prompt")}
    batch_id = begin_batch(client, [line(f"row {i}", f"def f{i}", **body) for i in range(40)])
    wait_for(lambda: status(server)["sequences"]["running"] == 8)
    texts = [client.completions.create(model="demo", prompt=f"x{i} =", max_tokens=5, temperature=0) for i in range(3)]
    assert all(text.choices[0].text for text in texts)
    assert client.batches.retrieve(batch_id).request_counts.completed == 0
    client.batches.cancel(batch_id)
    ended(client, batch_id)


def test_keys_are_asked_for_and_slow_clients_are_left(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the team\nsecret-one\n\n secret-two \n")
    server = Server(tmp_path / "state", *PLACED, "--api-key-file", str(keys), "--client-timeout", "1.5")
    try:
        for key in ("secret-one", "secret-two"):
            assert server.client(key).models.list().data
        for wrong in ("secret-on", "secret-one2", "# of the team", "\u00fc"):
            found = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {wrong}".encode()})
            assert found.status_code == 401, wrong
        for path in ("/v1/models", "/status", "/metrics", "/v1/files"):
            assert httpx.get(server.url + path).json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(server.url).status_code == 200
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(request(CHAT_URL, b'{"mod', "Authorization: Bearer secret-one", length=100))
            assert connection.recv(100).startswith(b"HTTP/1.1 408") and time.monotonic() - began > 1
    finally:
        said = server.stop()
    assert "secret" not in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--port", "70000"), "port=70000"),
        (("--max-file-size", "huge"), "max_file_size"),
        (("--api-key-file", "/nowhere"), "--api-key-file"),
        (("--dummy-weights",), "no tokenizer"),
        (("--host", "256.1.1.1"), "cannot listen"),
        (("--max-waiting", "0"), "max_waiting=0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_cannot_be_are_told(
    flags: tuple[str, ...], told: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    from flexbatch.apps.serve.command import main

    assert main(["--state-dir", str(tmp_path / "state"), "--port", "0", *flags]) == 2
    assert told in capfd.readouterr().err


def memory(server: Server) -> int:
    return psutil.Process(server.process.pid).memory_info().rss


def concurrently(count: int, at_once: int, ask: Callable[[int], None]) -> None:
    left, lock = iter(range(count)), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            ask(number)

    threads = [threading.Thread(target=work) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.slow
def test_a_line_of_a_hundred_megabytes_costs_no_memory(tmp_path: Path) -> None:
    """Of one string, and of twenty million lists, which would take 2 GB as objects of Python."""
    server = Server(tmp_path / "state", *PLACED)

    def peak() -> int:
        words = Path(f"/proc/{server.process.pid}/status").read_text().split("VmHWM:")[1].split()
        return int(words[0]) * 1024

    try:
        client = server.client(timeout=600)
        text = '{"custom_id": "a", "body": {"prompt": "' + "x" * 100 * 2**20 + '"}}'
        lists = '{"custom_id": "b", "body": {"prompt": [' + "[]," * (20 * 2**20) + "[]]}}"
        ended(client, begin_batch(client, some_lines(2, 4)), 600)
        before, (first, last) = peak(), some_lines(2, 4)
        batch = ended(client, begin_batch(client, [first, text, lists, last]), 600)
        assert batch.request_counts.model_dump() == {"total": 4, "completed": 2, "failed": 2}
        told = [record["error"]["message"] for record in records(content(client, batch.error_file_id))]
        assert all("more than the 16 MiB that are read" in each for each in told), told
        print(f"peak {before / 2**20:.0f} -> {peak() / 2**20:.0f} MiB", flush=True)
        assert peak() - before < 80 * 2**20
    finally:
        server.stop()


@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_requests(tmp_path: Path) -> None:
    """Completions, streams that are left, wrong requests and truncated uploads."""
    placed = ("--percent", "100", "0", "100", "0", "100", "0", "--gpu-batch-size", "32", "--num-gpu-batches", "1")
    server = Server(tmp_path / "state", *placed)
    folder = Path(f"/proc/{server.process.pid}/fd")
    with httpx.Client(timeout=120, limits=httpx.Limits(max_connections=32)) as client:

        def ask(number: int) -> None:
            body = {"model": "demo", "prompt": f"{number} x", "max_tokens": 2, "temperature": 1, "logprobs": 2}
            if number % 4 == 1:
                more = {**body, "max_tokens": 50, "stream": True}
                with client.stream("POST", f"{server.url}/v1/completions", json=more) as found:
                    next(found.iter_lines())
            elif number % 4 == 3:
                exchange(server, HOSTILE["a truncated upload"][0], answered=False)
            else:
                client.post(f"{server.url}/v1/completions", json={**body, "temperature": 1 - number % 4})

        concurrently(400, 24, ask)
        before, files = memory(server), len(list(folder.iterdir()))
        concurrently(2000, 24, ask)
        after = memory(server)
    print(f"memory {before / 2**20:.1f} -> {after / 2**20:.1f} MiB", flush=True)
    assert after - before < 24 * 2**20
    wait_for(lambda: len(list(folder.iterdir())) <= files)
    assert status(server)["sequences"]["interactive"] == 0
    server.stop()


@pytest.mark.slow
def test_two_hundred_interactive_requests_beside_a_batch_of_two_thousand(tmp_path: Path) -> None:
    server = Server(tmp_path / "state")
    try:
        client = server.client(timeout=600)
        lines = [line(f"row {i}", f"def f{i}(x):", max_tokens=24, temperature=0, ignore_eos=True) for i in range(2000)]

        def timed(asked: bool) -> tuple[float, int]:
            began, failed = time.monotonic(), []
            batch_id = begin_batch(client, lines)
            if asked:
                wait_for(lambda: client.batches.retrieve(batch_id).request_counts.completed > 0, seconds=300)

                def ask(number: int) -> None:
                    try:
                        found = client.completions.create(
                            model="demo",
                            prompt=f"class C{number}:",
                            max_tokens=24,
                            temperature=0,
                            extra_body={"ignore_eos": True},
                        )
                        assert found.usage.completion_tokens == 24
                    except Exception as error:
                        failed.append(error)

                concurrently(200, 200, ask)
            batch = ended(client, batch_id, 900)
            assert batch.request_counts.completed == 2000 and not failed, failed
            return time.monotonic() - began, 48000 + asked * 4800

        for asked in (False, True, False):
            seconds, tokens = timed(asked)
            print(f"interactive {asked}: {seconds:.1f} s, {tokens / seconds:.0f} tokens/s")
    finally:
        server.stop()


def test_an_adapter_may_not_be_called_as_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "sql"
    folder.mkdir()
    engine = EngineConfig(model=str(folder), lora=("law=a", "sql=b"))
    with pytest.raises(ConfigurationError, match=r"--lora sql=.* another name \(--served-model-name\)"):
        names_of(ServeConfig(), engine)
    assert names_of(ServeConfig(served_model_name="base"), engine).all == ("base", "law", "sql")
