"""Few tokens are multiplied with weights in codes, or with what these are expanded to: whichever takes less time."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.observed import fixed_by
from benchmark.policy_error import plan_of
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.planner.choose import without_reserves
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.planner import Planner
from flexbatch.planner.problem import constraints_of
from flexbatch.policy.code_choice import ALIKE, FewTokensPass, few_tokens_pass, with_products_chosen
from flexbatch.policy.expansion import expanded_bytes, in_codes, most_in_codes, quantized_launch_seconds
from flexbatch.policy.hardware import Hardware, load_hardware
from flexbatch.policy.optimizer import choose
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import public_shape
from flexbatch.policy.workload import Workload

ALL, NONE, MOST = Split(1, 0), Split(0, 1), Split(0.68, 0.32)
JOB = Workload.from_lengths([512] * 2000, [32] * 2000)
SLOW_GPU: dict[str, float] = {"expand": 1e11, "gpu_bandwidth": 1e12}


def machine(name: str = "h200", **changes: Any) -> Hardware:
    return dataclasses.replace(load_hardware(name), **changes)


def policy_of(size: int, count: int, weights: Split = MOST, cache: Split = NONE, **changes: Any) -> Policy:
    return Policy(weights, cache, ALL, size, count, **{"weight_bits": 4, "cache_bits": 4, **changes})


def chosen(model: str, policy: Policy, hardware: Hardware, workload: Workload = JOB) -> bool:
    return with_products_chosen(public_shape(model), hardware, workload, policy).few_in_codes


@pytest.mark.parametrize(
    ("model", "size", "count", "hardware", "codes"),
    [
        ("opt-125m", 17, 1, machine(), False),  # measured: 18.7 ms a pass in codes, 16.5 expanded
        ("opt-1.3b", 10, 7, machine(), False),  # 227 and 174
        ("llama-3-8b", 64, 7, machine(), False),
        ("opt-30b", 64, 7, machine(), True),
        ("opt-30b", 64, 7, machine("h100"), True),
        ("llama-3-70b", 64, 6, machine(), True),
        ("llama-3-70b", 64, 6, machine("h100"), True),
        ("llama-3-70b", 10, 6, machine(), False),  # the host launches for longer than the GPU computes
        ("llama-3-8b", 64, 7, machine(**SLOW_GPU), True),
        ("opt-1.3b", 10, 7, machine(**SLOW_GPU, launch_seconds=1e-6), True),
        ("opt-1.3b", 600, 7, machine(), False),  # its last sequences
    ],
)
def test_what_takes_less_time_is_chosen(model: str, size: int, count: int, hardware: Hardware, codes: bool) -> None:
    assert chosen(model, policy_of(size, count), hardware) == codes


def test_codes_stay_where_launching_does_not_count() -> None:
    """On the GPU whole, as graphs, without a GPU, and where nothing is quantized. A cache elsewhere has passes launched
    tick by tick."""
    size, one = (17, 1), Workload.from_lengths([512] * 17, [32] * 17)
    for policy, hardware, codes in (
        (policy_of(*size), machine(), False),
        (policy_of(*size, weights=ALL), machine(), False),
        (policy_of(*size, weights=ALL, cache=ALL), machine(), True),
        (policy_of(5, 4, weights=ALL, cache=ALL), machine(), False),
        (policy_of(*size, weights=ALL, cache=ALL, overlap=False), machine(), False),
        (policy_of(*size), machine("cpu"), True),
        (policy_of(*size), machine(device="cpu"), True),
        (policy_of(*size, weight_bits=16), machine(), True),
    ):
        for before in (True, False):
            given_policy = dataclasses.replace(policy, few_in_codes=before)
            assert chosen("opt-125m", given_policy, hardware, one) == codes, (policy, hardware.name)


def test_passes_as_long_as_each_other_go_by_host_and_gpu() -> None:
    """Where a link or a CPU hides both; what is equal in that, too, stays in codes."""
    link = FewTokensPass(1.0, 0.5)
    assert FewTokensPass(1.0, 0.4).is_faster(link) and not FewTokensPass(1.0, 0.6).is_faster(link)
    assert not FewTokensPass(1.0, 0.5).is_faster(link)
    assert FewTokensPass(1.0 + 1e-12, 0.4).is_faster(link), "to the digit"
    assert not FewTokensPass(1.1, 0.1).is_faster(link) and FewTokensPass(0.9, 0.8).is_faster(link)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Hardware, Workload, Policy]:
    model = draw(st.sampled_from(["opt-125m", "opt-1.3b", "llama-3-8b", "llama-3-70b", "qwen3-30b-a3b", "opt-30b"]))
    scale = st.sampled_from([0.1, 1.0, 10.0])
    found = load_hardware(draw(st.sampled_from(["h100", "h200"])))
    names = ("launch_seconds", "expand", "h2d", "gpu_bandwidth")
    hardware = dataclasses.replace(found, **{name: draw(scale) * getattr(found, name) for name in names})
    splits = st.sampled_from([ALL, NONE, MOST, Split(0.2, 0.5, 0.3)])
    policy = policy_of(
        draw(st.integers(1, 400)),
        draw(st.integers(1, 9)),
        draw(splits),
        draw(splits),
        weight_bits=draw(st.sampled_from([4, 8])),
        cpu_attention=draw(st.sampled_from([0.0, 0.3, 1.0])),
        overlap=draw(st.booleans()),
    )
    count = draw(st.integers(1, 3000))
    return model, hardware, Workload.from_lengths([300] * count, [64] * count), policy


@given(cases())
def test_the_chosen_one_is_never_predicted_to_be_slower(case: tuple[str, Hardware, Workload, Policy]) -> None:
    model, hardware, workload, policy = case
    shape = public_shape(model)
    found = with_products_chosen(shape, hardware, workload, policy)
    if policy.weights == policy.cache == ALL and policy.num_gpu_batches == 1 and policy.overlap:
        assert found.few_in_codes
        return
    other = dataclasses.replace(found, few_in_codes=not found.few_in_codes)
    own, others = (few_tokens_pass(shape, hardware, workload, each).seconds for each in (found, other))
    assert own <= others * (1 + 2 * ALIKE)


def test_prices_follow_the_policy() -> None:
    """Without codes few tokens cost what many do: an expansion of a layer, launched once."""
    shape, tokens = public_shape("opt-1.3b"), np.array([1.0, 70.0, most_in_codes(7), most_in_codes(7) + 1])
    codes = policy_of(10, 7)
    expanded = dataclasses.replace(codes, few_in_codes=False)
    for hardware in (machine(), machine("cpu", coded_4=load_hardware("cpu").gemm)):
        assert in_codes(hardware, codes, tokens)[:3].all() and not in_codes(hardware, expanded, tokens).any()
        assert (expanded_bytes(shape, hardware, expanded, tokens, "layer") > 0).all()
    once = machine().launched_seconds("expand")
    assert quantized_launch_seconds(machine(), expanded, tokens).tolist() == [once] * 4
    assert quantized_launch_seconds(machine(), codes, tokens)[0] == 7 * machine().launched_seconds("coded")


def planned(model: str, size: int, count: int, requests: int, **settings: Any) -> EnginePlan:
    fixed = {"percent": (68, 32, 0, 100, 100, 0), "gpu_batch_size": size, "num_gpu_batches": count}
    bits = {"weight_bits": 4, "cache_bits": 4, "cpu_memory": "122GiB"}
    config = EngineConfig(model=model, hardware="h200", dummy_weights=True, **{**fixed, **bits, **settings})
    return Planner(config, Job((543,) * requests, (512,) * requests), dry=True).engine_plan


def test_plans_by_hand_and_by_search_choose() -> None:
    """Also of a job that is too small for anything to be weighed. The plan is priced as it will run."""
    small, few = planned("opt-125m", 17, 1, 17), planned("opt-1.3b", 10, 7, 67)
    assert small.plan is None and not small.policy.few_in_codes and not few.policy.few_in_codes
    large = planned("opt-30b", 64, 7, 1344, cpu_attention=0.0, prefill_budget=3072)
    assert large.plan is not None and large.policy.few_in_codes
    sizes = {"percent": None, "gpu_batch_size": None, "num_gpu_batches": None}
    found = planned("opt-6.7b", 64, 7, 1344, **sizes, gpu_memory="3GiB", cpu_memory="24GiB")
    assert found.plan is not None and not found.policy.few_in_codes and found.policy.weights.gpu < 1
    assert found.plan.policy == found.policy
    for size, count in ((64, 1), (64, 7)):
        whole = planned("opt-6.7b", size, count, 1344, percent=(100, 0, 100, 0, 100, 0))
        assert whole.policy.few_in_codes == (count == 1), "several micro-batches are no graph"


def test_a_search_gives_what_the_engine_will_do() -> None:
    """`flexbatch plan` said 815 tokens a second of a job, of which its sweep said 765 with the same memory."""
    settings: dict[str, Any] = {"weight_bits": 4, "cache_bits": 8, "gpu_memory": "1GiB", "cpu_memory": "24GiB"}
    config = EngineConfig(model="opt-1.3b", hardware="h200", dummy_weights=True, **settings)
    planner = Planner(config, Job((543,) * 67, (512,) * 67), dry=True)
    engine_plan, problem, machine = planner.engine_plan, planner.problem, without_reserves(planner.hardware)
    alone = choose(problem.shape, machine, problem.workload, constraints_of(problem, problem.budgets))
    assert engine_plan.plan is not None and not alone.policy.few_in_codes and not engine_plan.policy.few_in_codes
    rate = engine_plan.plan.predicted_tokens_per_second
    assert alone.predicted_tokens_per_second == pytest.approx(rate, rel=0.01)


def test_the_settings_of_a_plan_choose_as_it_did_and_a_record_prices_it() -> None:
    """Plans go from process to process as settings, runs into files with what they ran by."""
    for model, size, count, requests in (("opt-1.3b", 10, 7, 67), ("llama-3-70b", 64, 6, 768)):
        plan = planned(model, size, count, requests)
        fixed = json.loads(json.dumps(fixed_by(plan.policy)))
        again = planned(model, size, count, requests, **fixed)
        assert again.policy.few_in_codes == plan.policy.few_in_codes == (model == "llama-3-70b")
        record = {"model": model, **fixed, "prompt_lens": [512] * 60, "output_lens": [32] * 60}
        for few_in_codes in (True, False):
            told = json.loads(json.dumps({**record, "few_in_codes": few_in_codes}))
            assert plan_of(told, machine()).policy.few_in_codes == few_in_codes
        assert plan_of(record, machine()).policy.few_in_codes, "older runs were in codes"
