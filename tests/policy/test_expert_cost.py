"""What the cost and the memory of a plan know of experts: all of them cross the link, a token goes through few, and
tokens together through as many as they hit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from flexbatch.policy.affine import point_of
from flexbatch.policy.cost import PassModel
from flexbatch.policy.curve import Curve
from flexbatch.policy.decode_graphs import LAUNCHES_OF_EXPERTS
from flexbatch.policy.expert_shape import ExpertShape
from flexbatch.policy.expert_traffic import product_seconds
from flexbatch.policy.explain import explain, summary
from flexbatch.policy.footprint import memory_rows, spread_weights
from flexbatch.policy.hardware import Hardware, load_hardware
from flexbatch.policy.launches import KERNELS_OF_TICK
from flexbatch.policy.limits import EXPERT_TILES, hit_expert_tokens
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.optimizer import choose
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.policy import Constraints, Policy, Split
from flexbatch.policy.shapes import SHAPES, public_shape
from flexbatch.policy.units import GIB
from flexbatch.policy.workload import Workload

ROOT = Path(__file__).resolve().parents[2]
WITH_EXPERTS = [name for name in SHAPES if public_shape(name).experts is not None]


def model_of(shape: ModelShape, sequences: float, weights: Split, bits: int = 16) -> PassModel:
    policy = Policy(weights, Split(1, 0), Split(1, 0), 100, 2, weight_bits=bits, prefill_chunk=64)
    return PassModel(shape, load_hardware("h200"), policy, PassLoad.decode(sequences, 600))


def work_of(model: PassModel, weights: Split) -> dict[str, float]:
    return {name: float(value) for name, value in model.resource_work(point_of(model.policy)).items()}


@pytest.mark.parametrize(("count", "top_k"), [(128, 8), (8, 2), (64, 1), (6, 6)])
def test_experts_that_are_hit_are_those_of_random_choices(count: int, top_k: int) -> None:
    generator = np.random.default_rng(0)
    for tokens in (1, 5, 40):
        draws = [
            len({expert for _ in range(tokens) for expert in generator.permutation(count)[:top_k]}) for _ in range(300)
        ]
        assert float(ExpertShape(count, top_k, 4).hit(tokens)) == pytest.approx(np.mean(draws), rel=0.03)
    assert ExpertShape(count, top_k, 4).hit(0) == 0 and ExpertShape(count, top_k, 4).rows(1) == 1


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_every_expert_crosses_the_link_and_few_are_computed(name: str) -> None:
    shape, off = public_shape(name), Split(0, 1)
    work = work_of(model_of(shape, 200, off), off)
    sparse = shape.num_layers - shape.dense_layers
    weights = sparse * shape.block_bytes(16) + shape.dense_layers * shape.dense_bytes(16) + 2 * shape.head_elements
    assert work["h2d"] == pytest.approx(weights, rel=0.001)
    products = 2 * 200 * (shape.active_elements + shape.head_elements)
    attention = 200 * 600 * 4 * shape.num_heads * shape.head_dim * shape.num_layers
    assert work["gpu_compute"] == pytest.approx(products + attention, rel=1e-6)
    assert shape.active_elements < 0.35 * shape.total_elements


def test_few_tokens_read_few_of_the_experts_that_are_resident() -> None:
    shape, here = public_shape("qwen3-30b-a3b"), Split(1, 0)
    few, many = (work_of(model_of(shape, sequences, here), here)["gpu_memory"] for sequences in (2, 400))
    # Two micro-batches of one token each: top_k experts each.
    read = 2 * 2 * (shape.active_elements + shape.head_elements)
    assert read < few < 1.1 * read
    assert many > 2 * (shape.total_bytes(16) - 2 * sum(shape.embedding_tensors))


def test_products_take_longer_with_each_token_and_no_longer_than_dense_ones() -> None:
    """A dense model of the same bytes does 16 times as many operations."""
    shape, here = public_shape("qwen3-30b-a3b"), Split(1, 0)
    dense = dataclasses.replace(shape, experts=None)
    seconds = [float(model_of(shape, n, here).stages[0].seconds["gpu_compute"][0]) for n in (1, 20, 400, 8000)]
    beside = [float(model_of(dense, n, here).stages[0].seconds["gpu_compute"][0]) for n in (1, 20, 400, 8000)]
    assert seconds == sorted(seconds) and all(a <= b * 1.3 for a, b in zip(seconds, beside, strict=True))
    assert seconds[-1] < 0.5 * beside[-1]


def test_layers_of_experts_cost_a_gpu_what_routes_too() -> None:
    """By the kernels beside those of a layer: graphs of DeepSeek-V2-Lite were planned 1.1 ms too short without."""
    shape, here, load = public_shape("olmoe-1b-7b"), Split(1, 0), PassLoad.decode(100, 600)
    policy = Policy(here, here, here, 100, 2, prefill_chunk=64)
    dense = dataclasses.replace(shape, experts=None)

    def of_pass(shape: ModelShape, seconds: float) -> float:
        model = PassModel(shape, dataclasses.replace(load_hardware("h200"), graph_seconds=seconds), policy, load)
        return float(model.resource_seconds(point_of(policy))["gpu_compute"])

    more, beside = (of_pass(each, 1e-3) - of_pass(each, 0.0) for each in (shape, dense))
    assert beside == pytest.approx(2e-3 * (shape.num_layers + 1))
    routing = LAUNCHES_OF_EXPERTS / KERNELS_OF_TICK
    assert more == pytest.approx(2e-3 * (shape.num_layers * (1 + routing) + 1))


def test_products_take_as_long_as_was_measured() -> None:
    """Of codes nearly three times as long as dense ones, where an expert has many rows; processors have no such
    kernels."""
    hardware, errors = load_hardware("h100"), []
    measured = json.loads((ROOT / "benchmark/results/expert_kernels-h100.json").read_text())["rows"]
    weights = {"qwen3-30b-a3b": 2048 * 768, "mixtral": 4096 * 14336, "gpt-oss-120b": 2880 * 2880}
    counts = {"qwen3-30b-a3b": 128, "mixtral": 8, "gpt-oss-120b": 128}
    for row in measured:
        if row["way"] == "triton":
            bits = {"mxfp4": 4}.get(row["form"]) or int(row["form"])
            tokens = np.asarray(row["tokens"])
            each = product_seconds(hardware, 3 * weights[row["shape"]], tokens, bits, 2, even=True)
            errors.append(float(each) * counts[row["shape"]] / row["us"] * 1e6 - 1)
    assert len(errors) > 40 and np.median(np.abs(errors)) < 0.08 and max(map(abs, errors)) < 0.35
    alike = dataclasses.replace(hardware, device="cpu")
    rows, dense = np.array([1.0, 300.0]), hardware.gemm_seconds(1e6, np.array([1.0, 300.0]))
    assert (product_seconds(alike, 1e6, rows, 4, 2) == dense).all()
    assert (product_seconds(hardware, 1e6, rows, 4, 2) < [dense[0], 4 * dense[1]]).all()
    # gpt-oss-120b with random weights, whose routers are uneven: on an H200 the two kernels took 3.97 ms.
    uneven = product_seconds(hardware, 128 * 3 * 2880**2, np.asarray(2737 * 4 / 128), 4, 2)
    assert float(uneven) == pytest.approx(3.97e-3, rel=0.1)
    assert pytest.importorskip("flexbatch.kernels.expert_products").TOKENS == EXPERT_TILES
    one_rate = dataclasses.replace(hardware, gemm=Curve((1.0,), (1e15,)), gpu_bandwidth=1e30)
    assert float(product_seconds(one_rate, 1e6, np.asarray(10.0), 4, 2)) == pytest.approx(2e-8)


def test_layers_without_experts_have_their_own_bytes() -> None:
    shape = dataclasses.replace(public_shape("olmoe-1b-7b"), dense_layers=3, dense_tensors=(100_000_000, 7_000_000))
    assert shape.total_elements == (
        13 * shape.block_elements + 3 * 107_000_000 + shape.head_elements + sum(shape.embedding_tensors)
    )
    off = Split(0, 1)
    model = model_of(shape, 100, off)
    assert [(stage.name, stage.count) for stage in model.stages] == [
        ("layer", 12),
        ("dense layer", 3),
        ("last layer", 1),
        ("head", 1),
        ("first pages", 1),
    ]
    expected = 13 * shape.block_bytes(16) + 3 * shape.dense_bytes(16) + 2 * shape.head_elements
    assert work_of(model, off)["h2d"] == pytest.approx(expected, rel=0.001)
    realized, largest, _ = spread_weights(shape, off)
    assert realized.cpu == pytest.approx(1) and largest == shape.block_bytes(16)


def test_shape_with_experts_comes_back_from_json() -> None:
    shape = public_shape("mixtral-8x7b")
    assert ModelShape.from_dict(json.loads(json.dumps(shape.as_dict()))) == shape


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_split_is_met_by_parts_of_a_layer(name: str) -> None:
    shape = public_shape(name)
    realized, largest, _ = spread_weights(shape, Split(0.3, 0.7))
    assert abs(realized.gpu - 0.3) < 0.01
    assert largest < 0.9 * shape.largest_layer_bytes(16)


def test_workspace_has_the_routed_rows() -> None:
    shape, hardware = public_shape("qwen3-30b-a3b"), load_hardware("h200")
    policy = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 100, 1, prefill_chunk=512, prefill_budget=1024)
    workload = Workload.from_lengths(np.full(50, 512), np.full(50, 32))
    rows = memory_rows(shape, hardware, workload, policy)["gpu"]["workspace"][0]
    routed = 8 * (2 * 2048 + 4 * 768) * 2
    assert rows / (100 + 1024) > routed


def test_a_plan_tells_of_its_experts() -> None:
    workload = Workload.uniform(512, 128)
    hardware = load_hardware("h200").with_memory(gpu=24 * GIB, cpu=116 * GIB)
    constraints = Constraints(gpu_batch_size=500, num_gpu_batches=2)
    plan = choose(public_shape("qwen3-30b-a3b"), hardware, workload, constraints)
    text, found = explain(plan), summary(plan)["experts"]
    assert "8 of 128 for each token, which goes through 3.04 of 30.53 billion weights" in text
    assert "whichever experts it needs" in text
    assert found["count"] == 128 and found["share_of_weights"] == pytest.approx(0.95, abs=0.01)
    assert found["reached"] > 120
    assert 500 < plan.predicted_tokens_per_second < 1900
    dense = summary(choose(public_shape("opt-1.3b"), hardware, workload, constraints))
    assert dense["experts"] is None


def with_cpu_experts(rate: float, gpu: int = 24, cpu: int = 116) -> Hardware:
    """Memory's speed for a few rows, and the products' from 16 on."""
    hardware = load_hardware("h200").with_memory(gpu=gpu * GIB, cpu=cpu * GIB)
    curve = Curve((1.0, 4.0, 16.0, 64.0), (rate, rate, rate / 2, rate / 8))
    return dataclasses.replace(hardware, cpu_experts=curve, cpu_experts_8=curve, cpu_experts_4=curve)


def test_cpu_experts_are_planned_where_they_pay() -> None:
    """Weights that fill the host leave small blocks: experts have few rows, and link and CPU add up."""
    shape, workload = public_shape("qwen3-235b-a22b"), Workload.uniform(32, 256)
    constraints = Constraints(weight_bits=(4,), gpu_batch_size=30, num_gpu_batches=2)
    plain = choose(shape, with_cpu_experts(1e11), workload, dataclasses.replace(constraints, cpu_experts=0.0))
    plan = choose(shape, with_cpu_experts(1e11), workload, constraints)
    assert 0.1 < plan.policy.cpu_experts <= 1 and plain.policy.cpu_experts == 0
    assert plan.predicted_tokens_per_second > 1.3 * plain.predicted_tokens_per_second
    assert "experts of each layer, the least used, which the CPU computes" in explain(plan)
    assert "CPU experts" in explain(plan) and summary(plan)["experts"]["on_cpu"] > 10
    slow = choose(shape, with_cpu_experts(1e9), workload, constraints)
    assert slow.policy.cpu_experts < 0.1


def test_a_machine_without_measured_experts_leaves_none_to_the_cpu() -> None:
    constraints = Constraints(weight_bits=(4,), gpu_batch_size=30, num_gpu_batches=2)
    measured = load_hardware("h200").with_memory(gpu=24 * GIB, cpu=116 * GIB)
    job = public_shape("qwen3-235b-a22b"), Workload.uniform(32, 256)
    shares = [
        choose(job[0], hardware, job[1], constraints).policy.cpu_experts
        for hardware in (dataclasses.replace(measured, cpu_experts=None), measured)
    ]
    assert shares[0] == 0 < shares[1]


def test_passes_of_few_tokens_bring_what_they_hit() -> None:
    """And their products wait for it; plans of jobs know it of their tails."""
    shape, off = public_shape("qwen3-30b-a3b"), Split(0, 1)
    limit = hit_expert_tokens(128, 8)
    assert limit == 18 and hit_expert_tokens(8, 2) == 4 and hit_expert_tokens(6, 6) == 0
    few, more = (model_of(shape, tokens, off) for tokens in (limit, limit + 1))
    experts, share = 48 * shape.expert_bytes(16), float(shape.experts.hit(limit)) / 128
    assert 0.65 < share < 0.7
    assert work_of(more, off)["h2d"] - work_of(few, off)["h2d"] == pytest.approx((1 - share) * experts, rel=1e-3)
    waiting = share * experts / load_hardware("h200").gather
    point = point_of(few.policy)
    assert float(few.resource_seconds(point)["gpu_compute"]) > waiting
    assert float(more.resource_seconds(point)["gpu_compute"]) < 0.2 * waiting
    assert float(few.pass_seconds(point)) < 0.9 * float(more.pass_seconds(point))
    alone = PassModel(shape, load_hardware("h200"), few.policy, few.load, hits=False)
    assert float(alone.pass_seconds(point)) == pytest.approx(float(more.pass_seconds(point)), rel=0.02)
    # What the CPU computes of them is brought by nobody.
    policy = dataclasses.replace(few.policy, cpu_experts=1.0)
    none = PassModel(shape, load_hardware("h200"), policy, few.load)
    others = float(none.resource_work(point_of(policy))["h2d"]) - 48 * limit * 8 * 2048 * 2
    assert others == pytest.approx(work_of(few, off)["h2d"] - share * experts, rel=1e-3)


def test_a_bound_holds_for_jobs_of_few_and_of_many() -> None:
    shape, hardware = public_shape("qwen3-30b-a3b"), load_hardware("h200").with_memory(24 * GIB, 100 * GIB)
    for count in (8, 400):
        plan = choose(shape, hardware, Workload.from_lengths(np.full(count, 64), np.full(count, 16)), Constraints())
        assert 0 < plan.predicted_tokens_per_second <= plan.machine_bound_tokens_per_second


def test_cpu_experts_share_the_cores_with_attention() -> None:
    """And spare the link what they read; passes of many tokens leave them nothing."""
    shape, half = public_shape("qwen3-30b-a3b"), Split(0, 1)
    policy = Policy(half, Split(0, 1), Split(1, 0), 100, 2, cpu_attention=1.0, cpu_experts=0.5)

    def rows(policy: Policy, load: PassLoad) -> tuple[dict[str, float], dict[str, float]]:
        model = PassModel(shape, with_cpu_experts(1e11), policy, load)
        point = point_of(policy)
        return tuple(
            {name: float(value) for name, value in found.items()}
            for found in (model.resource_seconds(point), model.resource_work(point))
        )

    few, without = PassLoad.decode(200, 600), dataclasses.replace(policy, cpu_experts=0.0)
    (seconds, work), (plain_seconds, plain_work) = rows(policy, few), rows(without, few)
    experts = 48 * shape.expert_bytes(16) / 2
    exchanged = 48 * 200 * 8 * 2048 * 2 / 2
    assert plain_work["h2d"] - work["h2d"] == pytest.approx(experts - exchanged, rel=1e-6)
    assert seconds["cpu_attention + cpu_experts"] == pytest.approx(seconds["cpu_attention"] + seconds["cpu_experts"])
    assert seconds["cpu_attention"] == plain_seconds["cpu_attention"] and plain_seconds["cpu_experts"] == 0
    hit = float(shape.experts.hit(100))
    assert work["cpu_experts"] == pytest.approx(2 * experts * hit / 128)
    many = few + PassLoad.prefill(20, 512)
    assert rows(policy, many)[1]["h2d"] == pytest.approx(rows(without, many)[1]["h2d"])
    assert rows(policy, many)[0]["cpu_experts"] == 0
