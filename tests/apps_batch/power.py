"""A loss of power, as far as a file system that was promised nothing may go.

`record_syncs`, inside a job's process, notes in a side folder what every fsync made durable: how many bytes of a file,
and which entries of a folder (whose files it keeps by hard links, so that they can come back). `lose_power` then takes
away, at random, whatever was not: bytes behind the last fsync are cut off, zeros, or lack pages; entries that were
created vanish, that were removed return, that were replaced are the old ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGES = (512, 4096)


def record_syncs(side: Path) -> None:
    """From now on, in this process."""
    (side / "kept").mkdir(parents=True, exist_ok=True)
    descriptor = os.open(side / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def noted(sync: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(target: int) -> None:
            path, status = os.readlink(f"/proc/self/fd/{target}"), os.fstat(target)
            event: dict[str, Any] = {"inode": status.st_ino, "bytes": status.st_size}
            if os.path.isdir(path):
                event = {"folder": path, "entries": {}}
                for entry in os.scandir(path):
                    event["entries"][entry.name] = entry.inode()
                    if entry.is_file():
                        with contextlib.suppress(FileExistsError, FileNotFoundError):
                            os.link(entry.path, side / "kept" / str(entry.inode()))
            sync(target)
            os.write(descriptor, json.dumps(event).encode() + b"\n")

        return wrapped

    os.fsync, os.fdatasync = noted(os.fsync), noted(os.fdatasync)


def signal_at(point: str, count: int, number: int) -> None:
    """This process gets the signal at the ``count``-th call of a function ``module:name``, before it does anything; of
    a method that writes ``data``, when half of it is written."""
    import importlib

    module, name = point.split(":")
    owner: Any = importlib.import_module(f"flexbatch.apps.jobs.{module}")
    *classes, name = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            if name == "_write":
                function(args[0], args[1][: len(args[1]) // 2], **kwargs)
            os.kill(os.getpid(), number)
            if name == "_write":
                return function(args[0], args[1][len(args[1]) // 2 :], **kwargs)
        return function(*args, **kwargs)

    static = isinstance(owner.__dict__.get(name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def without_locks() -> None:
    """As on a network file system whose locks are not seen by other machines."""
    import fcntl

    fcntl.flock = lambda descriptor, operation: None


POINTS = (
    "records:RecordLog._write", "records:RecordLog.sync", "records:sync_folder", "store:OutputStore._publish",
    "store:rename_if_absent", "store:sync_folder", "store:make_folder", "grants:Grant.take", "grants:sync_folder",
    "journal:Journal._rotate", "journal:Journal.committed", "store:OutputStore.sync", "store:open_manifest",
)  # fmt: skip
"""Where a job is killed on purpose: around every step that makes something durable or visible."""


def lose_power(out: Path, side: Path, chance: random.Random) -> list[str]:
    """Damages what a job left behind; returns what was done. The events are used up: what is there now is durable."""
    sizes: dict[int, int] = {}
    folders: dict[str, dict[str, int]] = {}
    for line in (side / "events").read_text().splitlines() if (side / "events").exists() else ():
        event = json.loads(line)
        if "folder" in event:
            folders[event["folder"]] = event["entries"]
        else:
            sizes[event["inode"]] = max(sizes.get(event["inode"], 0), event["bytes"])
    done: list[str] = []
    _lose_entries(out.parent, {out.name}, folders, side / "kept", chance, done)
    for path in sorted(out.rglob("*")) if out.exists() else ():
        if path.is_file():
            _lose_bytes(path, sizes.get(path.stat().st_ino, 0), chance, done)
    shutil.rmtree(side, ignore_errors=True)
    _make_durable(out, side)
    return done


def _make_durable(out: Path, side: Path) -> None:
    (side / "kept").mkdir(parents=True)
    with (side / "events").open("w") as file:
        for folder in (out.parent, out, *(path for path in out.rglob("*") if path.is_dir())) if out.exists() else ():
            entries = {}
            for path in folder.iterdir():
                if folder == out.parent and path != out:
                    continue
                entries[path.name] = status = path.stat().st_ino
                if path.is_file():
                    os.link(path, side / "kept" / str(status))
                    file.write(json.dumps({"inode": status, "bytes": path.stat().st_size}) + "\n")
            file.write(json.dumps({"folder": str(folder), "entries": entries}) + "\n")


def _lose_entries(
    folder: Path, names: set[str] | None, folders: dict[str, dict[str, int]], kept: Path, chance: random.Random,
    done: list[str],
) -> None:  # fmt: skip
    durable = folders.get(str(folder), {})
    now = {entry.name: entry.inode() for entry in os.scandir(folder)}
    for name in sorted({*durable, *now} if names is None else names):
        path = folder / name
        if durable.get(name) != now.get(name) and chance.random() < 0.5:
            done.append(f"{path.name}: {'gone' if name not in durable else 'as it was'}")
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if name in durable and (kept / str(durable[name])).exists():
                os.link(kept / str(durable[name]), path)
        if path.is_dir():
            _lose_entries(path, None, folders, kept, chance, done)


def _lose_bytes(path: Path, synced: int, chance: random.Random, done: list[str]) -> None:
    size = path.stat().st_size
    if synced >= size:
        return
    position = chance.randint(synced, size)
    kind = chance.choice(("cut", "zeros", "zeros and longer", "pages", "nothing"))
    with path.open("r+b") as file:
        if kind == "cut":
            file.truncate(position)
        elif kind == "pages":
            page = chance.choice(PAGES)
            for start in range(synced // page * page, size, page):
                if chance.random() < 0.5:
                    first = max(start, synced)
                    file.seek(first)
                    file.write(bytes(min(start + page, size) - first))
        elif kind != "nothing":
            file.seek(position)
            file.write(bytes(size - position + (chance.randrange(5000) if kind == "zeros and longer" else 0)))
    done.append(f"{path.name}: {kind}, {synced:,} of {size:,} bytes were durable")
