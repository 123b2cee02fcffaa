"""Writes the profile of a machine to its file; reading one is `policy.hardware`."""

from __future__ import annotations

from pathlib import Path

from flexbatch.files.atomic import replacing
from flexbatch.policy.hardware import Hardware


def write_hardware(hardware: Hardware, path: Path) -> None:
    """Writes the profile whole or not at all, whoever else writes it at this moment. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, 0o600) as file:
        file.write((hardware.to_json() + "\n").encode())
