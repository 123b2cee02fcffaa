"""Models of which several runners are open at once: closed once, and as good as one for each."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from flexbatch.calibrate import experts, host, passes
from flexbatch.calibrate.passes import SmallJob, SmallModels, job_runner, resident, runner_of, small_arch
from flexbatch.execution.passes import Passes
from flexbatch.execution.runner import Runner
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.tiers import Pool
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weights import WeightStore
from flexbatch.models.dummy import dummy
from flexbatch.policy.policy import Policy
from flexbatch.trace import Tracer

CPU = torch.device("cpu")
POLICIES = {
    "few": resident(4),
    "many": resident(12),
    "one": resident(3, 1),
    "on the CPU": passes.with_cpu_attention(4),
    "in turn": replace(passes.with_cpu_attention(4), overlap=False),
    "away": replace(resident(4), cache=host.ON_CPU),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What was opened and closed. Models are kept, or Python would close those that nobody has any more."""
    kept, models_made = list[SmallModels](), SmallModels.__init__
    monkeypatch.setattr(SmallModels, "__init__", lambda self, *told: kept.append(self) or models_made(self, *told))
    counts = Counter[str]()
    opened: dict[type, set[int]] = {}
    for kind in (TransferQueues, WeightStore, Runner):
        begin, end = kind.__init__, kind.close
        alive = opened.setdefault(kind, set())

        def made(self: Any, *told: Any, begin: Any = begin, alive: set[int] = alive, **named: Any) -> None:
            begin(self, *told, **named)
            alive.add(id(self))
            counts[f"{type(self).__name__}s made"] += 1

        def closed(self: Any, end: Any = end, alive: set[int] = alive) -> None:
            alive.remove(id(self))  # a second time raises
            counts[f"{type(self).__name__}s closed"] += 1
            end(self)

        monkeypatch.setattr(kind, "__init__", made)
        monkeypatch.setattr(kind, "close", closed)
    return counts


def tokens_of(runner: Runner, policy: Policy, job: SmallJob) -> dict[int, list[int]]:
    """By request."""
    sequences = [Sequence(request, sequence_id=request.index) for request in job.requests]
    scheduler = Scheduler(policy, runner.cache, iter(sequences), runner.sizes.max_micro_batch_tokens)
    turns = Passes(scheduler, runner.executor, Tracer(), ahead=False)
    while scheduler.has_work():
        turns.turn()
    return {each.sequence_id: list(each.token_ids) for each in sequences}


def test_runners_of_one_model_compute_what_runners_of_their_own_do() -> None:
    """All open at once and by turns, twice."""
    expected, found = {}, list[dict[str, dict[int, list[int]]]]()
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        for name, policy in POLICIES.items():
            job = SmallJob(policy.block_size)
            with job_runner(small_arch(3, 8), policy, CPU, Tracer(), job) as runner:
                expected[name] = tokens_of(runner, policy, job)
        models = stack.enter_context(contextlib.closing(SmallModels(CPU, 8)))
        runners = {
            name: stack.enter_context(runner_of(models.of(3), policy, SmallJob(policy.block_size).lengths))
            for name, policy in POLICIES.items()
        }
        for _ in range(2):
            found.append(
                {name: tokens_of(runner, POLICIES[name], SmallJob(POLICIES[name].block_size))
                 for name, runner in runners.items()}
            )  # fmt: skip
        for runner in runners.values():
            runner.check()
        models.of(3).weights.check()
    assert found == [expected, expected]
    assert len({tuple(tokens) for tokens in expected["many"].values()}) == len(expected["many"]) == 24


def test_a_model_is_opened_once_and_closed_once(counted: Counter[str]) -> None:
    models = SmallModels(CPU, 8)
    assert not counted, "nothing is opened before it is asked for"
    with runner_of(models.of(2), resident(4), SmallJob(4).lengths):
        assert models.of(2) is models.of(2) and models.of(3) is not models.of(2)
        assert counted == {"TransferQueuess made": 2, "WeightStores made": 2, "Runners made": 1}
    assert counted["Runners closed"] == 1 and not counted["WeightStores closed"], "its model stays open"
    models.close()
    models.close()
    assert counted["TransferQueuess closed"] == counted["WeightStores closed"] == 2


def test_all_that_a_profile_times_has_two_models(counted: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve policies by layers and what comes and goes on a CPU; that of attention alone has its own, whose spans
    are recorded. Nothing is left open."""
    monkeypatch.setattr(host, "MANY_SEQUENCES", 12)
    monkeypatch.setattr(host, "ROUNDS", 1)
    monkeypatch.setattr("flexbatch.calibrate.composing.ROUNDS", 1)
    host.host_rates(CPU)
    assert counted["Runners made"] == 12 and counted["WeightStores made"] == 2 + 1
    for kind in ("TransferQueues", "WeightStore", "Runner"):
        assert counted[f"{kind}s made"] == counted[f"{kind}s closed"]


def test_nothing_is_left_of_what_breaks_off(counted: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pools, made = list[Pool](), Pool.__init__

    def noted(self: Pool, *told: Any, **named: Any) -> None:
        made(self, *told, **named)
        pools.append(self)

    def broken(*told: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pool, "__init__", noted)
    monkeypatch.setattr(host, "decode_seconds_of", broken)
    with pytest.raises(KeyboardInterrupt):
        host.host_rates(CPU)
    assert counted["Runners made"] > 2 and all(not pool.used_bytes and not pool.arenas for pool in pools)
    for kind in ("TransferQueues", "WeightStore", "Runner"):
        assert counted[f"{kind}s made"] == counted[f"{kind}s closed"]


def test_weights_for_a_device_are_those_of_the_host() -> None:
    """And come from there: no piece is on the host."""
    arch = small_arch(2, 8)
    for here, there in zip(dummy(arch), dummy(arch, device=CPU), strict=True):
        assert (here.layer, here.role, here.rows) == (there.layer, there.role, there.rows)
        assert torch.equal(here.tensor, there.tensor)
    assert {piece.tensor.device.type for piece in dummy(arch, device=torch.device("meta"))} == {"meta"}


@pytest.mark.gpu
def test_weights_drawn_on_a_gpu_are_those_of_the_host() -> None:
    arch, gpu = small_arch(2, 128), torch.device("cuda", 0)
    for here, there in zip(dummy(arch), dummy(arch, device=gpu), strict=True):
        assert there.tensor.is_cuda and torch.equal(here.tensor, there.tensor.cpu())
    with torch.inference_mode(), contextlib.closing(SmallModels(gpu, 128)) as models:
        views = models.of(2).weights.views
        for piece in dummy(arch, dtype=torch.bfloat16):
            held = views[piece.layer, piece.role].dense
            assert held is not None and torch.equal(held[piece.rows or slice(None)].cpu(), piece.tensor)


@pytest.mark.parametrize("form", experts.FORMS)
def test_bytes_of_an_expert_are_those_that_are_stored(form: str) -> None:
    stored = experts.stored_experts(form, 3, 256, 128, torch.bfloat16).stored
    kept = [part for matrices in (stored.gate_up, stored.down) for part in (matrices.values, matrices.parameters)]
    found = sum(tensor.nbytes for tensors in kept for tensor in tensors.values())
    assert found == 3 * experts.expert_bytes(form, 256, 128, torch.bfloat16)
