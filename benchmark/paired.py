"""Whether this tree runs offloaded jobs as fast as another one, an older checkout as a rule: the same jobs in both, in
strict turn.

    python -m benchmark.paired BEFORE --scenarios opt-30b-16-16 opt-30b-4-4 --model opt-1.3b --output paired.json

BEFORE is the folder of the other tree. Scenarios are those of `benchmark.suite`, placed by hand, so that both do the
same. Of each a process of either tree loads the model, at the same time, and runs every job once to warm up. Then one
job runs at a time, each process in its turn: before, now, now, before, before, now ... What is told are the ratios of
neighbors, which whatever the machine's other users do makes equally slow or nearly so: whole processes in turn, a
minute apart, gave 523 and 307 tokens/s for one tree and one job.

Few prompts are spread over all micro-batches of a scenario, and every tick has to be launched: 17 of OPT-1.3B over four
are 100 ticks a pass. They took 180 and 203 ms on an H200's host that needs 1.2 ms a tick; a plan by that host's profile
has 176, and 67 with one micro-batch. To measure links and processors take as many prompts as a block has. To measure
what the host does in short passes take a model whose weights hardly count and one micro-batch: --model opt-125m --set
num_gpu_batches=1 has 12 ticks a pass and weights that cross in 5 ms. Its passes with 17 prompts took 16 to 32 ms on
hosts of 0.44 and 0.53 ms a tick, and 68 to 103 in the second pair with CPU attention, whichever the tree: two pairs say
little.

Each scenario has its share of --seconds; what is measured is written at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmark.machine import publish_each
from benchmark.scenarios import GIB, SCENARIOS, Scenario
from flexbatch.parallel.processes import PACKAGE_ROOT
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.stdout import run_process

WORKER = Path(__file__).with_name("paired_worker.py")
TREES = "before", "now"
CLOSING_SECONDS = 5.0


class WorkerError(RuntimeError):
    """A process of a tree failed, ended or took too long."""


class TreeProcess:
    """A process that runs jobs of a tree."""

    def __init__(self, name: str, tree: Path) -> None:
        self.name, self.tree = name, tree
        path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Chunks of different prompts differ in size; without it the allocator near its cap frees and asks the driver.
        environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-c", WORKER.read_text(encoding="utf-8")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tree, env=environ, bufsize=0
        )

    def ask(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which `answer` tells
            self.process.stdin.write(json.dumps(request).encode() + b"\n")

    def answer(self, deadline: float) -> dict[str, Any]:
        """Raises WorkerError."""
        stream = self.process.stdout
        assert stream is not None
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WorkerError(f"{self.name}: no answer by the end of the scenario's time")
            part = stream.read(1 << 16)
            if not part:
                raise WorkerError(f"{self.name}: the process ended with exit code {self.process.wait()}")
            line += part
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise WorkerError(f"{self.name}: {found['error']}")
        return found

    def close(self) -> None:
        """Have it close its engine, or end it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def settings_of(scenario: Scenario, overrides: dict[str, Any]) -> dict[str, Any]:
    """Of `LLM`, which trees of all ages know."""
    return {**scenario.engine_settings(scenario.settings), **overrides}


def ratio_of(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """How much faster jobs of this tree are than their neighbors of the other one. pairs: before and now."""
    ratios = sorted(before["seconds"] / now["seconds"] for before, now in pairs)
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "now_over_before": median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
    }
    for index, name in enumerate(TREES):
        jobs = [pair[index] for pair in pairs]
        found[name] = {
            "tokens_per_second": median(job["generated_tokens"] / job["seconds"] for job in jobs),
            "milliseconds_a_pass": median(1e3 * job["seconds"] / job["passes"] for job in jobs),
            "passes": median(job["passes"] for job in jobs),
            "first_tokens_milliseconds": median(1e3 * job["first_tokens"]["seconds"] for job in jobs),
            "milliseconds_a_later_pass": median(map(later_milliseconds, jobs)),
        }
    return found


def later_milliseconds(job: dict[str, Any]) -> float:
    """Of the passes that come when the prompts have been read, as a rule: those of a job of one token each are
    taken away."""
    first = job["first_tokens"]
    return 1e3 * (job["seconds"] - first["seconds"]) / max(1, job["passes"] - first["passes"])


def turns(
    processes: dict[str, TreeProcess], request: dict[str, Any], repeats: int, until: float, deadline: float
) -> Iterator[list[tuple[dict[str, Any], dict[str, Any]]]]:
    """All pairs of jobs by now, whenever there is one more: until there are so many, or another one would end late."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    longest = 0.0
    while len(pairs) < repeats and (not pairs or time.monotonic() + longest < until):
        begun, found = time.monotonic(), {}
        for name in TREES if len(pairs) % 2 == 0 else reversed(TREES):
            processes[name].ask({"kind": "job", **request})
            found[name] = processes[name].answer(deadline)
        longest = max(longest, time.monotonic() - begun)
        pairs.append((found["before"], found["now"]))
        yield pairs


def measure_scenario(
    name: str, scenario: Scenario, trees: dict[str, Path], args: argparse.Namespace, deadline: float
) -> Iterator[list[dict[str, Any]]]:
    """Rows, one for each number of prompts, whenever more is known. Raises WorkerError."""
    started, rows = time.monotonic(), list[dict[str, Any]]()
    settings = settings_of(scenario, {name: json.loads(value) for name, value in args.set})
    with contextlib.ExitStack() as stack:
        processes = {}
        for each, tree in trees.items():
            processes[each] = TreeProcess(each, tree)
            stack.callback(processes[each].close)
        gpu_bytes = int(scenario.gpu_gib * GIB)
        for process in processes.values():
            process.ask({"model": scenario.model, "settings": settings, "gpu_bytes": gpu_bytes})
        opened = {each: process.answer(deadline) for each, process in processes.items()}
        for each, tree in trees.items():
            if Path(opened[each]["tree"]) != tree:
                raise WorkerError(f"{each}: runs {opened[each]['tree']}, not {tree}")
        about = {"scenario": name, "model": scenario.model, "settings": settings}
        about["opened_seconds"] = {each: opened[each]["took"] for each in trees}
        for index, num_prompts in enumerate(args.num_prompts):
            job = {"num_prompts": num_prompts, "prompt_len": scenario.prompt_len[1], "gen_len": scenario.gen_len}
            warmed = {}
            for each, process in processes.items():
                process.ask({"kind": "warm up", **job, "seed": 0})
                warmed[each] = process.answer(deadline)["took"]
            row = {**about, **job, "warm_up_seconds": warmed, "ready_seconds": time.monotonic() - started}
            rows.append(row)
            # What is left of the time is shared by the jobs that are left.
            until = time.monotonic() + (deadline - time.monotonic()) / (len(args.num_prompts) - index)
            for pairs in turns(processes, {**job, "seed": 1}, args.repeats, until, deadline):
                row |= {**ratio_of(pairs), "jobs": pairs}
                yield rows


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    trees = {"before": args.before.resolve(), "now": PACKAGE_ROOT}
    commits = {"before": args.before_commit or commit_of(trees["before"]), "now": commit_of(trees["now"])}
    done: list[dict[str, Any]] = []
    begun = time.monotonic()
    for index, name in enumerate(args.scenarios):
        scenario = SCENARIOS[name]
        prompt_len, gen_len = args.lengths or (scenario.prompt_len[1], scenario.gen_len)
        model = args.model or scenario.model
        scenario = replace(scenario, model=model, prompt_len=(prompt_len, prompt_len), gen_len=gen_len)
        left = begun + args.seconds - time.monotonic()
        rows: list[dict[str, Any]] = []
        try:
            deadline = time.monotonic() + left / (len(args.scenarios) - index)
            for rows in measure_scenario(name, scenario, trees, args, deadline):
                shown = {key: value for key, value in rows[-1].items() if key not in ("jobs", "settings")}
                print(json.dumps(shown), file=sys.stderr, flush=True)
                yield {"commits": commits, "results": [*done, *rows]}
        except WorkerError as error:  # the other scenarios still count
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            rows = [*rows, {"scenario": name, "error": str(error)}]
        done += rows
    yield {"commits": commits, "results": done}


def commit_of(tree: Path) -> str:
    """Unknown for a folder that is no checkout."""
    command = ["git", "-C", str(tree), "rev-parse", "--show-toplevel", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    return found[1] if len(found) > 1 and Path(found[0]) == tree else "unknown"


def pair_of(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="folder of the other tree")
    parser.add_argument("--before-commit", help="of a folder that is no checkout")
    parser.add_argument("--scenarios", nargs="+", required=True, choices=SCENARIOS, metavar="NAME")
    parser.add_argument("--model", choices=sorted(SHAPES), help="instead of the scenarios' own")
    parser.add_argument("--num-prompts", nargs="+", type=int, default=[17], help="of jobs, one after another")
    parser.add_argument("--lengths", nargs=2, type=int, metavar=("PROMPT", "ANSWER"), help="tokens of each")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of each job at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=150.0, help="of all scenarios (default: %(default)s)")
    parser.add_argument(
        "--set", nargs="*", type=pair_of, default=[], metavar="NAME=JSON", help="engine settings of both trees"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    return publish_each(lambda: measure(args), args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
