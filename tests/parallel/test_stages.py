"""How layers are shared out among the stages of a pipeline, what each stage has, and what is planned for it."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.models.arch import Arch
from flexbatch.models.dummy import dummy
from flexbatch.models.shapes import shape
from flexbatch.models.specs import weight_specs
from flexbatch.models.stage import RankStage, shared_out_by_cost, stage_of, staged
from flexbatch.planner.planner import Planner
from flexbatch.planner.problem import model_shape
from flexbatch.planner.stages import stages_of
from flexbatch.validation.errors import ConfigurationError

LAYERS = st.lists(st.integers(1, 9).map(float), min_size=1, max_size=8)


@given(outside=st.integers(0, 20).map(float), layers=LAYERS, stages=st.integers(1, 5))
def test_the_dearest_stage_is_as_cheap_as_can_be(outside, layers, stages):
    count = len(layers)
    if count < stages:
        with pytest.raises(ConfigurationError, match=f"{count} layers, and every stage needs one at least; give at"):
            shared_out_by_cost(outside, layers, stages)
        return
    found = shared_out_by_cost(outside, layers, stages)

    def dearest(ends: tuple[int, ...]) -> float:
        costs = [sum(layers[first:end]) for first, end in zip((0, *ends), (*ends, count), strict=True)]
        return max([costs[0] + outside, *costs[1:]])

    assert [each.first for each in found] == [0, *(each.end for each in found[:-1])] and found[-1].end == count
    assert all(each.first < each.end for each in found)
    best = min(map(dearest, combinations(range(1, count), stages - 1)))
    assert dearest(tuple(each.end for each in found[:-1])) == best


@pytest.mark.parametrize(
    ("name", "count", "layers"),
    [
        ("llama-3-8b", 2, [14, 18]),  # the head is as much as two and a half layers, and so are bytes of the embedding
        ("llama-3-70b", 4, [19, 20, 20, 21]),
        ("opt-30b", 2, [24, 24]),
        ("opt-125m", 3, [1, 5, 6]),  # one table is both, of 5.5 layers
        ("deepseek-v3", 4, [16, 15, 15, 15]),  # three dense layers come first
    ],
)
def test_layers_are_shared_out_by_cost_and_not_by_count(name, count, layers):
    found = stages_of(shape(name), count, 16, 2, {})
    assert [each.end - each.first for each in found] == layers


@pytest.mark.parametrize("name", ["opt-350m", "gpt-oss-20b", "deepseek-v2-lite"])
def test_stages_together_have_the_tensors_of_the_model(name):
    arch, seen = shape(name), set()
    whole = {(spec.layer, spec.role): spec.shape for spec in weight_specs(arch)}
    for stage in stages_of(arch, 3, 16, 2, {}):
        part = stage_of(arch, stage)
        here = {key: found for key in whole if (found := stage.here(*key, arch.num_layers)) is not None}
        assert {found: whole[key] for key, found in here.items()} == {
            (spec.layer, spec.role): spec.shape for spec in weight_specs(part)
        }
        assert not seen & here.keys()
        seen |= here.keys()
        for layer in range(part.num_layers):
            for what in ("window", "rotates", "uses_local_rope", "experts_of"):
                assert getattr(part, what)(layer) == getattr(arch, what)(stage.first + layer), what
    assert seen == whole.keys()


def test_pieces_of_all_stages_are_the_model():
    arch = Arch("llama", 3, 8, 2, 1, 4, 13, 11, 9, rotary_dim=4)
    whole, found = {(piece.layer, piece.role): piece.tensor for piece in dummy(arch)}, {}
    for stage in (RankStage(0, 2, 0, 1), RankStage(1, 2, 1, 3)):
        for piece in staged(dummy(arch), stage, arch.num_layers):
            ends = piece.layer if piece.layer < 0 else min(piece.layer + stage.first, arch.num_layers)
            found[3 if stage.is_first and piece.layer == 1 else ends, piece.role] = piece.tensor
    assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)


REFUSED = [
    (
        {"cpu_experts": 50.0},
        "only an engine of one GPU leaves experts to them; leave cpu_experts out, or tensor_parallel",
    ),
    ({"recalibrate": True}, "with pipeline_parallel_size=2 leave it out"),
    ({"pipeline_parallel_size": 49}, "this model has 48 layers, and every stage needs one at least; give at most 48"),
]


@pytest.mark.parametrize(("settings", "problem"), REFUSED)
def test_what_is_refused_is_refused_by_name(settings, problem):
    settings = {"pipeline_parallel_size": 2, **settings}
    config = EngineConfig(model="opt-30b", dummy_weights=True, hardware="h200", **settings)
    with pytest.raises(ConfigurationError, match=problem):
        Planner(config, dry=True)


def planned(stages: int, **settings: object) -> Planner:
    config = EngineConfig(
        model="opt-30b",
        dummy_weights=True,
        hardware="h200",
        gpu_memory="24GiB",
        cpu_memory="120GiB",
        pipeline_parallel_size=stages,
        **settings,  # type: ignore[arg-type]
    )
    return Planner(config, Job.alike(184, 512, 32, 2048), dry=True)


def test_a_pipeline_is_planned_for_its_slowest_stage_and_the_memory_of_all():
    sizes = {"gpu_batch_size": 23, "prefill_budget": 512, "prefill_chunk": 512, "cpu_attention": 0.0}
    sizes |= {"percent": (20, 80, 0, 100, 100, 0)}
    one, two = planned(1, num_gpu_batches=4, **sizes), planned(2, num_gpu_batches=2, **sizes)
    before, after = one.engine_plan, two.engine_plan
    assert before.plan is not None and after.plan is not None
    assert after.block_policy.block_size == before.policy.block_size == 92
    # Both blocks hold the same sequences, and every rank half of the layers of them.
    job = Job.alike(184, 512, 32, 2048)
    cache = {
        found: sum(row.num_bytes for row in plan.requirements(plan.sizes(job)) if row.what == "cache")
        for found, plan in ((1, before), (2, after))
    }
    assert cache[1] == 2 * cache[2] > 0
    told = after.plan
    assert told.shape.stages == 2 and told.num_sequences == 184 and told.seconds is not None
    # A pass has half of the weights and a quarter of the cache: half of the sequences over half of the layers.
    assert told.passes == pytest.approx(2 * before.plan.passes, rel=0.1)
    assert 1 / 4 < told.pass_seconds / before.plan.pass_seconds < 1 / 2
    tokens = told.predicted_tokens_per_second * told.seconds
    assert tokens == pytest.approx(184 * 32, rel=0.01)
    fill = told.seconds - told.passes * told.pass_seconds
    assert fill == pytest.approx(told.pass_seconds, rel=1e-6)


def test_the_shape_of_a_stage_without_ends_has_no_head():
    arch = shape("llama-3-8b")
    first, last = (model_shape("x", stage_of(arch, stage), 2) for stage in stages_of(arch, 2, 16, 2, {}))
    assert first.head_tensors and first.embedding_tensors and not last.head_tensors and not last.embedding_tensors
    whole = model_shape("x", arch, 2)
    assert first.total_bytes(16) + last.total_bytes(16) == whole.total_bytes(16)
