"""Runs the settings of `benchmark.policy_settings` on this machine and writes one JSON line each: what
`benchmark.policy_error` compares.

    python -m benchmark.policy_runs runs.jsonl --hardware h200
    python -m benchmark.policy_runs neighbors.jsonl --hardware h200 --neighbors
    python -m benchmark.policy_runs drawn.jsonl --seed 1 --count 20
    python -m benchmark.policy_runs experts.jsonl --hardware h100 --experts
    python -m benchmark.policy_runs layers.jsonl --hardware h100 --few-layers
    python -m benchmark.policy_runs users.jsonl --hardware h100 --users

Settings whose names are in the file already are left out, so that a run that was cut goes on where it stopped. A
child process runs them; after an error of the GPU, which no later setting would survive, another child goes on with
the rest. On a borrowed machine plans are made first, and what they will launch is compiled, in all cores at once; and
the shortest jobs run first:

    python -m benchmark.policy_runs drawn.jsonl --hardware machine.json --seed 1 --plan plans.json --processes 16
    python -m benchmark.policy_runs drawn.jsonl --hardware machine.json --seed 1 --plans plans.json
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark.drawn_settings import draw
from benchmark.machine import machine
from benchmark.observed import measure, open_engine
from benchmark.plans_ahead import settings_in, write_plans
from benchmark.policy_neighbors import run_neighborhood
from benchmark.policy_settings import EXPERTS, FEW_LAYERS, NEIGHBORHOODS, SETTINGS, USERS, Setting
from benchmark.set_up import as_words

GRACE_SECONDS = 30.0
"""After a setting's limit: then its process is taken to hang, and is ended."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after ``seconds``, in the main thread.

    Compiled code that calls back into Python may make another error of it (a HiGHS call: TypeError) and a log
    handler swallows it, so that the end of the block tells what happened, not the error that arrives there.
    """
    message = f"took longer than its limit of {seconds:.3g} s"
    expired = False

    def stop(*_: Any) -> None:
        nonlocal expired
        expired = True
        raise TimeoutError(message)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as error:
        if expired:
            raise TimeoutError(message) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if expired:
        raise TimeoutError(message)


def run_setting(setting: Setting, hardware: str, fixed: dict[str, Any]) -> dict[str, Any]:
    with open_engine(setting, hardware, fixed) as llm:
        return measure(llm, setting)


def table_of(arguments: argparse.Namespace) -> dict[str, Setting]:
    """The settings that are to be run, by name."""
    if arguments.seed is not None:
        return draw(arguments.seed, arguments.count)
    if arguments.few_layers:
        return FEW_LAYERS
    if arguments.users:
        return USERS
    return NEIGHBORHOODS if arguments.neighbors else EXPERTS if arguments.experts else SETTINGS


def recorded(path: Path) -> list[str]:
    """Names in the file."""
    return (
        [json.loads(line)["name"] for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
    )


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def run_here(names: list[str], arguments: argparse.Namespace) -> int:
    """In this process. Returns 1 after an error that the next setting may not survive."""
    import torch

    plans = settings_of(arguments)
    table, run = table_of(arguments), run_neighborhood if arguments.neighbors else run_setting
    for name in names:
        started = time.perf_counter()
        fatal = False
        try:
            with time_limit(arguments.limit or table[name].limit_seconds):
                record = run(table[name], arguments.hardware, plans.get(name, {}))
        except Exception as error:  # the remaining settings still count
            fatal = "CUDA" in f"{type(error).__name__} {error}"
            record = {"error": f"{type(error).__name__}: {error}"[:2000]}
        append(arguments.runs, {"name": name, "total_seconds": time.perf_counter() - started, **record})
        measured = (
            f"{record['tokens_per_second']:.1f} tok/s, predicted {record['predicted_then']:.1f}, "
            f"{record['seconds']:.2f} s, set-up: {as_words(record['set_up'])}"
            if "tokens_per_second" in record
            else "done"
        )
        print(
            f"{name}: {record.get('error', measured)} ({time.perf_counter() - started:.0f} s in all)",
            file=sys.stderr,
            flush=True,
        )
        for variant in record.get("compiled_in_passes", ()):
            print(f"  compiled {variant}", file=sys.stderr, flush=True)
        if fatal:
            return 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def drive(names: list[str], arguments: argparse.Namespace) -> None:
    """Child processes until every setting is in the file or the time is up."""
    table = table_of(arguments)
    deadline = time.monotonic() + arguments.seconds
    while pending := [name for name in names if name not in recorded(arguments.runs)]:
        command = [sys.executable, "-m", "benchmark.policy_runs", *sys.argv[1:], "--child", "--only", *pending]
        child = subprocess.Popen(command, env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
        since, done = time.monotonic(), len(recorded(arguments.runs))
        while child.poll() is None:
            time.sleep(0.5)
            now = recorded(arguments.runs)
            if len(now) > done:
                since, done = time.monotonic(), len(now)
            current = next((name for name in pending if name not in now), pending[-1])
            hangs = time.monotonic() > since + (arguments.limit or table[current].limit_seconds) + GRACE_SECONDS
            if hangs or time.monotonic() > deadline:
                child.kill()
                child.wait()
                append(
                    arguments.runs, {"name": current, "error": "hangs" if hangs else "the time for all settings was up"}
                )
                break
        if time.monotonic() > deadline:
            break
        if child.returncode and not [name for name in pending if name in recorded(arguments.runs)]:
            append(arguments.runs, {"name": pending[0], "error": f"its process ended with code {child.returncode}"})


def plans_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What --plan has written, by name."""
    return json.loads(arguments.plans.read_text()) if arguments.plans else {}


def settings_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What plans leave nothing to choose of, by name."""
    return {name: settings_in(plan) for name, plan in plans_of(arguments).items()}


def shortest_first(names: list[str], plans: dict[str, dict[str, Any]]) -> list[str]:
    """A run that is cut has then measured the most settings. Settings without a plan come last, in their order."""
    return sorted(names, key=lambda name: plans.get(name, {}).get("predicted_seconds", math.inf))


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmark.policy_runs", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("runs", type=Path, help="JSON lines, appended to")
    parser.add_argument(
        "--hardware",
        default="auto",
        help="the machine's profile that policies are chosen by: auto, a shipped name or a JSON file",
    )
    parser.add_argument(
        "--neighbors", action="store_true", help="compare the chosen policy with its neighbors in the shorter jobs"
    )
    parser.add_argument("--experts", action="store_true", help="mixtures of experts in the place of dense models")
    parser.add_argument("--users", action="store_true", help="jobs that plans were once wrong about")
    parser.add_argument("--few-layers", action="store_true", help="mixtures of experts of which a few layers are run")
    parser.add_argument("--seed", type=int, help="draw the settings by this seed (benchmark.drawn_settings)")
    parser.add_argument("--count", type=int, default=20, help="how many are drawn (default: 20)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these settings, also when the file has them already under an error"
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="time for all of them (default: 540)")
    parser.add_argument("--limit", type=float, help="time for each, instead of the setting's own")
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="JSON",
        help="run nothing: add what the optimizer chooses for each setting to this file, and compile its kernels where "
        "there is a GPU",
    )
    parser.add_argument(
        "--plans",
        type=Path,
        metavar="JSON",
        help="run what --plan has written; settings that it lacks are chosen for now",
    )
    parser.add_argument("--processes", type=int, default=1, help="that --plan makes plans and compiles in (default: 1)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = argument_parser()
    arguments = parser.parse_args()
    table = table_of(arguments)
    names = arguments.only or list(table)
    if unknown := set(names) - set(table):
        parser.error(f"unknown settings {sorted(unknown)}; known: {', '.join(table)}")
    if arguments.plan:
        settings = {name: table[name] for name in names}
        return 1 if write_plans(arguments.plan, settings, arguments.hardware, arguments.processes) else 0
    if arguments.child:
        return run_here(names, arguments)
    arguments.runs.parent.mkdir(parents=True, exist_ok=True)
    arguments.runs.with_suffix(".machine.json").write_text(json.dumps(machine()) + "\n")
    drive(shortest_first(names, plans_of(arguments)), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
