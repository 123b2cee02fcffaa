"""The batch command as a process of its own: ``python -m tests.apps_batch.driver '{"block": 8}' INPUT OUTPUT ...`` with
the fake engine.

``{"config_file": ...}`` appends the settings that the engine gets to a file, and ``{"nohup": true}`` starts it as nohup
would.

``{"syncs": folder}`` notes there what every fsync makes durable, ``{"signal_at": [function, count, signal]}`` sends
this process a signal at a chosen point, ``{"locks": false}`` takes its file locks away (`tests.apps_batch.power`).

With ``{"real": true, "count_file": ...}`` it runs the real one, and counts every token that is generated there,
those of killed processes and of Ray's actors included. ``{"put_aside": file}`` beside it makes a sequence step aside
before every second pass, and notes a byte in the file for each. ``{"taught": 3}`` lets it have seen answers of three
tokens before, so that it reserves far too little.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from flexbatch.apps.batch import main, open_llm
from flexbatch.config import EngineConfig
from flexbatch.policy.stdout import run_process
from tests.apps_batch.fake import FakeLLM
from tests.apps_batch.power import record_syncs, signal_at, without_locks


def open_counted(count_file: str, taught: int, config: EngineConfig, seen: Any) -> Any:
    """The real engine of this process, be it an actor, with its tokens counted."""
    from flexbatch.execution.decoding import Decoding
    from flexbatch.execution.sequence import Sequence

    descriptor = os.open(count_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    extend, take_plain, append = Sequence.extend, Sequence.take_plain, Decoding.append

    def counted(self: Sequence, token_ids: Any) -> int:
        os.write(descriptor, b"." * len(token_ids))
        return extend(self, token_ids)

    def counted_plain(self: Sequence, token_id: int) -> bool:
        taken = take_plain(self, token_id)
        os.write(descriptor, b"." * taken)
        return taken

    def counted_arrays(self: Decoding, *arguments: Any, **more: Any) -> tuple[set[int], list[tuple[int, int]]]:
        taken, left = append(self, *arguments, **more)
        os.write(descriptor, b"." * len(taken))
        return taken, left

    Sequence.extend, Sequence.take_plain = counted, counted_plain  # type: ignore[method-assign]
    Decoding.append = counted_arrays  # type: ignore[method-assign]
    llm = open_llm(config, seen)
    if taught:
        from tests.engine.test_stepping_aside import teach

        teach(llm, taught)
    return llm


def put_aside(noted: str) -> None:
    """Let any sequence step aside before every second pass of this process."""
    from flexbatch.execution.scheduler import Scheduler

    next_pass, chance = Scheduler.next_pass, random.Random(0)
    descriptor = os.open(noted, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def disturbed(scheduler: Scheduler) -> Any:
        if len(scheduler.running) > 1 and chance.random() < 0.5:
            in_place = not scheduler.aside.recomputes or chance.random() < 0.3
            scheduler.step_aside(chance.choice(list(scheduler.running.values())), in_place=in_place)
            scheduler.check()
            os.write(descriptor, b".")
        return next_pass(scheduler)

    Scheduler.next_pass = disturbed  # type: ignore[method-assign]


if __name__ == "__main__":
    settings, words = json.loads(sys.argv[1]), sys.argv[2:]
    if settings.pop("real", False):
        if "put_aside" in settings:
            put_aside(settings["put_aside"])
        counting = functools.partial(open_counted, settings["count_file"], settings.get("taught", 0))
        sys.exit(run_process(lambda: main(words, open_engine=counting)))
    if settings.pop("nohup", False):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    config_file = settings.pop("config_file", None)
    if not settings.pop("locks", True):
        without_locks()
    if (syncs := settings.pop("syncs", None)) is not None:
        record_syncs(Path(syncs))
    if (point := settings.pop("signal_at", None)) is not None:
        signal_at(*point)

    def open_fake(config: EngineConfig, seen: Any) -> FakeLLM:
        if config_file is not None:
            with open(config_file, "a") as file:
                file.write(json.dumps(dataclasses.asdict(config)) + "\n")
        return FakeLLM(**settings)

    def identity(config: EngineConfig) -> dict[str, str]:
        return {"weights": f"fake {config.model}"}

    sys.exit(run_process(lambda: main(words, open_engine=open_fake, identity=identity)))
