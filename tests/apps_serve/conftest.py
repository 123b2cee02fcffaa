"""One server for all tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from tests.apps_serve.helpers import PLACED, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    state: Path = tmp_path_factory.mktemp("serve") / "state"
    made = Server(state, *PLACED, "--max-request-size", "1MiB", "--max-file-size", "16MiB", "--max-waiting", "64")
    yield made
    said = made.stop()
    assert made.process.returncode == 0 and "Traceback" not in said, said
