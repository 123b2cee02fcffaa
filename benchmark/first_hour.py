"""How soon each command says something: help, a mistake, a plan, the first answer of a job.

    python -m benchmark.first_hour

No GPU and no network are needed: the jobs run the demo model on the CPU. A command's first useful line is its first
on stdout or stderr that is no progress of starting up; of a job it is the first finished row. Of several runs the
quickest counts, since whatever else the machine does only adds. Exits with 1 where a command ends with another code
than it should, or where stdout holds anything but its data.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from benchmark.machine import machine
from flexbatch.__main__ import COMMANDS
from flexbatch.validation.errors import DONE, USAGE

ROOT = Path(__file__).parents[1]
ON_CPU = ["--device", "cpu", "--hardware", "cpu", "--gpu-memory", "64MiB", "--cpu-memory", "64MiB"]
ROWS = 23


def is_text(out: str) -> bool:
    return bool(out.strip())


def is_nothing(out: str) -> bool:
    return out == ""


def is_report(out: str) -> bool:
    document = json.loads(out)
    return len(document["completions"]) == ROWS and "report" in document


@dataclass(frozen=True)
class Step:
    """What a user types, and what comes of it."""

    name: str
    words: Sequence[str]
    goal_seconds: float | None
    first: str | None = None
    """A part of the first useful line; None: the first line whatever it says."""
    code: int = DONE
    is_data: Callable[[str], bool] = is_nothing
    """Whether this is all that stdout should hold."""


def steps(folder: Path) -> list[Step]:
    prompts, table, model = folder / "prompts.jsonl", folder / "table.jsonl", ["--model", "demo", *ON_CPU]
    rows = [json.dumps({"prompt": f"def f{number}(a, b):"}) for number in range(ROWS)]
    prompts.write_text("\n".join(rows) + "\n")
    table.write_text("\n".join(rows) + "\n")
    job = ["batch", str(table), str(folder / "out"), "--prompt-column", "prompt", *model, "--max-tokens", "9"]
    run = ["run", "--prompts", str(prompts), *model, "--max-tokens", "9"]
    plan = ["plan", "llama-3.1-70b", "--gpu", "RTX 4090", "--cpu-memory", "64GiB", "--weight-bits", "4"]
    helps = [Step(f"{name} --help", [name, "--help"], 0.3, is_data=is_text) for name in COMMANDS]
    return [
        *helps,
        Step("a flag mistyped", ["run", "--max-token", "5"], 1.0, code=USAGE),
        Step("a model that is nowhere", ["run", "--model", "opt-30x"], 1.0, code=USAGE),
        Step("prompts that are nowhere", ["run", "--prompts", "none.txt"], 1.0, code=USAGE),
        Step("a schema that is nowhere", ["run", "--json-schema", "none.json"], 1.0, code=USAGE),
        Step("a size without a unit", ["run", "--gpu-memory", "16"], 1.0, code=USAGE),
        Step("a plan for a machine one has not", plan, None, "fits", is_data=is_text),
        Step("run: the first of 23 answers", run, None, "prompt 0", is_data=is_text),
        Step("run --json: all answers", [*run, "--json"], None, '"completions"', is_data=is_report),
        Step("batch: the first of 23 rows", job, None, "rows", is_data=is_nothing),
        Step("complete: the first token", ["complete", "def f(x):", *model], None, "def f(x):", is_data=is_text),
    ]


def timed(step: Step, folder: Path) -> tuple[float, float, int, str]:
    """Seconds to the first useful line and to the end, exit code and stdout."""
    shown = folder / "shown"
    command = [sys.executable, "-m", "flexbatch", *step.words]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (folder / "stdout").open("w+") as out, shown.open("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        first = None
        while process.poll() is None or first is None:
            text = (folder / "stdout").read_text() + shown.read_text()
            if first is None and (step.first in text if step.first else "\n" in text):
                first = time.perf_counter() - began
            elif process.returncode is not None:
                break
            time.sleep(0.002)
        process.wait()
        total = time.perf_counter() - began
    return total if first is None else first, total, process.returncode, (folder / "stdout").read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command; the quickest counts")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    lines, wrong = [], []
    with tempfile.TemporaryDirectory() as name:
        for step in steps(Path(name)):
            found = [timed(step, Path(name)) for _ in range(arguments.repeats if step.goal_seconds else 1)]
            wrong += [f"{step.name}: exit code {code}" for *_, code, _ in found if code != step.code]
            wrong += [f"{step.name}: stdout is {out[:200]!r}" for *_, out in found if not step.is_data(out)]
            seconds = min(first for first, *_ in found), min(total for _, total, *_ in found)
            lines.append({"command": step.name, "first line s": seconds[0], "end s": seconds[1],
                          "goal s": step.goal_seconds})  # fmt: skip
    print(tabulate(lines, headers="keys", floatfmt=".2f"))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "commands": lines}, indent=1) + "\n")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
