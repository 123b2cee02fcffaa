"""Choosing a policy: what is given stays, what is chosen fits by exact sizes, and more memory never makes it worse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch import LLM
from flexbatch.config import EngineConfig
from flexbatch.execution import block_sizes
from flexbatch.execution.job import Job
from flexbatch.memory.tiers import check_budgets
from flexbatch.memory.weight_plan import plan_weights
from flexbatch.models import families, shapes
from flexbatch.models.specs import weight_specs
from flexbatch.planner import requirements
from flexbatch.planner.choose import choose_policy
from flexbatch.planner.problem import Problem, model_shape, workload_of
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.limits import (
    weight_group,
)
from flexbatch.policy.policy import Split
from flexbatch.validation.errors import ConfigurationError, DoesNotFitError
from tests.tiny_models import FAMILY_CASES

JOB = Job((543,) * 64, (512,) * 64)
TINY = families.read_arch(
    {
        "model_type": "llama", "vocab_size": 307, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "eos_token_id": 2, "bos_token_id": 1,
    }
)  # fmt: skip


def plan(model="opt-6.7b", job=JOB, **given):
    given = {"hardware": "h200", "gpu_memory": "8GiB", "cpu_memory": "40GiB", **given}
    return LLM.plan(EngineConfig(model=model, dummy_weights=True, **given), job)


def exact_needs(arch, dtype, job, cuda=False):
    def needs(policy):
        layout = block_sizes.cache_layout(arch, policy.cache_bits, dtype)
        weights = plan_weights(arch, policy.weights, policy.weight_bits, weight_group(arch.hidden_size), dtype.itemsize)
        return requirements.block_requirements(
            weights, policy, layout, block_sizes.block_sizes(policy, layout, job), dtype, cuda
        )

    return needs


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", ["opt-125m", "llama-3-8b", "falcon-7b", "opt-350m", "qwen3-30b-a3b", "mixtral-8x7b"])
def test_shapes_weigh_what_the_engine_stores(name, bits):
    arch = shapes.shape(name)
    stored = sum(
        tensor.num_bytes
        for tensor in plan_weights(arch, Split(1, 0), bits, weight_group(arch.hidden_size), 2).all_tensors
    )
    shape = model_shape(name, arch, 2)
    assert shape.total_bytes(bits) == pytest.approx(stored, rel=1e-3 if bits == 16 else 0.01)
    if bits == 16:
        assert sum(math.prod(spec.shape) for spec in weight_specs(arch)) == shape.total_elements


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("case", ["qwen2_moe", "glm4_moe", "qwen3_moe-window", "granitemoeshared"])
def test_layers_that_differ_weigh_what_the_engine_stores(case, bits):
    """The first has no experts, or two of three have none."""
    kind, config = FAMILY_CASES[case]
    arch = families.read_arch({"model_type": kind, "vocab_size": 307, **config})
    placed = plan_weights(arch, Split(1, 0), bits, weight_group(arch.hidden_size), 4)
    shape = model_shape(case, arch, 4)
    assert sum(spec.numel for spec in weight_specs(arch)) == shape.total_elements
    # Rows of 60 numbers end with a group of 12: their parameters are a quarter of what the codes take.
    assert shape.total_bytes(bits) == pytest.approx(
        sum(t.num_bytes for t in placed.all_tensors), rel=[0.2, 0][bits == 16]
    )
    assert shape.largest_layer_bytes(16) == max(
        sum(4 * tensor.spec.numel for tensor in layer) for layer in placed.layers
    )


def test_workload_counts_the_token_that_needs_no_row():
    workload = workload_of(Job((12, 7), (5, 7)))
    assert workload.num_sequences == 2 and sorted(workload.lengths) == [(5.0, 8.0), (7.0, 1.0)]


@pytest.mark.parametrize(
    "given_settings",
    [
        {"percent": (10.0, 90.0, 0.0, 100.0, 100.0, 0.0)},
        {"gpu_batch_size": 7},
        pytest.param({"num_gpu_batches": 3}, id="num_gpu_batches", marks=pytest.mark.slow),
        {"cpu_attention": 0.25},
        pytest.param({"prefill_chunk": 48}, id="prefill_chunk", marks=pytest.mark.slow),
        {"prefill_budget": 600},
        pytest.param({"weight_bits": 4}, id="weight_bits", marks=pytest.mark.slow),
        pytest.param({"cache_bits": 8}, id="cache_bits", marks=pytest.mark.slow),
        pytest.param({"overlap": False}, id="overlap", marks=pytest.mark.slow),
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_is_given_stays(given_settings):
    base = {"gpu_batch_size": 16, "num_gpu_batches": 2}
    report = plan(**{**base, **given_settings})
    for name, value in {**base, **given_settings}.items():
        got = tuple(report["percent"]) if name == "percent" else report["policy"][name]
        assert got == pytest.approx(value), name
    assert report["plan"].predicted_tokens_per_second > 0


def test_bits_change_only_where_they_are_allowed():
    base = {"gpu_batch_size": 16, "num_gpu_batches": 2, "prefill_budget": 512, "cpu_attention": 0.5}
    kept, freed = plan(**base), plan(allow_bits=(16, 4), **base)
    assert kept["policy"]["weight_bits"] == 16
    assert freed["policy"]["weight_bits"] == 4
    assert freed["plan"].predicted_tokens_per_second > kept["plan"].predicted_tokens_per_second
    assert plan(allow_bits=(16, 4), weight_bits=8, **base)["policy"]["weight_bits"] == 8


def test_small_jobs_are_not_searched_for():
    job = Job((40,) * 37, (20,) * 37)

    def hardware():
        raise AssertionError("a small job asked for the machine")

    budgets = {"gpu": 2**30, "cpu": 2**30, "disk": 2**30}
    problem = Problem(TINY, EngineConfig(), job, budgets, 4)
    choice = choose_policy(problem, hardware, exact_needs(TINY, torch.float32, job))
    assert choice.plan is None
    assert choice.policy.block_size == 37 and choice.policy.weights == choice.policy.cache == Split(1, 0)


def test_a_block_without_a_budget_is_planned_with_the_prompts_that_its_passes_have():
    """1,009 prompts of 200 tokens are not read in one pass, whose workspace would take 30 GiB and leave no graphs."""
    found = plan("llama-3.1-8b", Job((200,) * 1009, (100,) * 1009), hardware="h100", gpu_memory="44GiB")["plan"]
    assert not found.missing and found.policy.prefill_budget == 0 and found.policy.gpu_batch_size == 1009
    assert found.memory["gpu"]["workspace"] < 2 * 2**30 and found.memory["gpu"]["decode graphs"]


def test_disk_only_when_memory_is_short_and_more_sequences_when_it_grows():
    fixed = {"hardware": "cpu", "device": "cpu", "num_gpu_batches": 2, "prefill_budget": 512}
    job = Job((160,) * 128, (128,) * 128)
    plans = [
        plan("opt-125m", job, gpu_memory="480MiB", cpu_memory=cpu, **fixed) for cpu in ("330MiB", "700MiB", "3GiB")
    ]
    disk = [p["policy"]["weights"]["disk"] + p["policy"]["cache"]["disk"] for p in plans]
    assert disk[0] > 0 and disk[2] == 0 and disk == sorted(disk, reverse=True)
    blocks = [p["policy"]["gpu_batch_size"] for p in plans]
    assert blocks[0] < blocks[2]
    rates = [p["plan"].predicted_tokens_per_second for p in plans]
    assert rates[0] < rates[1] * 1.02 and rates[1] < rates[2] * 1.02


def test_nothing_fits_names_what_is_missing():
    with pytest.raises(DoesNotFitError, match=r"missing[\s\S]*remedies"):
        plan(gpu_memory="100MiB", cpu_memory="200MiB")


def test_unknown_machine_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigurationError, match=r"shipped: .*cpu, h100, h200, l4, .*t4"):
        plan(hardware="abacus")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="missing fields"):
        plan(hardware=str(tmp_path / "broken.json"))


@settings(deadline=None, max_examples=8)
@given(
    gpu=st.integers(50_000, 3_000_000),
    cpu=st.integers(20_000, 3_000_000),
    lengths=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60)), min_size=1, max_size=20),
    micro_batches=st.sampled_from([1, 2, 3]),
    weight_bits=st.sampled_from([16, 4]),
)
def test_what_is_chosen_fits_on_a_tiny_shape(gpu, cpu, lengths, micro_batches, weight_bits):
    job = Job(tuple(prompt + output - 1 for prompt, output in lengths), tuple(prompt for prompt, _ in lengths))
    budgets = {"gpu": gpu, "cpu": cpu, "disk": 2**30}
    problem = Problem(TINY, EngineConfig(num_gpu_batches=micro_batches, weight_bits=weight_bits), job, budgets, 4)
    needs = exact_needs(TINY, torch.float32, job)
    try:
        choice = choose_policy(problem, lambda: load_hardware("cpu"), needs)
    except DoesNotFitError as error:
        assert "does not fit" in str(error) or "no policy" in str(error)
        return
    check_budgets(needs(choice.policy), budgets)
    assert choice.policy.num_gpu_batches == micro_batches and choice.policy.weight_bits == weight_bits


@settings(deadline=None, max_examples=4)
@given(
    model=st.sampled_from(["opt-1.3b", "llama-3-8b", "opt-30b"]),
    hardware=st.sampled_from(["cpu", "h200"]),
    gpu=st.integers(3, 40),
    cpu=st.integers(4, 200),
    batch=st.sampled_from([1, 5, 32]),
)
def test_what_is_chosen_fits_on_public_shapes(model, hardware, gpu, cpu, batch):
    """LLM.plan raises when its own exact check refuses what was chosen: with the engine's table, not the
    optimizer's."""
    try:
        report = plan(
            model,
            hardware=hardware,
            gpu_memory=f"{gpu}GiB",
            cpu_memory=f"{cpu}GiB",
            gpu_batch_size=batch,
            num_gpu_batches=2,
        )
    except DoesNotFitError as error:
        assert "the plan does not fit the memory budgets" not in str(error)
        return
    for tier, budget in report["budgets"].items():
        assert sum(need["num_bytes"] for need in report["memory"] if need["tier"] == tier) <= budget


@pytest.mark.parametrize(
    ("count", "given", "budget"),
    [
        (1000, {"gpu_memory": "74GiB"}, 32768),
        (1000, {"gpu_memory": "61GiB"}, 16384),
        (1000, {"gpu_memory": "58.5GiB"}, 0),
        (1000, {"gpu_memory": "57.5GiB"}, 4096),
        (256, {"gpu_memory": "74GiB"}, 0),
        (1000, {"gpu_memory": "74GiB", "prefill_budget": 2048}, 2048),
        (1000, {"gpu_memory": "140GiB", "hardware": "cpu"}, 0),
    ],
    ids=str,
)
def test_large_jobs_on_a_gpu_read_their_prompts_in_few_passes(count, given, budget):
    """As many prompt tokens a pass as the block leaves memory for; of few requests, and on a CPU, the usual number."""
    given = {"hardware": "h100", "cpu_memory": "40GiB", **given}
    job = Job(tuple(147 + i % 380 for i in range(count)), tuple(20 + i % 380 for i in range(count)))
    found = plan("llama-3-8b", job, **given)["plan"].policy
    assert (found.gpu_batch_size, found.prefill_budget, found.cache.gpu) == (count, budget, 1)
