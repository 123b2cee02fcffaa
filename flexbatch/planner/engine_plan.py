"""What is decided before any weight is loaded, and again for jobs that are not like the last: model, device,
budgets, policy, homes of the weights."""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexbatch.calibrate import machine
from flexbatch.config import EngineConfig
from flexbatch.execution import block_sizes
from flexbatch.execution.block_sizes import BlockSizes
from flexbatch.job import Job
from flexbatch.memory.tiers import MemoryRequirement, check_budgets
from flexbatch.memory.weight_plan import WeightPlan, plan_weights
from flexbatch.models import checkpoint, resolve, shapes
from flexbatch.models.generation_config import generation_of
from flexbatch.planner import budgets, requirements
from flexbatch.planner.choose import Problem, choose_policy, differs, overshoot, priced, without_reserves
from flexbatch.policy.hardware import Hardware, write_hardware
from flexbatch.policy.limits import weight_group
from flexbatch.policy.policy import Policy
from flexbatch.speculative.setup import plan_speculation
from flexbatch.text.prompts import PromptEncoder
from flexbatch.validation.errors import DoesNotFitError

logger = logging.getLogger("flexbatch")


class EnginePlan:
    """The decisions of one engine. ``policy`` and ``plan`` follow the jobs; the weights stay where the first policy put
    them.

    With ``dry`` nothing is measured, and a named machine (--hardware) with the default device is planned for as it
    is described. Raises DoesNotFitError when the job, or without one the smallest request, does not fit the budgets.
    """

    def __init__(self, config: EngineConfig, job: Job | None = None, dry: bool = False) -> None:
        self.config, self.dry = config, dry
        self._read_model()
        named = machine.named(config.hardware)
        elsewhere = dry and named is not None and config.device == "auto"
        self.device = torch.device(named.device) if elsewhere and named else budgets.resolve_device(config.device)
        self.dtype = budgets.resolve_dtype(config.dtype, self.arch, self.device)
        self.budgets = budgets.resolve_budgets(config, self.device, named if elsewhere else None)
        self._hardware = named
        self.profile_path = (
            machine.profile_path(config.hardware, self.device, self.offload_dir, machine.default_profile_dir())
            if config.recalibrate
            else None
        )
        self.layout = block_sizes.cache_layout(self.arch, config.cache_bits, self.dtype)
        self.encoder = PromptEncoder(
            self.tokenizer, max_context=self.arch.max_positions, vocab_size=self.arch.vocab_size
        )
        self.speculation = plan_speculation(config, self.arch, self.tokenizer, self.layout)
        self._packed = {} if self.folder is None else checkpoint.prequantized(self.folder, self.arch)
        self._shortest_refused = sys.maxsize
        """Token rows of the shortest request that no policy was found to hold."""
        self._num_slabs: int | None = None
        """Working slabs of the loaded weights."""
        typical = Job.typical(self.arch.max_positions)
        # The jobs to come may be smaller than a typical one: the smallest request has to fit, and each job is asked
        # again.
        jobs = [typical, typical.first(1), Job((1,), (1,))] if job is None else [job]
        for expected in jobs:
            try:
                self._decide(expected)
                self.weight_plan = self._weight_plan(self.policy)
                check_budgets(self.needs(self.sizes(expected.first(1))), self.budgets)
                break
            except DoesNotFitError:
                if expected is jobs[-1]:
                    raise
        self._num_slabs = self.weight_plan.num_slabs

    def _read_model(self) -> None:
        """Architecture, tokenizer and sampling defaults; no weights yet."""
        self.tokenizer: Any = None
        self.generation = generation_of(self.config)
        if self.config.dummy_weights:
            self.folder = None
            self.arch = shapes.shape(self.config.model)
            return
        self.folder = resolve.resolve(self.config.model)
        self.arch = checkpoint.read_arch(self.folder)
        self.tokenizer = resolve.load_tokenizer(self.folder)

    @property
    def offload_dir(self) -> Path:
        """Where the disk tier lies, and the disk that is measured."""
        return budgets.offload_dir(self.config)

    @property
    def hardware(self) -> Hardware:
        """The machine that plans are made for; measured at first use."""
        if self._hardware is None:
            self._hardware = machine.this_machine(
                self.device, self.offload_dir, machine.default_profile_dir(), measure=not self.dry
            )
        return self._hardware

    def recalibrate(self, hardware: Hardware) -> None:
        """Plan for the machine as runs have shown it, here and, with --recalibrate, in later processes."""
        self._hardware = hardware
        if self.profile_path is not None:
            write_hardware(hardware, self.profile_path)

    # The policy

    def _decide(self, job: Job, loaded: Policy | None = None) -> None:
        """Policy and plan for a job; with ``loaded``, around weights that are in memory. Raises DoesNotFitError."""
        self.problem = Problem(self.arch, self.config, job, self.budgets, self.dtype.itemsize, self._packed, loaded)
        choice = choose_policy(self.problem, lambda: self.hardware, lambda policy: self.requirements_of(policy, job))
        self.policy, self.plan = choice.policy, choice.plan
        self.layout = block_sizes.cache_layout(self.arch, self.policy.cache_bits, self.dtype)
        if self.plan is not None:
            predicted = self.plan.predicted_tokens_per_second
            logger.info(
                "chose %s: %.4g tok/s predicted, limited by %s",
                described(self.policy),
                predicted,
                self.plan.limiting_resource,
            )

    def suit(self, job: Job) -> None:
        """Decide again for a job that is not like the one that the policy was chosen for; the weights stay where
        they are."""
        fits = not overshoot(self.needs(self.sizes(job)), self.budgets)
        if fits and not differs(self.problem, self.policy, job):
            return
        problem = self.problem
        try:
            self._decide(job, self.policy)
        except DoesNotFitError:
            self.problem = problem
            if not fits:
                raise

    def exceeded(self, job: Job) -> dict[str, int]:
        """Bytes by tier that a block for a job needs beyond the budgets; none where another policy, around the
        loaded weights, would hold it."""
        exceeded = overshoot(self.needs(self.sizes(job)), self.budgets)
        if not exceeded or self.problem.settled or job.longest >= self._shortest_refused:
            return exceeded
        problem = dataclasses.replace(self.problem, job=job, loaded=self.policy)
        try:
            choose_policy(problem, lambda: self.hardware, lambda policy: self.requirements_of(policy, job))
        except DoesNotFitError:
            self._shortest_refused = job.longest
            return exceeded
        return {}

    # What it needs

    def sizes(self, job: Job) -> BlockSizes:
        """Of a block for a job under the decided policy."""
        return block_sizes.block_sizes(
            self.policy, self.layout, job, self.speculation.max_nodes if self.speculation else 0
        )

    def needs(self, sizes: BlockSizes) -> list[MemoryRequirement]:
        """Bytes by tier and purpose of the loaded weights and a block of these sizes."""
        rows = self._needs(self.weight_plan, self.policy, sizes)
        return rows + requirements.graph_needs(
            self.arch, self.policy, self.layout, sizes, rows, self.budgets["gpu"], self.device.type == "cuda"
        )

    def num_graphs(self, sizes: BlockSizes) -> int:
        """CUDA graphs that are kept beside a block of these sizes."""
        rows = self._needs(self.weight_plan, self.policy, sizes)
        return requirements.num_graphs(
            self.arch, self.policy, self.layout, sizes, rows, self.budgets["gpu"], self.device.type == "cuda"
        )

    def requirements_of(self, policy: Policy, job: Job) -> list[MemoryRequirement]:
        """Exact needs of a job under any policy."""
        layout = block_sizes.cache_layout(self.arch, policy.cache_bits, self.dtype)
        sizes = block_sizes.block_sizes(policy, layout, job, self.speculation.max_nodes if self.speculation else 0)
        return self._needs(self._weight_plan(policy), policy, sizes)

    def _needs(self, weight_plan: WeightPlan, policy: Policy, sizes: BlockSizes) -> list[MemoryRequirement]:
        layout = block_sizes.cache_layout(self.arch, policy.cache_bits, self.dtype)
        drafts = self.speculation.needs(sizes.sequence_tokens, self.device.type == "cuda") if self.speculation else []
        return (
            requirements.needs(
                weight_plan, policy, layout, sizes, self.dtype, self.device.type == "cuda", torch.get_num_threads()
            )
            + drafts
        )

    def _weight_plan(self, policy: Policy) -> WeightPlan:
        bits = self.config.weight_bits if self._packed else policy.weight_bits
        slabs = self._num_slabs or policy.num_weight_slabs
        return plan_weights(
            self.arch,
            policy.weights,
            bits,
            weight_group(self.arch.hidden_size),
            self.dtype.itemsize,
            self._packed,
            slabs,
        )

    # Told to the user

    def describe(self) -> dict[str, Any]:
        """Model, machine and policy: the beginning of every report."""
        return {
            "model": self.config.model,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "policy": asdict(self.policy),
            "percent": list(self.policy.percent),
            "budgets": self.budgets,
        }

    def describe_plan(self, job: Job) -> dict[str, Any]:
        """What running the job would put where; the plan itself is "plan". Raises DoesNotFitError."""
        needs = self.needs(self.sizes(job))
        check_budgets(needs, self.budgets)
        plan = self.plan or priced(self.problem, without_reserves(self.hardware), self.policy)
        return {
            "plan": plan,
            **self.describe(),
            "realized_percent": {"weights": self.weight_plan.realized_percent},
            "memory": [asdict(need) for need in needs],
        }


def described(policy: Policy) -> str:
    percent = " ".join(f"{share:.4g}" for share in policy.percent)
    return (
        f"--percent {percent}, {policy.num_gpu_batches} micro-batches of {policy.gpu_batch_size}, "
        f"{policy.cpu_attention:.0%} CPU attention"
    )
