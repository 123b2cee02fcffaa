"""Makes engine plans: before any weight is loaded, and again for jobs that are not like the last."""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import asdict
from typing import Any

import torch

from flexbatch.calibrate import machine
from flexbatch.calibrate.profile_file import write_hardware
from flexbatch.config import EngineConfig
from flexbatch.execution.block_sizes import cache_layout
from flexbatch.execution.job import Job
from flexbatch.memory.tiers import MemoryRequirement, check_budgets
from flexbatch.models.generation_config import generation_of
from flexbatch.models.opened import OpenModel, open_model
from flexbatch.planner import budgets
from flexbatch.planner.choose import choose_policy, differs, overshoot, priced, without_reserves
from flexbatch.planner.engine_plan import Deployment, EnginePlan, described
from flexbatch.planner.problem import Problem
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.policy import Policy
from flexbatch.speculative.setup import plan_speculation
from flexbatch.text.prompts import PromptEncoder
from flexbatch.validation.errors import DoesNotFitError

logger = logging.getLogger("flexbatch")

LEAST_GAIN = 0.1
"""Of throughput, that another block must promise before sequences in flight are read anew for it."""
ANSWER_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0)
"""Of ``max_tokens``, that a block is tried with which the user fixed."""


class Planner:
    """Owns the machine's rates and the latest `EnginePlan`. Plans follow the jobs; the weights stay where the first one
    put them.

    With ``dry`` nothing is measured, and a named machine (--hardware) with the default device is planned for as it
    is described; ``hardware`` is such a machine that no name stands for. ``model``: the configured one, where it is
    open already. Raises DoesNotFitError when the job, or
    without one the smallest request, does not fit the budgets.
    """

    def __init__(
        self,
        config: EngineConfig,
        job: Job | None = None,
        dry: bool = False,
        model: OpenModel | None = None,
        hardware: Hardware | None = None,
    ) -> None:
        self.config, self.dry = config, dry
        self.generation = generation_of(config, model.folder if model else None)
        model = model or open_model(config.model, config.dummy_weights)
        named = hardware or machine.named(config.hardware)
        elsewhere = dry and named is not None and config.device == "auto"
        device = torch.device(named.device) if elsewhere and named else budgets.resolve_device(config.device)
        dtype = budgets.resolve_dtype(config.dtype, model.arch, device)
        tiers = budgets.resolve_budgets(config, device, named if elsewhere else None, dry)
        self._hardware = named
        self.offload_dir = budgets.offload_dir(config)
        self.profile_path = (
            machine.profile_path(config.hardware, device, self.offload_dir, machine.default_profile_dir())
            if config.recalibrate
            else None
        )
        self.encoder = PromptEncoder(
            model.tokenizer, max_context=model.arch.max_positions, vocab_size=model.arch.vocab_size
        )
        layout = cache_layout(model.arch, config.cache_bits, dtype)
        speculation = plan_speculation(config, model.arch, model.tokenizer, layout)
        self.deployment = Deployment(config, model, device, dtype, tiers, speculation)
        self._shortest_refused = sys.maxsize
        """Token rows of the shortest request that no policy was found to hold."""
        self.engine_plan = self._first_plan(job)

    def _first_plan(self, job: Job | None) -> EnginePlan:
        typical = Job.typical(self.deployment.model.arch.max_positions)
        # The jobs to come may be smaller than a typical one: the smallest request has to fit, and each job is asked
        # again.
        jobs = [typical, typical.first(1), Job((1,), (1,))] if job is None else [job]
        for expected in jobs:
            try:
                found = self._decide(expected)
                check_budgets(found.requirements(found.sizes(expected.first(1))), self.deployment.budgets)
                return found
            except DoesNotFitError:
                if expected is jobs[-1]:
                    raise
        raise AssertionError("the last job either fits or raises")

    @property
    def hardware(self) -> Hardware:
        """The machine that plans are made for; measured at first use."""
        if self._hardware is None:
            self._hardware = machine.this_machine(
                self.deployment.device, self.offload_dir, machine.default_profile_dir(), measure=not self.dry
            )
        return self._hardware

    @property
    def known_hardware(self) -> Hardware | None:
        """The machine as far as it is known without measuring anything."""
        if self._hardware is not None:
            return self._hardware
        return machine.known_machine(self.deployment.device, self.offload_dir, machine.default_profile_dir())

    def recalibrate(self, hardware: Hardware) -> None:
        """Plan for the machine as runs have shown it, here and, with --recalibrate, in later processes."""
        self._hardware = hardware
        if self.profile_path is not None:
            write_hardware(hardware, self.profile_path)

    def _decide(self, job: Job, before: EnginePlan | None = None) -> EnginePlan:
        """A plan for a job; with ``before``, around its weights, which are in memory. Raises DoesNotFitError.

        Where the user fixed the block, and the budgets do not hold it with answers as long as they may be, it is
        planned for shorter ones: sequences are admitted as there are pages for them.
        """
        config = self.config
        fixed = None not in (config.gpu_batch_size, config.num_gpu_batches)
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
        deployment = self.deployment
        loaded = None if before is None else before.policy
        problem = Problem(
            deployment.model.arch,
            self.config,
            job,
            deployment.budgets,
            deployment.dtype.itemsize,
            deployment.model.prequantized,
            loaded,
        )
        num_slabs = None if before is None else before.weight_plan.num_slabs
        choice = choose_policy(
            problem, lambda: self.hardware, lambda policy: self.requirements_of(policy, job, num_slabs)
        )
        if choice.plan is not None:
            rate, limit = choice.plan.predicted_tokens_per_second, choice.plan.limiting_resource
            logger.info("chose %s: %.4g tok/s predicted, limited by %s", described(choice.policy), rate, limit)
        self.problem = problem
        weight_plan = deployment.weight_plan(choice.policy) if before is None else before.weight_plan
        return EnginePlan(deployment, choice.policy, choice.plan, weight_plan, answer_share)

    def requirements_of(self, policy: Policy, job: Job, num_slabs: int | None = None) -> list[MemoryRequirement]:
        """Returns the exact requirements of a job under any policy."""
        weight_plan = self.deployment.weight_plan(policy, num_slabs)
        return self.deployment.requirements(weight_plan, policy, self.deployment.sizes(policy, job))

    def replan(self, job: Job) -> EnginePlan:
        """The plan for a job, a new one where it is not like the one that the policy was chosen for; the weights stay
        where they are. Raises DoesNotFitError."""
        before = self.engine_plan
        fits = not overshoot(before.requirements(before.sizes(job)), self.deployment.budgets)
        if fits and not differs(self.problem, before.policy, job):
            return before
        try:
            self.engine_plan = self._decide(job, before)
        except DoesNotFitError:
            if not fits:
                raise
        return self.engine_plan

    def adopt_lengths(self, job: Job) -> EnginePlan | None:
        """A plan for what is left of a job whose answers are not as long as assumed; it is the latest from now on.
        None where the block in flight is as good, to within ``LEAST_GAIN``."""
        before = self.engine_plan
        if before.plan is None or not differs(self.problem, before.policy, job):
            return None
        try:
            found = self._decide(job, before)
        except DoesNotFitError:
            return None
        as_before = priced(self.problem, without_reserves(self.hardware), before.policy).predicted_tokens_per_second
        better = found.plan is not None and found.plan.predicted_tokens_per_second > (1 + LEAST_GAIN) * as_before
        if found.policy == before.policy or not better:
            return None
        self.engine_plan = found
        return found

    def shortfall(self, job: Job) -> dict[str, int]:
        """Bytes by tier that a block for a job needs beyond the budgets; none where another policy, around the
        loaded weights, would hold it."""
        plan = self.engine_plan
        missing = overshoot(plan.requirements(plan.sizes(job)), self.deployment.budgets)
        if not missing or self.problem.is_fixed or job.longest >= self._shortest_refused:
            return missing
        problem = dataclasses.replace(self.problem, job=job, loaded=plan.policy)
        num_slabs = plan.weight_plan.num_slabs
        try:
            choose_policy(problem, lambda: self.hardware, lambda policy: self.requirements_of(policy, job, num_slabs))
        except DoesNotFitError:
            self._shortest_refused = job.longest
            return missing
        return {}

    def describe(self, job: Job) -> dict[str, Any]:
        """What running the job would put where; the plan itself is "plan". Raises DoesNotFitError."""
        found = self.engine_plan
        rows = found.requirements(found.sizes(job))
        check_budgets(rows, self.deployment.budgets)
        plan = found.plan or priced(self.problem, without_reserves(self.hardware), found.policy)
        return {
            "plan": plan,
            **found.describe(),
            "realized_percent": {"weights": found.weight_plan.realized_percent},
            "memory": [asdict(row) for row in rows],
        }
