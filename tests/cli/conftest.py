"""A tiny random Llama with a byte-level tokenizer, as a model folder; and no traces of one command in the next."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexbatch import run
from tests.tiny_models import make_model

CONTEXT = 96


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting of the developer's shell, and signal handlers and log handlers as before."""
    for name in list(os.environ):
        if name.startswith("FLEXBATCH_"):
            monkeypatch.delenv(name)
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    handlers = logging.getLogger().handlers[:]
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)
    logging.getLogger().handlers[:] = handlers


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("llama", folder, max_position_embeddings=CONTEXT)
    return folder


@pytest.fixture
def command(model_folder: Path) -> Callable[..., int]:
    """Runs the command on the tiny model in this process; returns its exit code."""

    def start(*words: str) -> int:
        fixed = ["--device", "cpu", "--hardware", "cpu"]
        return run.main(
            [
                "--model",
                str(model_folder),
                *fixed,
                "--gpu-memory",
                "64MiB",
                "--cpu-memory",
                "64MiB",
                "--max-tokens",
                "6",
                *words,
            ]
        )

    return start
