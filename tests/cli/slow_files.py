"""``flexbatch run`` with a disk on which a file takes a tenth of a second more until it has its name, so that a test on
a busy machine comes to killing it before all are written."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flexbatch import run
from flexbatch.files.atomic import replacing
from flexbatch.memory import files
from flexbatch.policy.stdout import run_process


@contextlib.contextmanager
def slowly(path: Path, mode: int) -> Iterator[BinaryIO]:
    with replacing(path, mode) as file:
        yield file
        file.flush()
        time.sleep(0.1)


if __name__ == "__main__":
    files.replacing = slowly  # type: ignore[assignment]
    sys.exit(run_process(run.main))
