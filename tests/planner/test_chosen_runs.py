"""Runs under chosen policies: the same tokens however little memory there is, and a plan that is compared with the
run, learned from and changed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from unittest.mock import MagicMock

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.planner import tables
from flexbatch.planner.monitor import WARM_UP, WINDOW, PassMeter, PlanMonitor
from flexbatch.planner.report import Statistics
from flexbatch.planner.usage import TIMED_EVERY, TIMED_FIRST, BusySeconds, UsageTracer
from flexbatch.policy.affine import point_of
from flexbatch.policy.card_names import SHIPPED
from flexbatch.policy.cost import PassModel
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.plan import price
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.replan import Replan
from flexbatch.policy.shapes import public_shape
from flexbatch.policy.workload import Workload
from flexbatch.validation.errors import ConfigurationError
from tests.tiny_models import NEW_TOKENS, random_prompts

GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)


def open_tiny(reference, folder, **settings):
    return LLM(str(reference.folder), device="cpu", offload_dir=str(folder), **{"hardware": "cpu", **settings})


@pytest.mark.parametrize(
    ("gpu", "cpu", "on_disk"), [("4MiB", "2MiB", False), ("2400KiB", "1MiB", False), ("1600KiB", "100KiB", True)]
)
def test_tokens_do_not_depend_on_the_memory(gpu, cpu, on_disk, reference, tmp_path):
    model = reference("llama")
    with open_tiny(model, tmp_path, gpu_memory=gpu, cpu_memory=cpu) as llm:
        assert [completion.token_ids for completion in llm.generate(model.prompts, GREEDY)] == model.token_ids
        llm.tiers.check()
        assert llm.engine_plan.plan is not None
        assert (llm.policy.weights.disk + llm.policy.cache.disk > 0) == on_disk


def test_report_compares_the_run_with_its_plan(reference, tmp_path):
    model = reference("llama")
    with open_tiny(model, tmp_path, gpu_memory="1700KiB", cpu_memory="4MiB") as llm:
        llm.generate(model.prompts, dataclasses.replace(GREEDY, max_tokens=24, ignore_eos=True))
        report = llm.report()
    told = tables.job(report)
    assert told in str(report)
    assert (
        report["job"]["predicted_seconds"] > 0 and "the job (10 sequences in" in told and "tokens of an answer" in told
    )
    prediction = report["prediction"]
    assert prediction["passes"] > 0 and prediction["measured_pass_seconds"] > 0
    compute = prediction["resources"]["gpu_compute"]
    assert (
        0 < compute["measured_seconds"] <= prediction["measured_pass_seconds"] * 1.01
        and compute["predicted_seconds"] > 0
    )
    text = tables.prediction(report)
    assert "predicted" in text and "gpu compute" in text and "tokens/s of the job" in text
    share = prediction["measured_tokens_per_second"] / prediction["bound_tokens_per_second"]
    assert share > 0 and f"the run reached {100 * share:.0f} % of it" in text
    assert {name for name, use in prediction["resources"].items() if use["work"]} >= {"h2d", "gpu_compute"}
    assert (
        f"{100 * compute['work'] / compute['measured_seconds'] / compute['ceiling']:.0f}" in text
        and " TFLOP/s" in text
        and " GB/s" in text
    )


def test_work_and_ceilings_of_the_report_are_those_of_the_passes():
    """Weights and gathered pages of every timed pass, at the rates of the machine's profile."""
    meter, _ = metered(1.0)
    resources, hardware = meter.report(1.0)["resources"], meter.plan.hardware
    weights = 48 * meter.plan.shape.block_bytes(16) * 0.8
    assert resources["h2d"]["work"] > 2 * WINDOW * weights
    assert resources["cpu_attention"]["work"] == pytest.approx(
        2 * WINDOW * 48 * 80 * 0.4 * 528 * meter.plan.shape.token_bytes(16)
    )
    assert (
        resources["h2d"]["ceiling"] == hardware.h2d
        and resources["cpu_attention"]["ceiling"] == hardware.cpu_attention.values[0]
    )
    assert 0.8 < resources["h2d"]["work"] / resources["h2d"]["measured_seconds"] / hardware.h2d <= 1.0


def test_small_models_have_no_plan_and_say_nothing(reference, tmp_path):
    model = reference("llama")
    with open_tiny(model, tmp_path, gpu_memory="1GiB", cpu_memory="1GiB", hardware="auto") as llm:
        llm.generate(model.prompts[:2], GREEDY)
        assert llm.engine_plan.plan is None and "prediction" not in llm.report() and not tables.prediction(llm.report())
        assert llm.planner.machine.found is None


def test_a_later_job_is_decided_for_again_around_the_loaded_weights(reference, tmp_path, monkeypatch):
    """Planned for long prompts; those that come are many and short, and weights that move would gain nothing."""
    model = reference("llama")
    with open_tiny(model, tmp_path, gpu_memory="2400KiB", cpu_memory="1MiB") as llm:
        llm.prepare(random_prompts([450] * 20), GREEDY)
        before = llm.policy
        monkeypatch.setattr("flexbatch.planner.planner.could_gain", lambda *arguments: False)
        many = [prompt for prompt in model.prompts if len(prompt) < 20] * 4
        llm.generate(many, GREEDY)
        assert llm.policy.weights == before.weights
        assert llm.policy.block_size > before.block_size


@pytest.mark.slow  # 5 s of processor time
def test_recalibration_writes_the_users_profile_and_refuses_a_shipped_one(reference, tmp_path):
    model, path = reference("llama"), tmp_path / "mine.json"
    path.write_text((SHIPPED / "cpu.json").read_text())
    sampling = dataclasses.replace(GREEDY, max_tokens=24, ignore_eos=True)
    with open_tiny(
        model, tmp_path, gpu_memory="2400KiB", cpu_memory="1MiB", hardware=str(path), recalibrate=True
    ) as llm:
        llm.generate(model.prompts, sampling)
    assert json.loads(path.read_text())["gemm"] != json.loads((SHIPPED / "cpu.json").read_text())["gemm"]
    with pytest.raises(ConfigurationError, match="shipped"):
        open_tiny(model, tmp_path, gpu_memory="2400KiB", cpu_memory="1MiB", hardware="cpu", recalibrate=True)


# What the meter decides

POLICY = Policy(Split(0.2, 0.8), Split(0, 1), Split(1, 0), 40, 2, cpu_attention=0.4, prefill_budget=1000)


def metered(slow_link: float):
    """A meter after a window of decode passes on a machine whose link is slower than planned, and what it said."""
    plan = price(public_shape("opt-30b"), load_hardware("h200"), Workload.uniform(512, 32), POLICY)
    real = dataclasses.replace(
        plan.hardware,
        **{name: getattr(plan.hardware, name) / slow_link for name in ("h2d", "gather", "h2d_during_cpu_attention")},
    )
    load = PassLoad.decode(80, 528)
    model = PassModel(plan.shape, real, POLICY, load)
    seconds, busy = (
        float(model.pass_seconds(point_of(POLICY))),
        {name: float(value) for name, value in model.resource_seconds(point_of(POLICY)).items()},
    )
    meter = PassMeter(plan, lambda: busy)
    said = [meter.record(load, seconds) for _ in range(WARM_UP + 2 * WINDOW)]
    return meter, said


def test_meter_is_silent_near_the_plan():
    meter, said = metered(1.05)
    assert said == [None] * len(said) and meter.passes == 2 * WINDOW


def test_meter_moves_attention_once_when_the_link_is_slow():
    meter, said = metered(4.0)
    changes = [change for change in said if change is not None]
    assert changes and said.index(changes[0]) == WARM_UP + WINDOW - 1
    assert changes[0].cpu_attention > POLICY.cpu_attention and "h2d" in changes[0].reason
    assert (
        meter.report(1.0)["resources"]["h2d"]["measured_seconds"]
        > 3 * meter.report(1.0)["resources"]["h2d"]["predicted_seconds"]
    )
    assert meter.recalibrated(meter.plan.hardware).h2d < meter.plan.hardware.h2d / 3


def test_passes_without_prompts_say_nothing_of_what_prompts_take(monkeypatch):
    """Small products that take three times as long as planned, and a link that takes twice: in the average pass, most
    of whose products are the prompts', the GPU is no more than a little busier, and the link is twice as busy."""
    policy = dataclasses.replace(POLICY, cpu_attention=0.0)
    plan = price(public_shape("opt-30b"), load_hardware("h200"), Workload.uniform(512, 32), policy)
    load = PassLoad.decode(80, 528)
    model = PassModel(plan.shape, plan.hardware, policy, load)
    busy = {name: float(value) for name, value in model.resource_seconds(point_of(policy)).items()}
    busy |= {"gpu_compute": 3 * busy["gpu_compute"], "h2d": 2 * busy["h2d"]}
    told, nothing = [], Replan(80, 1000, 0.0, 0.1, False, "")
    monkeypatch.setattr(
        "flexbatch.planner.monitor.replan", lambda plan, seconds, busy, **_: told.append(busy) or nothing
    )
    meter = PassMeter(plan, lambda: busy)
    for _ in range(WARM_UP + WINDOW):
        meter.record(load, 2 * float(model.pass_seconds(point_of(policy))))
    (found,) = told
    assert 1 < found["gpu_compute"] / plan.resource_seconds["gpu_compute"] < 2
    assert found["h2d"] / plan.resource_seconds["h2d"] == pytest.approx(2, rel=0.1)


def test_the_same_settings_once_more_are_no_replan(monkeypatch):
    """On a machine whose passes now and then take three times as long, every window calls for the same settings."""
    meter, _ = metered(1.0)
    change = Replan(80, 1000, 1.0, 0.1, True, "a reason")
    scheduler, adjust, statistics, replans = MagicMock(), MagicMock(), Statistics(), []
    monkeypatch.setattr("flexbatch.planner.monitor.adjust", adjust)
    half = dataclasses.replace(change, cpu_attention=0.5)
    meter.load, meter.record = MagicMock(), MagicMock(side_effect=[change, None, change, half])
    monitor = PlanMonitor(MagicMock(), meter, statistics, replans)
    for _ in range(4):
        monitor.after_pass(scheduler, MagicMock(), 1.0)
    calls = [call.args for call in adjust.call_args_list]
    assert calls == [(scheduler, 80, 1000, 1.0), (scheduler, 80, 1000, 0.5)]
    assert len(replans) == 2


def test_passes_that_are_not_timed_do_not_count_against_the_plan():
    """Of the resources only what was timed is compared; without any the meter leaves the settings alone."""
    plan = price(public_shape("opt-30b"), load_hardware("h200"), Workload.uniform(512, 32), POLICY)
    load = PassLoad.decode(80, 528)
    model = PassModel(plan.shape, plan.hardware, POLICY, load)
    seconds, busy = (
        float(model.pass_seconds(point_of(POLICY))),
        {name: float(value) for name, value in model.resource_seconds(point_of(POLICY)).items()},
    )
    chance = random.Random(0)
    meter = PassMeter(plan, lambda: busy if chance.random() < 0.3 else None)
    assert [meter.record(load, seconds) for _ in range(WARM_UP + 4 * WINDOW)] == [None] * (WARM_UP + 4 * WINDOW)
    link = meter.report(1.0)["resources"]["h2d"]
    assert link["measured_seconds"] == pytest.approx(link["predicted_seconds"])
    assert 0 < link["measured_seconds"] < 0.9 * meter.passes * busy["h2d"]
    blind = PassMeter(plan, lambda: None)
    assert [blind.record(load, 3 * seconds) for _ in range(WARM_UP + WINDOW)] == [None] * (WARM_UP + WINDOW)


def test_usage_tracer_keeps_sums_and_no_spans():
    tracer = UsageTracer()
    for start in range(3):
        tracer.add("h2d", "copy", start, start + 0.5, 10)
        with tracer.span("tick", "tick"):
            pass
        assert tracer.take() == {"h2d": 0.5} and not tracer._spans
    use = tracer.summary()["h2d"]
    assert (use.spans, use.busy, use.num_bytes, use.wall) == (3, 1.5, 30, 2.5)
    with pytest.raises(ValueError, match="trace is off"):
        tracer.write("x")


def test_usage_tracer_times_one_late_pass_in_four_and_counts_it_as_four():
    now = itertools.count()
    tracer, timed = UsageTracer(clock=lambda: float(next(now))), 0
    busy = BusySeconds(tracer)
    for _ in range(TIMED_FIRST + 100 * TIMED_EVERY):
        tracer.begin_pass()
        with tracer.span("h2d", "copy", 10):
            next(now)
        seconds = busy()
        assert seconds == ({"h2d": 2} if tracer.on else None)
        timed += tracer.on
        assert not tracer._spans
    assert timed == TIMED_FIRST + 100
    use = tracer.summary()["h2d"]
    assert (use.spans, use.busy, use.num_bytes) == (TIMED_FIRST + 100 * TIMED_EVERY, 2 * use.spans, 10 * use.spans)


def test_a_new_job_does_not_count_what_the_last_one_left():
    """Also when its meter begins while passes are not timed."""
    tracer = UsageTracer()
    tracer.add("h2d", "copy", 0.0, 5.0, 10)
    tracer.on = False
    busy = BusySeconds(tracer)
    assert busy() is None
    tracer.on = True
    tracer.add("h2d", "copy", 6.0, 7.0, 10)
    assert busy() == {"h2d": 1.0}


def test_spans_that_end_late_count_as_the_pass_that_they_belong_to():
    """A drain of a pass that was timed as one of four is there when the next is composed, which was not timed."""
    tracer = UsageTracer()
    for _ in range(TIMED_FIRST + TIMED_EVERY):
        tracer.begin_pass()
        if tracer.on and tracer.num_passes > TIMED_FIRST:
            tracer.add("d2h", "drain", 0.0, 1.0, 7)
    use = tracer.summary()["d2h"]
    assert (use.busy, use.num_bytes) == (TIMED_EVERY, 7 * TIMED_EVERY)
