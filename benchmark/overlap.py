"""What overlap is worth on the CPU: all weights on disk, ``overlap`` on against off, in one process, by turns.

    python -m benchmark.overlap --output benchmark/results/overlap-cpu.json

Every pass reads all weights from disk again. The engine reads with O_DIRECT where the file system allows it, so the
page cache gives nothing back (`direct_reads` says whether it did). Both engines do the same ticks on the same random
weights and prompts, and must give the same tokens. Without overlap a pass costs reading plus computing, with it no less
than the larger of the two; the block is sized so that the two are of like size, where overlap is worth most (a factor
of two at best). Medians count.

torch gets all cores but one: where it has all of them, the reading threads take turns with its threads, which wait for
each other spinning (on 2 cores the same job then took 5 to 30 s with overlap).

``overlap_figure``, from the trace of each run: seconds in which disk and processor were busy, each for itself, over
seconds in which either was. It is 1 when nothing runs beside anything else and 2 when both are busy all the time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark.machine import machine
from flexbatch.policy.stdout import data_apart, run_process


@dataclass(frozen=True)
class Run:
    """One job: wall-clock seconds, and seconds in which the disk, the processor, or either of them was busy."""

    seconds: float
    disk_seconds: float
    compute_seconds: float
    either_seconds: float
    read_bytes: int

    @property
    def overlap_figure(self) -> float:
        return (self.disk_seconds + self.compute_seconds) / self.either_seconds


def timed(llm: Any, prompts: list[list[int]], new_tokens: int) -> tuple[Run, list[list[int]]]:
    """Run the job once; what it did comes from its spans in the engine's trace."""
    from flexbatch import SamplingParams
    from flexbatch.trace import covered

    begin = llm.tracer.clock()
    completions = llm.generate(prompts, SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True))
    seconds = llm.tracer.clock() - begin
    spans = [span for span in llm.tracer.spans() if span.start >= begin and span.resource in ("disk_read", "compute")]
    disk, compute = ([span for span in spans if span.resource == resource] for resource in ("disk_read", "compute"))
    run = Run(seconds, covered(disk), covered(compute), covered(spans), sum(span.num_bytes for span in disk))
    return run, [completion.token_ids for completion in completions]


def summary(runs: list[Run]) -> dict[str, Any]:
    """Medians, and every run."""
    return {
        "seconds": statistics.median(run.seconds for run in runs),
        "overlap_figure": statistics.median(run.overlap_figure for run in runs),
        "disk_busy_seconds": statistics.median(run.disk_seconds for run in runs),
        "compute_busy_seconds": statistics.median(run.compute_seconds for run in runs),
        "read_GBps_while_busy": statistics.median(run.read_bytes / run.disk_seconds / 1e9 for run in runs),
        "runs": [{**asdict(run), "overlap_figure": run.overlap_figure} for run in runs],
    }


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    from flexbatch import LLM

    torch.set_num_threads(arguments.threads)
    settings = {
        "percent": (0, 0, 100, 0, 100, 0),
        "gpu_batch_size": arguments.sequences // arguments.micro_batches,
        "num_gpu_batches": arguments.micro_batches,
        "hardware": "cpu",
        "device": "cpu",
        "dtype": "float32",
        "gpu_memory": arguments.gpu_memory,
    }
    generator = random.Random(1)
    prompts = [[generator.randrange(10, 1000) for _ in range(arguments.prompt_len)] for _ in range(arguments.sequences)]
    engines = {
        on: LLM(arguments.model, dummy_weights=True, trace=True, overlap=on, offload_dir=str(folder), **settings)
        for on in (True, False)
    }
    runs: dict[bool, list[Run]] = {True: [], False: []}
    try:
        tokens = {on: timed(llm, prompts, 2)[1] for on, llm in engines.items()}
        for repeat in range(arguments.repeats):
            for on in (True, False) if repeat % 2 else (False, True):
                run, tokens[on] = timed(engines[on], prompts, arguments.gen_len)
                runs[on].append(run)
                figures = (
                    f"{run.seconds:.2f} s, disk {run.disk_seconds:.2f}, compute {run.compute_seconds:.2f}, "
                    f"overlap figure {run.overlap_figure:.2f}"
                )
                print(f"overlap {'on ' if on else 'off'}: {figures}", file=sys.stderr, flush=True)
            if tokens[True] != tokens[False]:
                raise SystemExit("overlap changed the tokens; the times mean nothing")
        files = list(engines[True].weights.files.values())
        direct = all(file.direct != file.buffered for file in files)
    finally:
        for llm in engines.values():
            llm.close()
    on, off = summary(runs[True]), summary(runs[False])
    return {
        "off_over_on": off["seconds"] / on["seconds"],
        "on": on,
        "off": off,
        "least_possible_seconds": max(on["disk_busy_seconds"], on["compute_busy_seconds"]),
        "model": f"{arguments.model}, random weights, float32, all of them on disk",
        "settings": settings,
        "sequences": arguments.sequences,
        "prompt_tokens_each": arguments.prompt_len,
        "new_tokens_each": arguments.gen_len,
        "direct_reads": direct,
        "threads": arguments.threads,
        "load_average": os.getloadavg()[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-125m", help="a public shape (default: opt-125m)")
    parser.add_argument("--sequences", type=int, default=64, help="sequences of the block (default: 64)")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches of the block (default: 4)")
    parser.add_argument("--prompt-len", type=int, default=2, help="tokens of each prompt (default: 2)")
    parser.add_argument("--gen-len", type=int, default=8, help="new tokens of each sequence (default: 8)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, by turns (default: 5)")
    spare = max(1, len(os.sched_getaffinity(0)) - 1)
    parser.add_argument(
        "--threads",
        type=int,
        default=spare,
        help="torch threads (default: all cores but one, which the reading threads need)",
    )
    parser.add_argument(
        "--gpu-memory", default="2GiB", help="budget of the gpu tier, plain memory here (default: 2GiB)"
    )
    parser.add_argument(
        "--offload-dir",
        type=Path,
        help="folder of the weight files on the disk to be measured (default: a temporary one)",
    )
    parser.add_argument("--output", type=Path, help="JSON file with machine, versions and commit")
    arguments = parser.parse_args()
    with data_apart() as data:
        started = time.time()
        with tempfile.TemporaryDirectory(dir=arguments.offload_dir, prefix="flexbatch-overlap-") as folder:
            results = measure(arguments, Path(folder))
        if arguments.output:
            info = {**machine(), "cores": str(len(os.sched_getaffinity(0)))}
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(
                json.dumps({"machine": info, "results": results}, indent=1) + "\n", encoding="utf-8"
            )
        on, off = results["on"], results["off"]
        print(
            f"overlap on {on['seconds']:.2f} s, off {off['seconds']:.2f} s: on is {results['off_over_on']:.2f}x as "
            "fast",
            file=data,
        )
        figures = f"on {on['overlap_figure']:.2f}, off {off['overlap_figure']:.2f}"
        print(f"overlap figure of the trace: {figures}; measured in {time.time() - started:.0f} s", file=data)
        return 0


if __name__ == "__main__":
    sys.exit(run_process(main))
