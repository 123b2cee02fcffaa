"""How busy the GPU is while a job runs that lies on it whole, what it waits for, and what the host does meanwhile.

    python -m benchmark.gpu_busy --model llama-3-8b --prompts 1000 --new-tokens 128
    python -m benchmark.gpu_busy --model llama-3-8b --async-scheduling false
    python -m benchmark.gpu_busy --model qwen3-0.6b --lengths 20 60
    python -m benchmark.gpu_busy --model opt-6.7b --prompts 4 --lengths 512 512

Random weights of a public shape, ragged prompts, by default of 20 to 400 tokens. The job runs three times, each with
prompts of its own: to warm up, timed, and with torch's profiler on some passes in the middle and on some that read
prompts, of the GPU alone: recording the host as well would slow it down. ``busy`` is the share of those passes in which
at least one kernel or copy ran; ``gaps`` are the waits between them, the longest first, each with the kernel before and
after it. Of the timed run are ``kinds``, the passes by how they were launched, ``set_up``, what it still compiled and
recorded, ``host``, milliseconds a pass of the parts of a turn, and ``card``, its clock and power. Without a GPU the
device is the CPU, and ``card`` and what is profiled are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmark.card_state import CardState
from benchmark.machine import publish_each
from benchmark.part_times import Parts, PartTimes
from benchmark.pass_times import PassTimes
from benchmark.set_up import made_between
from flexbatch import LLM, SamplingParams
from flexbatch.execution.passes import Passes
from flexbatch.execution.sampler import SampledPass
from flexbatch.execution.scheduler import Scheduler
from flexbatch.intake import Intake
from flexbatch.loop import EngineLoop
from flexbatch.policy.stdout import run_process

PARTS: Parts = {
    "advance and admit": (Scheduler, "advance"),
    "compose": (Scheduler, "next_pass"),
    "compose and launch": (Passes, "launch"),
    "wait and read": (SampledPass, "read"),
    "commit": (Scheduler, "commit"),
    "sample": (Passes, "sample"),
    "turn": (Passes, "turn"),
    "pass": (EngineLoop, "run_pass"),
    "completions": (Intake, "completion_of"),
}
"""Parts of a pass; composing is in "compose and launch", too, these are in "turn", and a turn and what observers make
of it in "pass"."""
GAPS = 12


class Window:
    """Profiles some turns of a run."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count, self.turn = first, count, 0
        self.profiler = profile(activities=[ProfilerActivity.CUDA])

    def __enter__(self) -> Window:
        self.original: Callable[[Passes], Any] = Passes.turn

        def turn(passes: Passes) -> Any:
            if self.count and self.turn == self.first:
                torch.cuda.synchronize()
                self.profiler.start()
            done = self.original(passes)
            self.turn += 1
            if self.turn == self.first + self.count:
                torch.cuda.synchronize()
                self.profiler.stop()
            return done

        Passes.turn = turn  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Passes.turn = self.original  # type: ignore[method-assign]
        if self.first < self.turn < self.first + self.count:
            self.profiler.stop()

    def report(self) -> dict[str, Any]:
        spans = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in self.profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        passes = min(self.count, self.turn - self.first)
        extent_us = max(end for _, end, _ in spans) - spans[0][0] if spans else 0.0
        return {"passes": passes, "mean_pass_ms": round(extent_us / 1e3 / max(1, passes), 3), **busy(spans)}


def busy(spans: list[tuple[float, float, str]]) -> dict[str, Any]:
    """Of kernels and copies (start, end, name) in microseconds, by start: the share of the time in which any ran, the
    longest waits, and where the time went."""
    if not spans:
        return {"busy": 0.0, "gaps": [], "kernels": {}}
    covered, gaps, kernels = 0.0, [], Counter[str]()
    begun, (_, until, last) = spans[0][0], spans[0]
    for start, end, name in spans:
        kernels[name] += end - start
        if start > until:
            gaps.append((start - until, last, name))
        covered += max(0.0, end - max(start, until))
        if end >= until:
            until, last = end, name
    covered += spans[0][1] - begun
    return {
        "busy": round(covered / (until - begun), 4),
        "gaps": [
            {"us": round(gap, 1), "after": before[:60], "before": after[:60]}
            for gap, before, after in sorted(gaps, reverse=True)[:GAPS]
        ],
        "kernels": {name[:80]: round(us / (until - begun), 4) for name, us in kernels.most_common(GAPS)},
    }


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the timed job tells, and then with what the profiled one does, which takes as long again."""
    chance = random.Random(0)
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 1} if args.sampled else {"temperature": 0.0}
    params = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True, **sampled)
    settings: dict[str, Any] = {
        "weight_bits": args.weight_bits,
        "cache_bits": args.cache_bits,
        "hardware": args.hardware,
    }
    if args.async_scheduling is not None:
        settings["async_scheduling"] = args.async_scheduling == "true"
    if args.gpu_memory:
        settings["gpu_memory"] = args.gpu_memory
    dummy = not Path(args.model).is_dir() and args.model != "demo"
    with LLM(args.model, dummy_weights=dummy, **settings) as llm:
        lengths = [chance.randint(*args.lengths) for _ in range(args.prompts)]

        def prompts() -> list[dict[str, list[int]]]:
            """Others every time: the cache keeps the pages of prompts that it has read, also after their job."""
            vocab = llm.arch.vocab_size
            return [{"prompt_token_ids": [chance.randrange(3, vocab) for _ in range(length)]} for length in lengths]

        llm.prepare(prompts(), params)
        llm.generate(prompts(), params)
        job, before = prompts(), llm.report()
        with CardState() as card, PassTimes() as passes, PartTimes(PARTS) as host:
            begun = time.perf_counter()
            llm.generate(job, params)
            seconds = time.perf_counter() - begun
        report = {
            "model": args.model,
            "dtype": str(llm.engine_plan.dtype).removeprefix("torch."),
            "weight_bits": args.weight_bits,
            "cache_bits": args.cache_bits,
            "gpu_memory": args.gpu_memory,
            "async_scheduling": args.async_scheduling,
            "sampled": args.sampled,
            "lengths": args.lengths,
            "block": llm.policy.block_size,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(args.prompts * args.new_tokens / seconds, 1),
            "passes": host.turns,
            "kinds": passes.report(),
            "set_up": made_between(before, llm.report()),
            "host": host.per_turn(),
        }
        if torch.cuda.is_available():
            report["card"] = card.report()
        yield report
        if torch.cuda.is_available() and args.passes:
            job, needed = prompts(), host.turns // 3 + args.passes + 2  # nothing is profiled behind them
            reading = Window(*passes.with_prompts(args.passes // 4))
            with reading, Window(host.turns // 3, args.passes) as window:
                llm.generate(job, dataclasses.replace(params, max_tokens=min(args.new_tokens, needed)))
            report["profiled"] = window.report()
            if reading.count:
                report["profiled_with_prompts"] = reading.report()
            yield report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help="a public shape (random weights), a folder, or demo")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--lengths", type=int, nargs=2, default=(20, 400), help="tokens of a prompt, least and most")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--passes", type=int, default=40, help="passes that are profiled (0: no third run)")
    parser.add_argument("--weight-bits", type=int, default=16, choices=(16, 8, 4))
    parser.add_argument("--hardware", default="auto", help="as flexbatch.run takes it: a profile, or auto")
    parser.add_argument("--cache-bits", type=int, default=16, choices=(16, 8, 4))
    parser.add_argument("--gpu-memory", help='budget, e.g. "24GiB" (default: what is free)')
    parser.add_argument("--async-scheduling", choices=("true", "false"))
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8 and top-p 0.9, not greedy")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    return publish_each(lambda: measure(args), args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
