"""Servers as processes of their own, and what clients send them."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from openai import OpenAI

from tests.processes import Forked

MEMORY = ("--gpu-memory", "512MiB", "--cpu-memory", "512MiB", "--hardware", "cpu", "--device", "cpu")
SMALL_BLOCK = ("--gpu-batch-size", "4", "--num-gpu-batches", "2")
PLACED = ("--percent", "100", "0", "100", "0", "100", "0", *SMALL_BLOCK)
"""Nothing is left to choose: a start takes no linear program."""


class Server:
    """A server on a free port. It serves once it is made."""

    def __init__(self, state: Path, *flags: str, wait: bool = True) -> None:
        words = ("--port", "0", "--state-dir", str(state), "--offload-dir", str(state.parent / "offload"))
        self.process = Forked("flexbatch.apps.serve", [*words, *MEMORY, *flags], {"OMP_NUM_THREADS": "1"})
        self.url = ""
        if wait:
            self.wait()

    def wait(self) -> None:
        wait_for(lambda: re.search(r"serving .* at (http://\S+)", self.process.said()), self.process)
        found = re.search(r"serving .* at (http://\S+)", self.process.said())
        assert found is not None, self.process.said()
        self.url = found[1]

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, key: str = "none", timeout: float = 120.0) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=timeout)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60.0) -> str:
        """Returns what it said."""
        self.process.send_signal(number)
        self.process.wait(seconds)
        return self.process.communicate()[1]


def wait_for(condition: Callable[[], object], process: Forked | None = None, seconds: float = 120.0) -> None:
    """Until the condition holds, or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < end, f"nothing happened within {seconds} s: {process.said() if process else ''}"
        time.sleep(0.01)


def line(name: str, prompt: Any, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    content = {"prompt": prompt} if url == "/v1/completions" else {"messages": [{"role": "user", "content": prompt}]}
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "demo", **content, **body}}


def batch_file(lines: Iterable[Any]) -> bytes:
    return "".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines).encode()


def some_lines(count: int, tokens: int = 24, first: int = 0) -> list[dict[str, Any]]:
    """Every third one is drawn at random; lengths differ."""
    return [
        line(f"row {i}", f"def f{i}(x{i}):", max_tokens=tokens - i % 7, temperature=0.9 if i % 3 else 0)
        for i in range(first, first + count)
    ]


def begin_batch(client: OpenAI, lines: Iterable[Any], **more: Any) -> str:
    file = client.files.create(file=("requests.jsonl", batch_file(lines)), purpose="batch")
    settings = {"endpoint": "/v1/completions", "completion_window": "24h", **more}
    return client.batches.create(input_file_id=file.id, **settings).id


def ended(client: OpenAI, batch_id: str, seconds: float = 300.0) -> Any:
    """A batch once it has ended."""
    end = time.monotonic() + seconds
    while (batch := client.batches.retrieve(batch_id)).status in (
        "validating",
        "in_progress",
        "finalizing",
        "cancelling",
    ):
        assert time.monotonic() < end, batch
        time.sleep(0.05)
    return batch


def content(client: OpenAI, file_id: str | None) -> bytes:
    return b"" if file_id is None else client.files.content(file_id).content


def undated(data: bytes) -> bytes:
    """Results without the second in which their batch began."""
    return re.sub(rb'"created":\d+', b'"created":0', data)


def records(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(each) for each in data.splitlines()]
