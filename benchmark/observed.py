"""An engine whose passes are logged and whose policy stays as it is told: what `benchmark.policy_runs` measures
with."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, cast

from benchmark.host_load import HostLoad
from benchmark.policy_settings import Setting
from benchmark.set_up import made_between
from flexbatch import LLM, SamplingParams
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.execution.runner import Runner
from flexbatch.loop import EngineLoop
from flexbatch.planner import monitor
from flexbatch.planner.choose import overshoot, priced, without_reserves
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.planner import Planner
from flexbatch.policy.limits import MAX_MICRO_BATCH_TOKENS
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.plan import Plan
from flexbatch.policy.policy import Policy

CHUNKS = (12, 48, 200)
"""Prompt tokens of short chunks: one for each height of tile that attention is compiled for."""


WARM_BLOCKS = 2
"""Blocks of prompts that a job on the GPU is preceded by."""


class PassLog(monitor.PassMeter):
    """Keeps every pass and changes nothing: the policy that was planned is the one that is measured."""

    def __init__(self, plan: Any, busy: Any) -> None:
        super().__init__(plan, busy)
        self.log: list[dict[str, Any]] = []

    def record(self, load: PassLoad, seconds: float) -> None:
        self.log.append(
            {
                "load": [round(value, 1) for value in dataclasses.astuple(load)],
                "seconds": seconds,
                "busy": self.busy() or {},
            }
        )


class ObservedLoop(EngineLoop):
    """Logs every pass, also where nothing was planned."""

    pass_log: PassLog | None = None
    log_class = PassLog

    def plan_monitor(self, runner: Runner) -> monitor.PlanMonitor:
        self.pass_log = self.log_class(current_plan(self.planner), monitor.BusySeconds(self.tracer))
        return monitor.PlanMonitor(self.planner, self.pass_log, self.statistics, self.replans)


def current_plan(planner: Planner) -> Plan:
    """What is planned now, also where nothing had to be weighed."""
    engine_plan = planner.engine_plan
    return engine_plan.plan or priced_by_sizes(planner, engine_plan.policy)


def priced_by_sizes(planner: Planner, policy: Policy) -> Plan:
    return priced(planner.problem, without_reserves(planner.hardware), policy)


class ObservedLLM(LLM):
    """An engine that logs its passes, and runs the policy that it is told to."""

    loop_class = ObservedLoop
    num_measured = 0

    @property
    def pass_log(self) -> PassLog | None:
        """Of the last run."""
        assert isinstance(self._loop, ObservedLoop)
        return self._loop.pass_log

    @property
    def num_graphs(self) -> int:
        """Decode graphs that the block of the last job had memory for."""
        runner = self._loop.capacity.runner
        return 0 if runner is None else self.engine_plan.graphs(runner.sizes).decode

    def __enter__(self) -> ObservedLLM:
        return self

    def fits(self, policy: Policy) -> bool:
        """By the engine's exact sizes, in its budgets."""
        return not overshoot(self.planner.requirements_of(policy, self.planner.problem.job), self.engine_plan.budgets)

    def use(self, policy: Policy) -> None:
        """Run the next job by ``policy``, whose weights are where the loaded ones are."""
        plan = priced_by_sizes(self.planner, policy)
        assert isinstance(self.planner, Unchanging)
        self.planner.adopt(dataclasses.replace(self.engine_plan, policy=policy, plan=plan))


class Unchanging(Planner):
    """Decided once: the policy that is measured stays, also for the few prompts that warm up."""

    def replan(self, job: Job) -> EnginePlan:
        return self.engine_plan

    def adopt(self, engine_plan: EnginePlan) -> None:
        """Go on by another plan, whose weights are where the loaded ones are."""
        self._engine_plan = engine_plan


def fixed_by(policy: Policy) -> dict[str, Any]:
    """The settings of `LLM` that leave nothing to choose."""
    budget = policy.prefill_budget or min(policy.prompt_tokens_per_micro_batch, MAX_MICRO_BATCH_TOKENS)
    return {
        "percent": policy.percent,
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
        "cpu_attention": policy.cpu_attention,
        "cpu_experts": 100 * policy.cpu_experts,
        "prefill_chunk": policy.prefill_chunk,
        "prefill_budget": budget,
        "weight_bits": policy.weight_bits,
        "cache_bits": policy.cache_bits,
        "overlap": policy.overlap,
        "piece_tokens": policy.piece_tokens,
        # None: where all of a pass lies on one GPU, which is what plans count on.
        "async_scheduling": None if policy.async_scheduling else False,
    }


def job_of(setting: Setting) -> Job:
    lengths = setting.lengths()
    return Job(tuple(prompt + output - 1 for prompt, output in lengths), tuple(prompt for prompt, _ in lengths))


def open_engine(setting: Setting, hardware: str, fixed: dict[str, Any]) -> ObservedLLM:
    config = EngineConfig(model=setting.shape, hardware=hardware, **{**setting.llm_settings, **fixed})
    return cast("ObservedLLM", ObservedLLM.from_planner(Unchanging(config, job_of(setting))))


def chosen_here(setting: Setting, hardware: str) -> dict[str, Any]:
    """The settings that the optimizer chooses, by sizes alone: so that a borrowed machine need not wait for the
    search."""
    plan = LLM.plan(EngineConfig(model=setting.shape, hardware=hardware, **setting.llm_settings), job_of(setting))[
        "plan"
    ]
    return {
        **fixed_by(plan.policy),
        "predicted_tokens_per_second": plan.predicted_tokens_per_second,
        "predicted_seconds": plan.seconds,
    }


def warm_up(llm: ObservedLLM, setting: Setting) -> None:
    """Compiled kernels are loaded when a shape comes for the first time, the link wakes up: a block's prompts and its
    first passes, and short chunks alone, of which few programs split their context."""
    prompts, params = prompts_of(llm, setting, "warm-up"), greedy(setting)[: llm.policy.block_size]
    few = [dataclasses.replace(each, max_tokens=min(4, each.max_tokens)) for each in params]
    llm.generate(prompts[: len(few)], few)
    shortly = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    for size in CHUNKS:
        llm.generate([max(setting.prompts(llm.arch.vocab_size, f"chunk {size}"), key=len)[:size]], shortly)


def prompts_of(llm: ObservedLLM, setting: Setting, what: str) -> list[list[int]]:
    """Other ones for every job that is measured."""
    return setting.prompts(llm.arch.vocab_size, f"{what} {llm.num_measured}")


def greedy(setting: Setting) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=output, temperature=0, ignore_eos=True) for _, output in setting.lengths()]


def measure(llm: ObservedLLM, setting: Setting) -> dict[str, Any]:
    """One job: its policy, lengths, time and every pass; a line of the file."""
    llm.num_measured += 1
    prompts, params = prompts_of(llm, setting, "measured"), greedy(setting)
    llm.prepare(prompts, params)
    if llm.num_measured == 1:
        warm_up(llm, setting)
    if all(split.gpu == 1 for split in (llm.policy.weights, llm.policy.cache, llm.policy.activations)):
        # Graphs are recorded, new ones for every policy: those of full blocks. What the job still makes is told apart.
        count = WARM_BLOCKS * llm.policy.block_size
        llm.generate(prompts_of(llm, setting, "recorded")[:count], params[:count])
    # What the plan says before the job: where passes differ from it, the engine compares and plans anew.
    planned = current_plan(llm.planner)
    before, host, started = llm.report(), HostLoad(), time.perf_counter()
    compiled_before = {"compiled_ahead": before["compiled_ahead"], "compiled_in_warm_up": before["compiled_in_passes"]}
    completions = llm.generate(prompts, params)
    seconds, others = time.perf_counter() - started, host.report()
    generated = sum(len(completion.token_ids) for completion in completions)
    assert generated == sum(output for _, output in setting.lengths()), "a request was cut short"
    log = llm.pass_log
    assert log is not None
    weights = llm.engine_plan.weight_plan.realized_percent
    percent = [weights["gpu"], weights["cpu"], *llm.policy.percent[2:]]
    return {
        "model": setting.model,
        "shape": llm.planner.problem.shape.as_dict(),
        **fixed_by(llm.policy),
        "prefill_budget": llm.policy.prefill_budget,
        "few_in_codes": llm.policy.few_in_codes,
        "admission_passes": llm.policy.admission_passes,
        "percent": percent,
        "prompt_lens": [len(prompt) for prompt in prompts],
        "output_lens": [p.max_tokens for p in params],
        "gpu_memory": llm.engine_plan.budgets["gpu"],
        "cpu_memory": llm.engine_plan.budgets["cpu"],
        "seconds": seconds,
        "tokens_per_second": generated / seconds,
        "predicted_then": planned.predicted_tokens_per_second,
        "predicted_passes": planned.passes,
        "load_seconds": llm.report()["load_seconds"],
        "graphs": llm.num_graphs,
        "host": others,
        "set_up": made_between(before, llm.report()),
        **compiled_before,
        "compiled_in_passes": llm.report()["compiled_in_passes"][len(before["compiled_in_passes"]) :],
        "passes": log.log,
    }
