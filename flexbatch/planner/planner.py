"""Makes engine plans: before any weight is loaded, and again for jobs that are not like the last."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.memory.tiers import MemoryRequirement, check_budgets
from flexbatch.models.generation_config import generation_of
from flexbatch.models.lora.adapter_set import AdapterSet
from flexbatch.models.opened import OpenModel
from flexbatch.parallel.channel import RankChannel
from flexbatch.parallel.links import EngineGroup
from flexbatch.planner import budgets
from flexbatch.planner.choose import (
    Choice,
    choose_policy,
    differs,
    filled_in_rounds,
    on_slowest,
    priced,
    with_faster_products,
    without_reserves,
)
from flexbatch.planner.deploy import deploy, refuse_adapters
from flexbatch.planner.engine_plan import EnginePlan, described
from flexbatch.planner.learned import (
    LEAST_GAIN,
    faster,
    holds_more,
    is_faster,
    refilled_in_rounds,
    resized,
    search_pays,
)
from flexbatch.planner.placements import baseline_policy, fallbacks, overshoot
from flexbatch.planner.planned_machine import PlannedMachine
from flexbatch.planner.problem import Problem
from flexbatch.planner.relocation import Kind, Relocation, could_gain, fits_while_moving, kind_of
from flexbatch.policy.admission import CacheSizes
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.policy import Policy
from flexbatch.text.prompts import PromptEncoder
from flexbatch.validation.devices import named_machine
from flexbatch.validation.errors import DoesNotFitError

logger = logging.getLogger("flexbatch")

ANSWER_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0)
"""Of ``max_tokens``, that a block is tried with which the user fixed."""


class Planner:
    """Owns the latest `EnginePlan`, and the machine that it is made for. Plans follow the jobs; the weights go where
    the first one has them, and move only for one that gains by it.

    With ``dry`` nothing is measured, and a named machine (--hardware) with the default device is planned for as it
    is described; ``hardware`` is such a machine that no name stands for. ``model``: the configured one, where it is
    open already. ``channel``, ``group``: to other ranks and engines, where torchrun has started them. Without a job
    nothing is decided yet; of several engines each is planned for its part of a job. Raises DoesNotFitError when the
    job, or without one the smallest request, does not fit the budgets, CheckpointError for a bad model.
    """

    def __init__(
        self,
        config: EngineConfig,
        job: Job | None = None,
        dry: bool = False,
        model: OpenModel | None = None,
        hardware: Hardware | None = None,
        channel: RankChannel | None = None,
        group: EngineGroup | None = None,
    ) -> None:
        self.config, self.dry = config, dry
        self.generation = generation_of(config, model.folder if model else None)
        named = hardware or named_machine(config.hardware)
        elsewhere = named if dry and config.device == "auto" else None
        self.deployment = deploy(config, model, elsewhere, dry, channel, group)
        model = self.deployment.model
        self.offload_dir = budgets.offload_dir(config)
        self.machine = PlannedMachine(config, self.deployment, self.offload_dir, named, dry)
        self.encoder = PromptEncoder(model.tokenizer, max_context=model.arch.context, vocab_size=model.arch.vocab_size)
        self._shortest_refused = sys.maxsize
        """Token rows of the shortest request that no policy was found to hold."""
        self.placed: EnginePlan | None = None
        """Whose weights are in memory."""
        self.job_is_known = job is not None
        self.search_seconds = 0.0  # of the last decision
        self._engine_plan: EnginePlan | None = None
        self._settled: set[Kind] = set()
        """Kinds of jobs for which the weights that are in memory were found to be good enough."""
        if job is None:
            self._check_smallest()
            model.check()
        else:
            found = self._decide_first(job.of_every(config.data_parallel_size))
            check_budgets(found.requirements(found.sizes(job.first(1))), self.deployment.budgets)

    def _check_smallest(self) -> None:
        """Raises DoesNotFitError where no policy holds the smallest request. Nothing is searched for, and no machine
        measured, where a simple placement does."""
        problem = self._problem(smallest := Job((1,), (1,)))
        baseline = baseline_policy(problem)
        needs = partial(self.requirements_of, job=smallest)
        if problem.is_fixed:
            check_budgets(needs(baseline), self.deployment.budgets)
        elif overshoot(needs(baseline), self.deployment.budgets) and not any(True for _ in fallbacks(problem, needs)):
            self._decide(smallest)

    @property
    def engine_plan(self) -> EnginePlan:
        """For the latest job; before the first, for a typical one, or the smallest where that does not fit."""
        if self._engine_plan is None:
            typical = Job.typical(self.deployment.model.arch.context)
            for expected in (typical, typical.first(1)):
                with contextlib.suppress(DoesNotFitError):
                    found = self._decide(expected)
                    check_budgets(found.requirements(found.sizes(expected.first(1))), self.deployment.budgets)
                    self._engine_plan = found
                    break
            else:
                self._engine_plan = self._decide(Job((1,), (1,)))
        return self._engine_plan

    @property
    def hardware(self) -> Hardware:
        """The machine that plans are made for; measured at first use."""
        return self.machine.hardware

    def adopt(self, loras: AdapterSet) -> None:
        """Plan with more adapters from now on: the next job brings them to their tiers."""
        refuse_adapters(self.deployment.mesh.size > 1)
        self.deployment = dataclasses.replace(self.deployment, adapters=loras)
        self._settled.clear()
        self.placed = self.placed and self.placed.on(self.deployment)
        self._engine_plan = self._engine_plan and self._engine_plan.on(self.deployment)

    def _decide_first(self, job: Job) -> EnginePlan:
        """Before any weights are placed: for this job nothing needs to be searched for once they are."""
        self._engine_plan = self._decide(job)
        self._settled.add(kind_of(job))
        return self._engine_plan

    def _decide(self, job: Job, before: EnginePlan | None = None) -> EnginePlan:
        """A plan for a job; with ``before``, around its weights, which are in memory. Raises DoesNotFitError.

        Where the user fixed the block, and the budgets do not hold it with answers as long as they may be, it is
        planned for shorter ones: sequences are admitted as there are pages for them.
        """
        fixed = None not in ((config := self.config).gpu_batch_size, config.num_gpu_batches)
        if config.reserve == "all" or not fixed:
            return self._decide_for(job, before)
        refusal: DoesNotFitError | None = None
        for share in ANSWER_SHARES:
            try:
                found = self._decide_for(job.assuming(share), before, share)
                check_budgets(found.requirements(found.sizes(job)), self.deployment.budgets)
                return found
            except DoesNotFitError as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def _decide_for(self, job: Job, before: EnginePlan | None, answer_share: float = 1.0) -> EnginePlan:
        problem, began = self._problem(job, before), time.perf_counter()
        choice = self._chosen(problem, job, None if before is None else before.weight_plan.num_slabs)
        self.problem, self.search_seconds = problem, time.perf_counter() - began
        weight_plan = self.deployment.weight_plan(choice.policy) if before is None else before.weight_plan
        return EnginePlan(self.deployment, choice.policy, choice.plan, weight_plan, answer_share)

    def _problem(self, job: Job, before: EnginePlan | None = None, bits: Policy | None = None) -> Problem:
        model, config = self.deployment.model, self.config
        if bits is not None:
            own: dict[str, Any] = {"weight_bits": bits.weight_bits, "cache_bits": bits.cache_bits}
            config = dataclasses.replace(config, **own, allow_bits=())
        element_bytes, loaded = self.deployment.dtype.itemsize, None if before is None else before.policy
        held, loras = self.deployment.budgets, self.deployment.adapters
        arch, part = self.deployment.most_layers, self._part(job)
        whole = job.num_requests if part is not job else None
        return Problem(arch, config, part, held, element_bytes, model.prequantized, loaded, loras, whole)

    def _part(self, job: Job) -> Job:
        """What a pass runs, and the ones after it on the same part of the block."""
        return job.of_every(self.deployment.passes_in_flight)

    def _chosen(self, problem: Problem, job: Job, num_slabs: int | None = None) -> Choice:
        needs = partial(self.requirements_of, job=job, num_slabs=num_slabs)
        choice = choose_policy(problem, lambda: self.hardware, needs)
        choice = with_faster_products(problem, choice, lambda: self.machine.known)
        choice = on_slowest(problem, self.deployment.stage_arches, choice, lambda: self.hardware)
        choice = filled_in_rounds(problem, choice)
        if not self.dry:
            problem.known.sizes.clear()  # tens of MB, and only another search for this job would use them
        if choice.plan is not None:
            rate, limit = choice.plan.predicted_tokens_per_second, choice.plan.limiting_resource
            logger.info("chose %s: %.4g tok/s predicted, limited by %s", described(choice.policy), rate, limit)
        return choice

    def requirements_of(self, policy: Policy, job: Job, num_slabs: int | None = None) -> list[MemoryRequirement]:
        """Returns the exact requirements of a job under any policy."""
        weight_plan = self.deployment.weight_plan(policy, num_slabs)
        return self.deployment.requirements(weight_plan, policy, self.deployment.sizes(policy, job))

    def replan(self, job: Job) -> EnginePlan:
        """The plan for a job, a new one where it is not like the one that the policy was chosen for. The weights move
        only where that is worth it, or nothing else fits. Raises DoesNotFitError."""
        if (before := self.placed) is None:
            return self._decide_first(job)
        current = self.engine_plan
        fits = not overshoot(current.requirements(current.sizes(job)), self.deployment.budgets)
        kept: EnginePlan | None = current
        refusal: DoesNotFitError | None = None
        if not fits or differs(self.problem, current.policy, self._part(job)):
            try:
                kept = self._decide(job, before)
            except DoesNotFitError as error:
                kept, refusal = (current, None) if fits else (None, error)
        self._engine_plan = self._relocated(job, before, kept) or kept
        if self._engine_plan is None:
            self._engine_plan = current
            assert refusal is not None
            raise refusal
        return self._engine_plan

    def _relocated(self, job: Job, before: EnginePlan, kept: EnginePlan | None) -> EnginePlan | None:
        """The plan for a job with weights on other tiers than ``before`` has them on: where it would run faster than
        with ``kept`` by more than a plan is off, or where there is no such plan. None: they stay."""
        kind, weights = kind_of(job), before.weight_plan
        nothing_travels = kept is not None and kept.plan is None and before.policy.weights.gpu >= 1
        if self.config.percent is not None or kind in self._settled or nothing_travels:
            return None
        problem = self._problem(job, bits=before.policy)
        if kept is None or could_gain(problem, self.hardware, kept, self.search_seconds):
            with contextlib.suppress(DoesNotFitError):
                choice = self._chosen(problem, job)
                weight_plan = self.deployment.weight_plan(choice.policy)
                found = EnginePlan(self.deployment, choice.policy, choice.plan, weight_plan)
                relocation = Relocation(problem, self.hardware, kept, found) if kept else None
                reason = relocation.gain() if relocation else "nothing else holds the job"
                if reason and fits_while_moving(weights, found.weight_plan, self.deployment.budgets):
                    logger.info("weights move: %s", reason)
                    self.problem = problem
                    self._settled.clear()
                    return found
        self._settled.add(kind)
        return None

    def adopt_lengths(self, job: Job, pass_seconds: float, held: CacheSizes | None = None) -> EnginePlan | None:
        """A plan for what is left of a job whose answers are not as long as assumed, and whose passes have taken
        ``pass_seconds`` each; it is the latest from now on. None where the block in flight is about as good. held: see
        `learned.resized`."""
        before, placed = self.engine_plan, self.placed or self.engine_plan
        part, planned = self._part(job), self.problem.job
        grows = held is not None and holds_more(before, planned, part)
        if before.plan is None or not (grows or differs(self.problem, before.policy, part, LEAST_GAIN)):
            return None
        rest = self._problem(job, placed)
        found = refilled_in_rounds(rest, resized(rest, before, job, held))
        if search_pays(self.search_seconds, rest, planned, before, found, pass_seconds):
            with contextlib.suppress(DoesNotFitError):
                found = faster(self._decide(job, placed), found)
        if not is_faster(rest, before, found):
            return None
        self.problem, self._engine_plan = rest, found
        return found

    def shortfall(self, job: Job) -> dict[str, int]:
        """Bytes by tier that a block for a job needs beyond the budgets; none where another policy would hold it,
        wherever the weights lie then."""
        missing = overshoot((plan := self.engine_plan).requirements(plan.sizes(job)), self.deployment.budgets)
        if not missing or self.problem.is_fixed or job.longest >= self._shortest_refused:
            return missing
        num_slabs = plan.weight_plan.num_slabs
        for problem, slabs in ((self._problem(job, plan), num_slabs), (self._problem(job, bits=plan.policy), None)):
            needs = partial(self.requirements_of, job=job, num_slabs=slabs)
            with contextlib.suppress(DoesNotFitError):
                choose_policy(problem, lambda: self.hardware, needs)
                return {}
        self._shortest_refused = job.longest
        return missing

    def describe(self, job: Job) -> dict[str, Any]:
        """What running the job would put where; the plan itself is "plan". Raises DoesNotFitError."""
        rows = (found := self.engine_plan).requirements(found.sizes(job.of_every(self.config.data_parallel_size)))
        check_budgets(rows, self.deployment.budgets)
        plan = found.plan or priced(self.problem, without_reserves(self.hardware), found.policy)
        return {
            "plan": plan,
            **found.describe(),
            "realized_percent": {"weights": found.weight_plan.realized_percent},
            "memory": [asdict(row) for row in rows],
        }
