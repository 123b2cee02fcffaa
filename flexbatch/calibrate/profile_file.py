"""Writes the profile of a machine to its file; reading one is `policy.hardware`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from flexbatch.policy.hardware import Hardware


def write_hardware(hardware: Hardware, path: Path) -> None:
    """Writes the profile whole or not at all, whoever else writes it at this moment. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(hardware.to_json() + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
