"""The manifest of an output folder, ``.flexbatch/manifest.json``: which job writes there, and since when."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexbatch.files.atomic import rename_if_absent, sync_folder, temporary_name
from flexbatch.validation.errors import ConfigurationError

STATE, MANIFEST = ".flexbatch", "manifest.json"
FORMAT = 2
"""Version of the format of the output folder. It is part of a job's fingerprint, so a job is never resumed by a
program that would read its logs differently."""
PART_FILE = re.compile(r"part-\d{5,}\.(parquet|jsonl)|\.part-\d{5,}\.(parquet|jsonl)(\.[0-9a-f]{16})?\.tmp")


def fingerprint_digest(fingerprint: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).digest()[:16]


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yields ``generation.temperature: 0.0 in the output, 0.7 now`` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key, "absent"), new.get(key, "absent"), f"{path}.{key}" if path else key)
    elif old != new:
        yield (
            f"{path}: {old if isinstance(old, str) else json.dumps(old)} in the output, "
            f"{new if isinstance(new, str) else json.dumps(new)} now"
        )


def refuse_other_files(folder: Path) -> None:
    """Raises ConfigurationError for a folder that holds files but no job."""
    others = [entry.name for entry in folder.iterdir() if entry.name != STATE] if folder.is_dir() else []
    if others:
        listing = ", ".join(sorted(others)[:3])
        raise ConfigurationError(
            f"output {folder} already holds {listing} and no job of FlexBatch: choose an empty folder"
        )


def open_manifest(folder: Path, fingerprint: dict[str, Any], ours: bool) -> int:
    """Creates or compares the manifest; returns the unix time at which the job began. Without ``ours`` a folder that
    holds other files gets none. Raises ConfigurationError that lists the differences to another job."""
    path = folder / STATE / MANIFEST
    if not path.exists():
        if not ours:
            refuse_other_files(folder)
        temporary = temporary_name(path)
        with temporary.open("w") as file:
            content = {"format": FORMAT, "created": int(time.time()), "fingerprint": fingerprint}
            json.dump(content, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        if not rename_if_absent(temporary, path):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    try:
        found = json.loads(path.read_text())
        changes = list(differences(found["fingerprint"], fingerprint))
        created = int(found["created"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is damaged ({error}): restore it, or start over with --overwrite") from None
    if changes:
        listing = "\n  ".join(changes[:20] + ([f"and {len(changes) - 20} more"] if len(changes) > 20 else []))
        raise ConfigurationError(
            f"output {folder} belongs to another job:\n  {listing}\nUse those settings, another output "
            "folder, or --overwrite to start over"
        )
    return created


def _folders_of_job(folder: Path) -> Iterator[Path]:
    """Yields the output folder and those of its partitions, inner ones first. Another folder in it is somebody
    else's, perhaps the output of another job."""
    for entry in folder.iterdir():
        if "=" in entry.name and entry.is_dir() and not entry.is_symlink():
            yield from _folders_of_job(entry)
    yield folder


def discard_job(folder: Path) -> bool:
    """Removes parts and state of whatever job wrote here, if one did; other files stay. The manifest goes last, so
    that an interrupted removal can be repeated."""
    if not (folder / STATE / MANIFEST).exists():
        return False
    folders = list(_folders_of_job(folder))
    for path in (path for each in folders for path in each.iterdir()):
        if PART_FILE.fullmatch(path.name) and path.is_file():
            path.unlink()
    for path in [*(folder / STATE).glob("*.log"), folder / STATE / MANIFEST]:
        path.unlink(missing_ok=True)
    for path in folders[:-1]:
        with contextlib.suppress(OSError):
            path.rmdir()
    return True
