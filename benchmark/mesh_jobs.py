"""What a run of `benchmark.parallel` does: one job on one mesh, in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmark.link_idle import Timeline
from benchmark.part_times import TURN, PartTimes
from benchmark.pass_times import PassTimes

if TYPE_CHECKING:
    from flexbatch import LLM, SamplingParams
    from flexbatch.planner.usage import UsageTracer

SIZES = {"dp": "data_parallel_size", "pp": "pipeline_parallel_size", "tp": "tensor_parallel_size"}
RESERVE_GIB = 1.0
"""Of every GPU, outside of the engine's pools: context, libraries, collectives."""
TRACED_PASSES = 60
"""Of warm-ups, at most."""
Tell = Callable[[dict[str, Any]], None]
"""Is told what is known of a run, more than once."""

logger = logging.getLogger("flexbatch")


@dataclass(frozen=True)
class Case:
    """A model and a job whose number of prompts is prime: nothing divides evenly."""

    model: str
    settings: dict[str, Any]
    prompts: int
    prompt_tokens: int
    new_tokens: int


CASES = {
    "opt-30b": Case("opt-30b", {}, 383, 512, 32),
    "llama-3-70b": Case("llama-3-70b", {"weight_bits": 4, "cache_bits": 4}, 1021, 512, 32),
    "llama-3-8b": Case("llama-3-8b", {}, 509, 512, 64),
    # For a look at the phases on processors: --models opt-125m --set 'device="cpu"' 'dtype="float32"'.
    "opt-125m": Case("opt-125m", {}, 37, 64, 12),
}


def sizes_of(mesh: str) -> dict[str, int]:
    """The settings of a mesh. Raises ValueError."""
    parts = [] if mesh == "1" else [re.fullmatch(r"(dp|pp|tp)([1-9]\d*)", part) for part in mesh.split("x")]
    if None in parts:
        raise ValueError(f"mesh {mesh!r}: 1, or sizes as in tp2, pp2, dp2, pp2xtp2")
    return {SIZES[part[1]]: int(part[2]) for part in parts if part is not None}


def random_prompts(count: int, tokens: int, vocabulary: int, seed: int, turn: int = 0) -> list[list[int]]:
    """Distinct ones, of different lengths. turn: others of the same lengths."""
    generator = random.Random(seed)
    lengths = [generator.randint(3 * tokens // 4, tokens) for _ in range(count)]
    generator.seed(f"{seed} {turn}")
    return [[generator.randrange(10, vocabulary) for _ in range(length)] for length in lengths]


@contextlib.contextmanager
def recorded_ranks(most: int | None) -> Iterator[None]:
    """So many tensor ranks may record decode passes; None: as many as the package allows. Rank 0 decides it for all."""
    from flexbatch.policy import decode_graphs

    before = decode_graphs.RECORDED_RANKS
    decode_graphs.RECORDED_RANKS = before if most is None else most
    try:
        yield
    finally:
        decode_graphs.RECORDED_RANKS = before


def host_parts() -> dict[str, tuple[Any, str]]:
    """Functions of rank 0 whose times are told, in ms a pass."""
    from flexbatch.execution.passes import Passes
    from flexbatch.execution.pipelined import PipelinedPasses
    from flexbatch.execution.sampler import SampledPass
    from flexbatch.execution.scheduler import Scheduler
    from flexbatch.loop import EngineLoop
    from flexbatch.planner.leader import Leader

    return {
        "compose": (Scheduler, "next_pass"),
        "tell ranks": (Leader, "send"),
        "launch": (Passes, "launch"),
        "sample": (Passes, "sample"),
        "wait and read": (SampledPass, "read"),
        "commit": (Scheduler, "commit"),
        "pipeline turn": (PipelinedPasses, "turn"),
        TURN: (EngineLoop, "run_pass"),
    }


RATES = ("h2d", "d2h", "link_both", "gather", "cpu_attention", "cpu_attention_4", "cpu_attention_during_h2d")
RATES += ("h2d_during_cpu_attention", "host_bandwidth", "launch_seconds", "graph_seconds", "pass_seconds")
RATES += ("sequence_seconds", "staging_seconds", "fetch_seconds", "cpu_attention_seconds", "interconnect")
RATES += ("interconnect_seconds", "interconnect_launch_seconds", "interconnect_send", "links_together")
RATES += ("cpu_attention_together", "cpu_attention_together_during_h2d", "h2d_together_during_cpu_attention")
"""Of the profile that a run was planned with."""


OF_REPORT = ("plan", "prediction", "job", "policy", "percent", "memory", "peak_bytes", "moved_bytes", "passes")


def host_pages() -> dict[str, float]:
    """GiB of this process's memory that is no file's, and of it in huge pages: the larger the cache, the more a CPU
    that attends to it looks for small ones."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            name, _, size = line.partition(":")
            if name in ("Anonymous", "AnonHugePages"):
                found[name] = int(size.split()[0]) / 2**20
    return found


def llm_settings(case: Case, gpu_gib: float, sizes: dict[str, int], more: dict[str, Any]) -> dict[str, Any]:
    return {"gpu_memory": f"{gpu_gib - RESERVE_GIB}GiB", "dtype": "bfloat16", **case.settings, **sizes, **more}


def warm_up(llm: LLM, case: Case, params: SamplingParams, count: int, trace: Path | None) -> None:
    """Jobs of the same lengths: kernels compile and the links wake up, and nothing is planned, moved or allocated in
    the one that is measured. A smaller one had the weights moved for it, and the block made again: 5 of 17 s. Graphs
    are recorded in them, too, which takes a second of a job of three."""
    timeline = None if trace is None else Timeline(cast("UsageTracer", llm.tracer))
    if timeline is not None:
        timeline.start(TRACED_PASSES)
    for turn in range(1, count + 1):
        prompts = random_prompts(case.prompts, case.prompt_tokens, llm.arch.vocab_size, seed=1, turn=turn)
        llm.generate(prompts, params)
    if trace is not None and timeline is not None:
        timeline.left = 0
        trace.parent.mkdir(parents=True, exist_ok=True)
        timeline.write(trace)


def measured(
    case: Case,
    gpu_gib: float,
    sizes: dict[str, int],
    more: dict[str, Any],
    tell: Tell,
    warm_ups: int = 1,
    trace: Path | None = None,
) -> None:
    """One job on one mesh, after so many others. trace: where the passes of these are written to, as rank 0 sees
    them; the job that is measured is not traced."""
    from flexbatch import LLM, SamplingParams

    began = time.perf_counter()
    params = SamplingParams(max_tokens=case.new_tokens, temperature=0, ignore_eos=True)
    with LLM(case.model, dummy_weights=True, **llm_settings(case, gpu_gib, sizes, more)) as llm:
        prompts = random_prompts(case.prompts, case.prompt_tokens, llm.arch.vocab_size, seed=1)
        opened = time.perf_counter()
        llm.prepare(prompts, params)
        logger.debug("prepared: planned, loaded, and a block made; now warming up")
        loaded = time.perf_counter()
        warm_up(llm, case, params, warm_ups, trace)
        prepared = time.perf_counter()
        logger.debug("warm; the job begins")
        with PartTimes(host_parts()) as parts, PassTimes() as times:
            answers = llm.generate(prompts, params)
        ended = time.perf_counter()
        logger.debug("the job took %.2f s", ended - prepared)
        report = llm.report()
        tokens, seconds = sum(len(answer.token_ids) for answer in answers), ended - prepared
        whole = dataclasses.asdict(llm._capacity.planner.hardware)
        prediction = report.get("prediction", {})
        # A plan is for one of several engines, of which all have a like part of the job.
        engines = sizes.get("data_parallel_size", 1)
        predicted, bound = (
            engines * prediction.get(f"{what}_tokens_per_second", 0.0) or None for what in ("predicted", "bound")
        )
        found = {
            "open_seconds": opened - began,
            "load_seconds": loaded - opened,
            "warm_up_seconds": prepared - loaded,
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "predicted_tokens_per_second": predicted,
            "bound_tokens_per_second": bound,
            "measured_over_predicted": tokens / seconds / predicted if predicted else None,
            "predicted_job_seconds": report.get("job", {}).get("predicted_seconds"),
            "first_tokens": " ".join(str(answer.token_ids[0]) for answer in answers),
            "answers": " ".join(f"{zlib.crc32(str(answer.token_ids).encode()):x}" for answer in answers),
            "host_pages_gib": host_pages(),
            "host_ms_a_pass": parts.per_turn(),
            "passes_by_kind": times.report(),
            "hardware": {name: whole[name] for name in RATES},
            **{name: report[name] for name in OF_REPORT if name in report},
        }
        tell(found)
        closing = time.perf_counter()
    logger.debug("closed")
    tell({**found, "close_seconds": time.perf_counter() - closing})


def checked(model: str, sizes: dict[str, int], device: str, tell: Tell) -> None:
    """Greedy tokens of a small model in float32, weights and cache on GPU and host."""
    from flexbatch import LLM, SamplingParams

    settings = {"dtype": "float32", "percent": (40, 60, 40, 60, 50, 50), "gpu_batch_size": 3, "num_gpu_batches": 2}
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
    with LLM(model, device=device, gpu_memory="4GiB", cpu_memory="4GiB", **settings, **sizes) as llm:
        prompts = random_prompts(13, 90, min(256, llm.arch.vocab_size), seed=2)
        tell({"token_ids": [answer.token_ids for answer in llm.generate(prompts, params)]})
