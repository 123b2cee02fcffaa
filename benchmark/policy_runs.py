"""Runs the settings of `benchmark.policy_settings` on this machine and writes one JSON line each: what `benchmark.policy_error` compares.

    python -m benchmark.policy_runs runs.jsonl --hardware h200
    python -m benchmark.policy_runs neighbours.jsonl --hardware h200 --neighbours

Settings whose names are in the file already are left out, so that a run that was cut goes on where it stopped. A child process runs them; after an error of
the GPU, which no later setting would survive, another child goes on with the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark.policy_settings import NEIGHBOURHOODS, SETTINGS, Setting
from benchmark.suite import machine
from flexbatch import LLM, SamplingParams, adapting, choosing
from flexbatch.planning import MAX_MICRO_BATCH_TOKENS
from flexbatch.policy.loads import PassLoad
from flexbatch.policy.types import Policy, Split

GRACE_SECONDS = 30.0
"""After a setting's limit: then its process is taken to hang, and is ended."""
NUM_NEIGHBOURS = 10
WARM_UP_PROMPTS = 8


class PassLog(adapting.PassMeter):
    """Keeps every pass and changes nothing: the policy that was planned is the one that is measured."""

    def __init__(self, plan: Any, busy: Any) -> None:
        super().__init__(plan, busy)
        self.log: list[dict[str, Any]] = []

    def record(self, load: PassLoad, seconds: float) -> None:
        self.log.append({"load": [round(value, 1) for value in dataclasses.astuple(load)], "seconds": seconds, "busy": self.busy()})


class ObservedLLM(LLM):
    """An engine that logs its passes, and runs the policy that it is told to."""

    pass_log: PassLog | None = None
    num_measured = 0

    def _meter(self) -> adapting.PassMeter:
        plan = self.plan_of_run or choosing.priced(self.problem, choosing.without_reserves(self.hardware), self.policy)
        self.pass_log = PassLog(plan, adapting.BusySeconds(self.tracer))
        return self.pass_log

    def _suit(self, job: Any) -> None:
        """The policy that is measured stays, also for the few prompts that warm up."""

    def fits(self, policy: Policy) -> bool:
        """By the engine's exact sizes, in its budgets."""
        return not choosing.overshoot(self._needs_of(policy, self.problem.job), self.budgets)

    def use(self, policy: Policy) -> None:
        """Run the next job by ``policy``, whose weights are where the loaded ones are."""
        self.policy = policy
        self.plan_of_run = choosing.priced(self.problem, choosing.without_reserves(self.hardware), policy)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread after ``seconds``."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than its limit of {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fixed_by(policy: Policy) -> dict[str, Any]:
    """The settings of `LLM` that leave nothing to choose."""
    budget = policy.prefill_budget or min(policy.prompt_tokens_per_micro_batch, MAX_MICRO_BATCH_TOKENS)
    return {
        "percent": policy.percent,
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
        "cpu_attention": policy.cpu_attention,
        "prefill_chunk": policy.prefill_chunk,
        "prefill_budget": budget,
        "weight_bits": policy.weight_bits,
        "cache_bits": policy.cache_bits,
        "overlap": policy.overlap,
    }


def open_engine(setting: Setting, hardware: str, **fixed: Any) -> ObservedLLM:
    from flexbatch.config import EngineConfig
    from flexbatch.planning import Job

    lengths = setting.lengths()
    job = Job(tuple(prompt + output - 1 for prompt, output in lengths), tuple(prompt for prompt, _ in lengths))
    return ObservedLLM.from_config(EngineConfig(model=setting.model, hardware=hardware, **{**setting.llm_settings, **fixed}), job=job)


def measure(llm: ObservedLLM, setting: Setting) -> dict[str, Any]:
    """One job: its policy, lengths, time and every pass; a line of the file."""
    llm.num_measured += 1
    warm_up, prompts = (setting.prompts(llm.arch.vocab_size, f"{what} {llm.num_measured}") for what in ("warm-up", "measured"))
    params = [SamplingParams(max_tokens=output, temperature=0, ignore_eos=True) for _, output in setting.lengths()]
    llm.prepare(prompts, params)
    # Kernels compile, the link wakes up; of a block on the GPU also the graphs are captured, which takes the whole job.
    resident = all(split.gpu == 1 for split in (llm.policy.weights, llm.policy.cache, llm.policy.activations))
    some = len(prompts) if resident else min(len(prompts), WARM_UP_PROMPTS * llm.policy.num_gpu_batches)
    llm.generate(warm_up[:some], params[:some] if resident else SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    started = time.perf_counter()
    completions = llm.generate(prompts, params)
    seconds = time.perf_counter() - started
    generated = sum(len(completion.token_ids) for completion in completions)
    assert generated == sum(output for _, output in setting.lengths()), "a request was cut short"
    log = llm.pass_log
    assert log is not None
    weights = llm.weight_plan.realized_percent
    percent = [weights["gpu"], weights["cpu"], *llm.policy.percent[2:]]
    return {
        "model": setting.model,
        "shape": llm.problem.shape.as_dict(),
        **fixed_by(llm.policy),
        "prefill_budget": llm.policy.prefill_budget,
        "percent": percent,
        "prompt_lens": [len(prompt) for prompt in prompts],
        "output_lens": [p.max_tokens for p in params],
        "gpu_memory": llm.budgets["gpu"],
        "cpu_memory": llm.budgets["cpu"],
        "seconds": seconds,
        "tokens_per_second": generated / seconds,
        "predicted_then": log.plan.predicted_tokens_per_second,
        "load_seconds": llm.statistics.load_seconds,
        "passes": log.log,
    }


def run_setting(setting: Setting, hardware: str) -> dict[str, Any]:
    with open_engine(setting, hardware) as llm:
        return measure(llm, setting)


def neighbours(policy: Policy) -> Iterator[tuple[str, Policy]]:
    """Policies around ``policy`` as a person would try them, the most telling first; whether they fit is for the caller to say."""
    b, k, w, c = policy.gpu_batch_size, policy.num_gpu_batches, policy.weights, policy.cache

    def sizes(batch: float, count: int) -> tuple[str, Policy]:
        batch = max(1, round(batch))
        return f"{batch} x {count}", dataclasses.replace(policy, gpu_batch_size=batch, num_gpu_batches=max(1, count))

    def attention(share: float) -> tuple[str, Policy]:
        share = min(1.0, max(0.0, share))
        return f"CPU attention {share:.0%}", dataclasses.replace(policy, cpu_attention=share)

    yield sizes(b / 2, k)
    yield sizes(2 * b, k)
    yield sizes(b, k + 1)
    yield sizes(b, k - 1)
    yield attention(0.0)
    yield attention(1.0)
    moved = min(0.1, w.gpu)
    yield f"weights on the GPU {w.gpu - moved:.0%}", dataclasses.replace(policy, weights=Split(w.gpu - moved, w.cpu + moved, w.disk))
    moved = min(0.05, w.cpu)
    yield f"weights on the GPU {w.gpu + moved:.0%}", dataclasses.replace(policy, weights=Split(w.gpu + moved, w.cpu - moved, w.disk))
    yield sizes(b / 2, 2 * k)
    yield sizes(0.75 * b, k)
    yield attention(policy.cpu_attention - 0.25)
    yield attention(policy.cpu_attention + 0.25)
    moved = min(0.1, c.cpu)
    yield f"cache on the GPU {c.gpu + moved:.0%}", dataclasses.replace(policy, cache=Split(c.gpu + moved, c.cpu - moved, c.disk))
    moved = min(0.1, c.gpu)
    yield f"cache on the GPU {c.gpu - moved:.0%}", dataclasses.replace(policy, cache=Split(c.gpu - moved, c.cpu + moved, c.disk))
    if c.disk:
        yield "no cache on disk", dataclasses.replace(policy, cache=Split(c.gpu, 1 - c.gpu, 0.0), gpu_batch_size=max(1, int(b * (c.gpu + c.cpu))))
    budget = policy.prompt_tokens_per_micro_batch
    yield f"prompt budget {budget // 2}", dataclasses.replace(policy, prefill_budget=max(32, budget // 2))
    yield f"prompt budget {2 * budget}", dataclasses.replace(policy, prefill_budget=2 * budget)
    for factor in (0.9, 1.1, 0.6, 1.25):
        yield sizes(factor * b, k)


def run_neighbourhood(setting: Setting, hardware: str) -> dict[str, Any]:
    """The chosen policy and NUM_NEIGHBOURS around it that fit, each by the same job; the chosen one again at the end."""
    tried: list[dict[str, Any]] = []

    def attempt(llm: ObservedLLM, name: str) -> None:
        record = measure(llm, setting)
        tried.append({"name": name, **{key: record[key] for key in (*fixed_by(llm.policy), "tokens_per_second", "predicted_then", "seconds")}})

    with open_engine(setting, hardware) as llm:
        chosen = llm.policy
        attempt(llm, "chosen")
        candidates: dict[Policy, str] = {}
        for name, policy in neighbours(chosen):
            if policy != chosen and policy not in candidates and llm.fits(policy) and len(candidates) < NUM_NEIGHBOURS:
                candidates[policy] = name
        for policy, name in candidates.items():
            if policy.weights == chosen.weights:
                llm.use(policy)
                attempt(llm, name)
        llm.use(chosen)
        attempt(llm, "chosen")
    for policy, name in candidates.items():
        if policy.weights != chosen.weights:
            with open_engine(setting, hardware, **fixed_by(policy)) as llm:
                attempt(llm, name)
    return {"model": setting.model, "gpu_memory": setting.memory[0], "cpu_memory": setting.memory[1], "tried": tried}


def recorded(path: Path) -> list[str]:
    """Names in the file."""
    return [json.loads(line)["name"] for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def run_here(names: list[str], arguments: argparse.Namespace) -> int:
    """In this process. Returns 1 after an error that the next setting may not survive."""
    import torch

    table, run = (NEIGHBOURHOODS, run_neighbourhood) if arguments.neighbours else (SETTINGS, run_setting)
    for name in names:
        started = time.perf_counter()
        fatal = False
        try:
            with time_limit(arguments.limit or table[name].limit_seconds):
                record = run(table[name], arguments.hardware)
        except Exception as error:  # the remaining settings still count
            fatal = "CUDA" in f"{type(error).__name__} {error}"
            record = {"error": f"{type(error).__name__}: {error}"[:2000]}
        append(arguments.runs, {"name": name, "total_seconds": time.perf_counter() - started, **record})
        rate = f"{record['tokens_per_second']:.1f} tok/s, predicted {record['predicted_then']:.1f}" if "tokens_per_second" in record else record.get("error", "done")
        print(f"{name}: {rate} ({time.perf_counter() - started:.0f} s in all)", flush=True)
        if fatal:
            return 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def drive(names: list[str], arguments: argparse.Namespace) -> None:
    """Child processes until every setting is in the file or the time is up."""
    table = NEIGHBOURHOODS if arguments.neighbours else SETTINGS
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
                append(arguments.runs, {"name": current, "error": "hangs" if hangs else "the time for all settings was up"})
                break
        if time.monotonic() > deadline:
            break
        if child.returncode and not [name for name in pending if name in recorded(arguments.runs)]:
            append(arguments.runs, {"name": pending[0], "error": f"its process ended with code {child.returncode}"})


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmark.policy_runs", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("runs", type=Path, help="JSON lines, appended to")
    parser.add_argument("--hardware", default="auto", help="the machine's profile that policies are chosen by: auto, a shipped name or a JSON file")
    parser.add_argument("--neighbours", action="store_true", help="compare the chosen policy with its neighbours in the shorter jobs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these settings, also when the file has them already under an error")
    parser.add_argument("--seconds", type=float, default=540.0, help="time for all of them (default: 540)")
    parser.add_argument("--limit", type=float, help="time for each, instead of the setting's own")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    table = NEIGHBOURHOODS if arguments.neighbours else SETTINGS
    names = arguments.only or list(table)
    if unknown := set(names) - set(table):
        parser.error(f"unknown settings {sorted(unknown)}; known: {', '.join(table)}")
    if arguments.child:
        return run_here(names, arguments)
    arguments.runs.parent.mkdir(parents=True, exist_ok=True)
    arguments.runs.with_suffix(".machine.json").write_text(json.dumps(machine()) + "\n")
    drive(names, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
