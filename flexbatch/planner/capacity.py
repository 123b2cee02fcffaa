"""The runner that jobs find: made for one job, kept for those that it holds, made anew for one that has outgrown it."""

from __future__ import annotations

import bisect
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from flexbatch.execution.answer_lengths import AnswerLengths
from flexbatch.execution.block_sizes import BlockSizes, logits_chunk_bytes
from flexbatch.execution.job import Job
from flexbatch.execution.proposals import Proposer
from flexbatch.execution.resize import fits, resize
from flexbatch.execution.runner import Runner, open_runner
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.tiers import Tiers, check_budgets
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weights import WeightStore
from flexbatch.models.routing import RoutingCounts
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.leader import Leader
from flexbatch.planner.placements import overshoot
from flexbatch.planner.planner import Planner
from flexbatch.planner.rank_commands import MakeRunner, PlaceWeights, RankCommand, ReachLonger
from flexbatch.planner.spare_pages import with_spare_pages
from flexbatch.policy.step_aside import StepAsideCosts
from flexbatch.policy.units import size_text
from flexbatch.speculative.speculator import Speculator
from flexbatch.validation.errors import DoesNotFitError, LostRankError

logger = logging.getLogger("flexbatch")

PEEKED_BLOCKS = 4
"""Blocks of requests that are looked at to size the cache, when the job's lengths are not known."""
FIRST_LOOK = 1024
"""Requests that are looked at before anything is decided: as many as the largest block that is chosen without a search
holds."""


class Capacity:
    """Owns the runner, within the budgets, and has the weights placed for the jobs. ``runner`` is None before the first
    job, and after a failure."""

    def __init__(
        self,
        planner: Planner,
        tiers: Tiers,
        queues: TransferQueues,
        place: Callable[[EnginePlan], tuple[WeightStore, Speculator | None]],
        leader: Leader | None = None,
    ) -> None:
        """place: loads the weights as planned, or moves those that are loaded; returns them, and the drafts. leader: of
        the other ranks, where there are some."""
        self.planner, self.tiers, self.queues, self._place, self.leader = planner, tiers, queues, place, leader
        self.on_plan: Callable[[], None] = lambda: None
        """Called when it is decided how a job will run, and before anything is made for it."""
        self.runner: Runner | None = None
        self.weights: WeightStore | None = None
        """None before the first job."""
        self.speculator: Speculator | None = None
        self.routing: RoutingCounts | None = None
        """Of a model with experts, from its first job on."""

    def place(self, engine_plan: EnginePlan) -> WeightStore:
        """The weights on the tiers of a plan. The runner is closed before they move."""
        if not self.holds_weights(engine_plan):
            self.close_runner()
            self.weights, self.speculator = None, None
            self.planner.placed = None
            with self.everywhere(PlaceWeights(engine_plan.policy, engine_plan.weight_plan.num_slabs)):
                self.weights, self.speculator = self._place(engine_plan)
            self.planner.placed = engine_plan
        assert self.weights is not None
        return self.weights

    def everywhere(self, command: RankCommand) -> contextlib.AbstractContextManager[None]:
        """What the body does here, the other ranks do as well."""
        return contextlib.nullcontext() if self.leader is None else self.leader.beside(command)

    def holds_weights(self, engine_plan: EnginePlan) -> bool:
        """Whether the weights are in memory, on the tiers of a plan."""
        return self.weights is not None and self.weights.plan == engine_plan.weight_plan

    @property
    def step_aside_costs(self) -> StepAsideCosts:
        """By the machine's rates, where any plan needed these."""
        plan = self.planner.engine_plan.plan
        return StepAsideCosts() if plan is None else StepAsideCosts.of(plan.shape, plan.hardware)

    @property
    def peeked(self) -> tuple[int, int]:
        """(sequences of the block, requests that are looked at to size it): before the first job nothing is decided
        yet."""
        config = self.planner.config
        if self.planner.placed is not None:
            block = self.planner.engine_plan.block_policy.block_size
        elif config.gpu_batch_size is not None and config.num_gpu_batches is not None:
            block = config.gpu_batch_size * config.num_gpu_batches * config.pipeline_parallel_size
        else:
            return Job.TYPICAL_REQUESTS, FIRST_LOOK
        return block, PEEKED_BLOCKS * block

    def prepare(self, job: Job, found: EnginePlan | None = None) -> Runner:
        """A runner whose sizes suit the job. found: the plan for it, where that is made already. Raises
        DoesNotFitError."""
        engine_plan = found or self.planner.replan(job)
        self.on_plan()
        sizes, held = engine_plan.sizes(job), self.holds_weights(engine_plan)
        if not held or engine_plan.speculation is not None:
            check_budgets(engine_plan.requirements(sizes), engine_plan.budgets)
        weights = self.place(engine_plan)
        if engine_plan.speculation is not None and self.speculator is not None:
            engine_plan.speculation.open_runner(self.speculator, sizes.sequence_tokens)
        if self.runner is not None and self.holds(engine_plan, sizes):
            return self.runner
        self.close_runner()
        check_budgets(engine_plan.requirements(sizes), engine_plan.budgets)
        if held:
            self._place(engine_plan)  # weights stay, but a policy of another cache launches kernels of its own
        sizes = with_spare_pages(engine_plan, sizes, job)
        if self.routing is None and engine_plan.arch.experts is not None:
            self.routing = RoutingCounts(engine_plan.arch, self.queues.device)
        policy, leader = engine_plan.made_for, self.leader
        logits_bytes = logits_chunk_bytes(engine_plan.arch, policy, sizes.max_query_nodes)
        graphs = engine_plan.graphs(sizes)
        if lack := graphs.lack():
            logger.log(logging.INFO if graphs.decode else logging.WARNING, "%s", lack)
        with self.everywhere(MakeRunner(policy, sizes, logits_bytes, graphs.decode, graphs.buckets)):
            self.runner = open_runner(
                engine_plan.arch,
                weights,
                engine_plan.layout,
                policy,
                sizes,
                self.tiers,
                self.queues,
                logits_bytes,
                graphs.decode,
                graphs.buckets,
                engine_plan.deployment.adapters,
                self.routing,
                None if leader is None else leader.links,
                None if leader is None else leader.lead,
            )
        if leader is not None:
            leader.runner = self.runner
        return self.runner

    def holds(self, engine_plan: EnginePlan, sizes: BlockSizes) -> bool:
        """Whether the runner has what a block of these sizes needs."""
        held = self.runner is not None and self.runner.holds(engine_plan.made_for, sizes)
        if held and self.leader is not None:
            self.leader.finish()  # what a job before has given up
        return held and bool(self.reach(sizes.longest))

    def faster_plan(self, job: Job, pass_seconds: float) -> EnginePlan | None:
        """See `Planner.adopt_lengths`."""
        held = None if self.runner is None else self.runner.sizes.cache
        return self.planner.adopt_lengths(job, pass_seconds, held)

    def scheduler(
        self,
        runner: Runner,
        arrivals: Iterator[Sequence | None],
        overtakes: Callable[[Sequence], bool],
        lengths: AnswerLengths,
        left: Iterable[Sequence],
        proposer: Proposer | None,
    ) -> Scheduler:
        """Of a run in the block that is planned."""
        return Scheduler(
            self.planner.engine_plan.block_policy,
            runner.cache,
            arrivals,
            runner.sizes.max_micro_batch_tokens,
            proposer,
            self.refusal,
            self.reach,
            lengths,
            self.step_aside_costs,
            left,
            overtakes,
        )

    def grown(self, scheduler: Scheduler, found: EnginePlan, job: Job) -> Runner | None:
        """The runner, whose block goes on with as many sequences as ``found`` says; None where it cannot."""
        if not self.holds(found, found.sizes(job)) or not fits(scheduler, found.block_policy):
            return None
        resize(scheduler, found.block_policy)
        return self.runner

    def prepare_largest(self, job: Job, found: EnginePlan | None = None) -> Runner:
        """`prepare` for as many of the longest requests of a job as the budgets hold. Raises DoesNotFitError when the
        longest alone does not fit."""
        count, job = job.num_requests, job.longest_first()
        while True:
            try:
                return self.prepare(job.first(count), found)
            except DoesNotFitError:
                if count == 1:
                    raise
                count //= 2

    def holdable(self, job: Job) -> Job:
        """The job without the requests for which even a block of their own exceeds the budgets; it is for the others
        that a block is made."""
        job, shortfall = job.longest_first(), self.planner.shortfall
        first = bisect.bisect_left(
            range(job.num_requests),
            True,
            key=lambda i: not shortfall(Job((job.cache_tokens[i],), (job.prompt_tokens[i],))),
        )
        return job.after(first) if first < job.num_requests else Job((1,), (1,))

    def reach(self, longest: int) -> bool | None:
        """Whether the runner takes sequences of so many tokens: where its pages do and its tables do not, these grow,
        as far as the budgets go. None: not while other ranks are in passes, which would come to their ends unread."""
        assert self.runner is not None
        if longest <= self.runner.sizes.longest:
            return True
        sizes = replace(self.runner.sizes, longest=longest)
        engine_plan = self.planner.engine_plan
        if overshoot(engine_plan.requirements(sizes), engine_plan.budgets):
            return False
        if self.leader is not None and self.leader.unfinished:
            return None
        with self.everywhere(ReachLonger(sizes)):
            self.runner.reach(sizes)
        return True

    def refusal(self, sequence: Sequence) -> str:
        """Why no block within the budgets holds a sequence; empty where one does, if with nothing else in it."""
        budgets = self.planner.deployment.budgets
        missing = self.planner.shortfall(Job((sequence.max_cache_tokens,), (sequence.num_prompt_tokens,)))
        if not missing:
            return ""
        short = ", ".join(
            f"{size_text(size)} more on the {tier} tier than its budget of {size_text(budgets[tier])}"
            for tier, size in missing.items()
        )
        return (
            f"{sequence.num_prompt_tokens} prompt and up to {sequence.output.max_tokens} generated tokens need "
            f"{short}, in a block of their own. "
            "Lower max_tokens, raise the budgets, or move the cache to a larger tier with --percent"
        )

    def close(self) -> None:
        """With the engine: nothing of it stays in memory, though the engine itself may be held for longer."""
        try:
            self.close_runner()
        finally:
            self.weights, self.speculator, self.routing = None, None, None

    def close_runner(self) -> None:
        """The next job makes another. What other ranks are still in comes to its end first."""
        if self.leader is not None:
            # Where a rank is gone, whoever noticed it first says so.
            with contextlib.suppress(LostRankError):
                self.leader.finish()
        runner, self.runner = self.runner, None
        if runner is not None:
            runner.close()
