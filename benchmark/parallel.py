"""Throughput of one and of several GPUs, and tokens beside those of one: random weights, random distinct prompts, the
plan chosen by the engine.

    python -m benchmark.parallel --output parallel.json
    python -m benchmark.parallel --output p.json --models opt-30b --meshes 1 tp2 pp2 --gpu-gib 24 --limit 900
    python -m benchmark.parallel --output p.json --models opt-30b --prompts 191 --prompt-tokens 256 --new-tokens 16
    python -m benchmark.parallel --output p.json --models opt-30b --layers 24 --gpu-gib 16 --gib-of 1=12 tp2=10.25

What comes behind --then are further runs, with flags of their own; the output, and all seconds, are the first ones'.
A mesh is 1, or sizes in any order joined by x: tp2, pp2, dp2, pp2xtp2. Every run is a process of its own. What it does,
with the time, is on stderr, of every rank; some seconds before --limit every rank writes where each of its threads is,
and at the limit the run is ended. A result is written as soon as it is there; with an output that exists, what it has
is not run again. Figures are generated tokens / seconds of a whole job, its fill and tail included; loading is not. The
bound is what the busiest links allow. With --of-gpus N a mesh of fewer GPUs gets cores and host memory in proportion,
as a machine of its own would have them, and --hardware-of-one, a profile that was measured on that part of the cores.
With --layers a model has some of its layers; --gib-of then says by mesh how much memory a GPU has, so that as large a
share of the weights lies on it as of the whole model in --gpu-gib, by which the run is named.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmark.machine import machine
from benchmark.mesh_jobs import CASES, Tell, checked, measured, recorded_ranks, sizes_of
from flexbatch.policy.stdout import data_apart, run_process

CHECKED = "tokens"
"""The name of the run that compares tokens."""
LAST_SECONDS = 8.0
"""Of a run's limit: for writing where its ranks are."""
logger = logging.getLogger("flexbatch")


def run_one(words: dict[str, Any], tell: Tell) -> None:
    """In the process of a run."""
    if cores := words.get("cores"):
        os.sched_setaffinity(0, cores)
    import torch

    if cores:
        torch.set_num_threads(len(cores))
    sizes = sizes_of(words["mesh"])
    if words["case"] == CHECKED:
        return checked(words["model"], sizes, words["device"], tell)
    case = dataclasses.replace(CASES[words["case"]], **words["job"])
    with recorded_ranks(words["graphs_of_ranks"]):
        trace = words["trace"] and Path(words["trace"])
        measured(case, words["gpu_gib"], sizes, words["set"], tell, words["warm_ups"], trace)


def serve_run(data: Any) -> int:
    """The process of a run: imports everything, and then reads from stdin what to run. So the next run's process can
    start while one is measured."""
    faulthandler.register(signal.SIGUSR1)
    logging.basicConfig(format="%(asctime)s rank 0: %(message)s", level=logging.WARNING, stream=sys.stderr)
    import flexbatch.engine  # noqa: F401

    words = json.loads(sys.stdin.readline() or "null")
    if words is None:
        return 0
    logger.setLevel(logging.DEBUG)
    faulthandler.dump_traceback_later(max(1.0, words["limit"] - LAST_SECONDS))

    def tell(found: dict[str, Any]) -> None:
        # From here: the process of `run_all` looks at no GPU.
        print(json.dumps({**found, "machine": machine()}, default=str), file=data, flush=True)

    run_one(words, tell)
    return 0


class Run:
    """A run's process. It has a group of its own, which its ranks are in, too."""

    def __init__(self, folder: Path, number: int) -> None:
        self.file = folder / f"{number}.json"
        command = [sys.executable, "-m", "benchmark.parallel", "--run"]
        with self.file.open("w") as out:
            self.process = subprocess.Popen(command, stdin=-1, stdout=out, text=True, start_new_session=True)
        self.ended = False

    def result(self, words: dict[str, Any], limit: float) -> dict[str, Any]:
        """What it told last; what went wrong is in it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({**words, "limit": limit}) + "\n")
            self.process.stdin.flush()
        found = {}
        try:
            if self.process.wait(limit - LAST_SECONDS):
                found = {"error": f"exit code {self.process.returncode}; its error is above"}
        except subprocess.TimeoutExpired:
            found = {"error": f"not done within {limit:g} s; where its ranks were is above"}
            os.killpg(self.process.pid, signal.SIGUSR1)
            time.sleep(LAST_SECONDS / 2)
        self.end()
        told = self.file.read_text().splitlines()
        return {**(json.loads(told[-1]) if told else {}), **found}

    def end(self) -> None:
        """Again this does nothing."""
        if self.ended:
            return
        self.ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def equal_share(one: str, other: str) -> float:
    """Of the words of two texts, in order."""
    pairs = list(zip(one.split(), other.split(), strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def share(rate: float, bound: float | None) -> float | None:
    return rate / bound if bound else None


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Of every model and budget, throughput beside one GPU's, its plan and the bound of links and processors; and
    whether tokens are those of one.
    In 16 bits a sum over ranks is rounded elsewhere: there it is the share of prompts with the same first token."""
    told: dict[str, Any] = {}
    for name, result in results.items():
        case = name.rpartition(" ")[0]
        one = results.get(f"{case} 1", {})
        if result.get("tokens_per_second") and one.get("tokens_per_second"):
            told[name] = {
                "tokens_per_second": result["tokens_per_second"],
                "speedup": result["tokens_per_second"] / one["tokens_per_second"],
                "measured_over_predicted": result["measured_over_predicted"],
                "of_the_bound": share(result["tokens_per_second"], result.get("bound_tokens_per_second")),
                "same_first_tokens": equal_share(result["first_tokens"], one["first_tokens"])
                if "first_tokens" in result and "first_tokens" in one
                else None,
            }
        elif case == CHECKED and "token_ids" in result and "token_ids" in one:
            told[name] = result["token_ids"] == one["token_ids"]
    return told


def share_of(mesh: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Cores and settings of a mesh: its part of the machine, and the machine's rates as all of its ranks share them."""
    gpus = prod(sizes_of(mesh).values())
    share = min(1.0, gpus / arguments.of_gpus) if arguments.of_gpus else 1.0
    of_one = arguments.hardware_of_one if share < 1 else None
    found: dict[str, Any] = {}
    cores = sorted(os.sched_getaffinity(0))
    if share < 1:
        found["cores"] = cores[: round(share * len(cores))]
    settings: dict[str, Any] = {}
    if arguments.cpu_gib:
        settings["cpu_memory"] = f"{share * arguments.cpu_gib}GiB"
    if of_one or arguments.hardware:
        from flexbatch.policy.hardware import read_hardware
        from flexbatch.policy.shared_host import OF_THE_HOST, scaled

        file, known = folder / f"{gpus}.hardware.json", read_hardware(Path(of_one or arguments.hardware))
        file.write_text((known if of_one else scaled(known, OF_THE_HOST, share)).to_json())
        settings["hardware"] = str(file)
    return {**found, "set": settings}


def runs(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Every run by its name."""
    more = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.set)}
    device = "cuda" if arguments.device == "auto" else arguments.device
    check = {"case": CHECKED, "model": arguments.check_model, "device": device, "limit": arguments.limit}
    found = {f"{CHECKED} {mesh}": {**check, "mesh": mesh} for mesh in arguments.meshes} if arguments.check_model else {}
    job = {name: getattr(arguments, name) for name in ("prompts", "prompt_tokens", "new_tokens")}
    job = {name: value for name, value in job.items() if value is not None}
    gib_of = {mesh: float(gib) for mesh, gib in (item.split("=", 1) for item in arguments.gib_of)}
    for name in arguments.models:
        part = {} if arguments.layers is None else {"model": f"{CASES[name].model}-{arguments.layers}-layers"}
        for gib in arguments.gpu_gib:
            for mesh in arguments.meshes:
                share = share_of(mesh, arguments, folder)
                words = {**share, "case": name, "gpu_gib": gib_of.get(mesh, gib), "mesh": mesh, "job": job | part}
                words |= {"graphs_of_ranks": arguments.graphs_of_ranks, "warm_ups": arguments.warm_ups}
                label = f"{part.get('model', name)} {gib:g}GiB {mesh}{'+graphs' * bool(arguments.graphs_of_ranks)}"
                words["trace"] = arguments.trace and f"{arguments.trace / label.replace(' ', '-')}.json"
                found[label] = {**words, "set": {**share["set"], **more}, "limit": arguments.limit}
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--output", type=Path)
    found.add_argument("--models", nargs="*", default=["opt-30b", "llama-3-70b"], choices=list(CASES))
    found.add_argument("--meshes", nargs="+", default=["1", "tp2", "pp2", "dp2"])
    found.add_argument("--gpu-gib", nargs="+", type=float, default=[16.0, 24.0])
    for name in ("prompts", "prompt-tokens", "new-tokens"):
        found.add_argument(f"--{name}", type=int, help="of a job, instead of the model's own")
    found.add_argument("--warm-ups", type=int, default=1, help="jobs before the one that is measured")
    found.add_argument("--limit", type=float, default=1200.0, help="seconds of one run")
    found.add_argument("--total", type=float, default=float("inf"), help="seconds of all runs")
    found.add_argument("--check-model", default="demo", help="whose tokens are compared; empty: none")
    found.add_argument("--device", default="auto", help="of that comparison: auto, cuda or cpu")
    found.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="further settings of the engine")
    found.add_argument("--layers", type=int, help="of each model, instead of all")
    found.add_argument(
        "--gib-of", nargs="*", default=[], metavar="MESH=GIB", help="of each GPU, for some of the meshes"
    )
    found.add_argument("--graphs-of-ranks", type=int, help="tensor ranks that may record decode passes")
    found.add_argument("--of-gpus", type=int, help="of the machine: fewer GPUs have their share of its host")
    found.add_argument("--cpu-gib", type=float, help="of host memory, for all GPUs")
    found.add_argument("--hardware", help="a profile of the whole host")
    found.add_argument("--hardware-of-one", help="with --of-gpus: a profile measured on the cores of one GPU's share")
    found.add_argument("--trace", type=Path, metavar="FOLDER", help="where passes of the warm-up are written to")
    found.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    return found


def run_all(parts: Sequence[argparse.Namespace], folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """The result of every run by its name; what is known is in the output after every run. stack: ends the runs that
    are left where this is broken off; each holds the memory of a whole engine, in a session of its own."""

    def started(number: int) -> Run:
        run = Run(folder, number)
        stack.callback(run.end)
        return run

    arguments = parts[0]
    path: Path = arguments.output
    kept = json.loads(path.read_text()) if path.exists() else {"results": {}}
    results = {name: result for name, result in kept["results"].items() if "error" not in result}
    known = kept.get("machine")
    wanted = {name: words for k, each in enumerate(parts) for name, words in runs(each, made(folder / str(k))).items()}
    todo = {name: words for name, words in wanted.items() if name not in results}
    end = time.monotonic() + arguments.total
    following = started(0) if todo else None
    for number, (name, words) in enumerate(todo.items(), 1):
        assert following is not None
        run, following = following, started(number) if number < len(todo) else None
        limit = min(words["limit"], end - time.monotonic())
        if limit < 2 * LAST_SECONDS:
            run.end()
            results[name] = {"error": f"not begun within {arguments.total:g} s"}
        else:
            print(f"{time.strftime('%H:%M:%S')} {name}: {words}", file=sys.stderr, flush=True)
            results[name] = run.result(words, limit)
        known = results[name].pop("machine", known)
        told = {"machine": known, "speedup": summary(results), "results": results}
        path.write_text(json.dumps(told, indent=1))
        print(f"{name}: {summary(results).get(name, results[name].get('error'))}", file=sys.stderr, flush=True)
    return results


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> int:
    words = [list(part) for then, part in itertools.groupby(sys.argv[1:], "--then".__eq__) if not then]
    parts = [parser().parse_args(part) for part in words or [[]]]
    arguments = parts[0]
    with data_apart() as data, TemporaryDirectory() as folder:
        if arguments.run:
            return serve_run(data)
        if arguments.output is None:
            parser().error("--output is needed")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # which `timeout` sends
        with contextlib.ExitStack() as stack:
            results = run_all(parts, Path(folder), stack)
        print(json.dumps(summary(results), indent=1), file=data)
    return 1 if any("error" in result for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(run_process(main))
