"""A server's address is tried before anything is imported that takes seconds."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

CODE = """
import sys
from flexbatch.apps.serve.command import main
code = main(sys.argv[1:])
assert not {"torch", "transformers", "fastapi"} & sys.modules.keys()
sys.exit(code)
"""


@pytest.mark.parametrize("kind", ["bad host", "taken"])
def test_an_address_that_is_none_is_told_before_torch_is_imported(kind: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = ["--host", "bad host"] if kind == "bad host" else ["--port", str(taken.getsockname()[1])]
        done = subprocess.run([sys.executable, "-c", CODE, *address], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot listen at --host" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
