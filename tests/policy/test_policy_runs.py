"""The runner of the settings: what it writes can be priced, a cut run goes on, neighbors are distinct and fit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time

import pytest

from benchmark import host_load, pass_errors, policy_neighbors, policy_runs
from benchmark.observed import PassLog
from benchmark.policy_error import plan_of
from benchmark.policy_settings import EXPERTS, FEW_LAYERS, NEIGHBORHOODS, SETTINGS, Setting
from flexbatch.models.shapes import SHAPES
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import public_shape

TINY = Setting(
    "tiny",
    (0.003, 0.003),
    6,
    (20, 40),
    (3, 6),
    {"device": "cpu", "dtype": "float32", "gpu_batch_size": 2, "num_gpu_batches": 2},
)


SMALL = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def run(monkeypatch, tmp_path, names, *extra, table=None):
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["opt-125m"] | SMALL)
    monkeypatch.setattr(policy_runs, "SETTINGS", table or {"tiny": TINY})
    monkeypatch.setattr(policy_runs, "NEIGHBORHOODS", table or {"tiny": TINY})
    monkeypatch.setattr(
        "sys.argv",
        ["policy_runs", str(tmp_path / "runs.jsonl"), "--hardware", "cpu", "--child", "--only", *names, *extra],
    )
    code = policy_runs.main()
    return code, [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]


def test_what_was_predicted_is_what_the_plan_said_before_the_job(monkeypatch, tmp_path):
    """An engine whose passes differ from its plan compares others: one drawn job was recorded as 23 % off by what had
    been made of its plan meanwhile, which was right to 0.4 %."""
    record = PassLog.record

    class Replanned:
        predicted_tokens_per_second, passes = -1.0, -1

        def __init__(self, plan):
            self.plan = plan

        def __getattr__(self, name):
            return getattr(self.plan, name)

    def replanned(self, load, seconds):
        record(self, load, seconds)
        self.plan = Replanned(self.plan)

    monkeypatch.setattr(PassLog, "record", replanned)
    _, (run_record,) = run(monkeypatch, tmp_path, ["tiny"])
    assert run_record["predicted_then"] > 0 and run_record["predicted_passes"] == len(run_record["passes"])


def test_a_run_is_recorded_with_what_prices_it(monkeypatch, tmp_path):
    code, (record,) = run(monkeypatch, tmp_path, ["tiny"])
    assert code == 0 and "error" not in record
    assert record["prompt_lens"] == [prompt for prompt, _ in TINY.lengths()] and len(set(record["prompt_lens"])) > 1
    plan = plan_of(record, load_hardware("cpu"))
    assert plan.policy.block_size == 4 and not plan.missing
    assert plan.predicted_tokens_per_second == pytest.approx(record["predicted_then"], rel=0.02)
    passes = record["passes"]
    assert record["predicted_passes"] == plan.passes == len(passes)
    kinds = list(pass_errors.kinds_of(record, load_hardware("cpu")))
    assert [each.kind for each in kinds] == ["decode", "mixed"] and sum(each.count for each in kinds) == len(passes)
    whole = sum(each.count * each.measured for each in kinds)
    assert whole == pytest.approx(sum(each["seconds"] for each in passes))
    assert all(each.predicted > each.host + each.launching > 0 for each in kinds)
    # Every prompt token went in once, and every generated token but the first of each request came from a decode pass.
    assert sum(each["load"][2] for each in passes) == sum(record["prompt_lens"])
    assert sum(each["load"][0] for each in passes) == sum(record["output_lens"]) - len(record["output_lens"])
    assert 0 < sum(each["seconds"] for each in passes) <= record["seconds"]  # a busy machine holds it up between passes
    assert all(0 < each.quarter <= max(one["seconds"] for one in passes) for each in kinds)
    assert record["host"]["own_cores"] > 0 and "cores busy" in pass_errors.counts(record, load_hardware("cpu"))
    # Of late passes one in four is timed.
    timed = [each["busy"] for each in passes if each["busy"]]
    assert timed and all(busy["gpu_compute"] > 0 for busy in timed)


def test_what_others_do_on_a_host_is_told_from_what_is_measured(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    ticks = os.sysconf("SC_CLK_TCK")
    clock, own = iter([100.0, 110.0]), iter([5.0, 25.0])
    monkeypatch.setattr(host_load, "STAT", stat)
    monkeypatch.setattr(host_load.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(host_load, "own_seconds", lambda: next(own))
    stat.write_text(f"cpu {100 * ticks} 0 0 {900 * ticks} 7 0 0 {10 * ticks} 0 0\ncpu0 1\n")
    load = host_load.HostLoad()
    stat.write_text(f"cpu {130 * ticks} {5 * ticks} {15 * ticks} {990 * ticks} 9 0 0 {15 * ticks} 0 0\ncpu0 1\n")
    found = load.report()
    assert (found["own_cores"], found["other_cores"], found["stolen_cores"]) == (2.0, 3.0, 0.5)
    monkeypatch.setattr(host_load, "STAT", tmp_path / "none")
    assert host_load.busy_seconds() == (0.0, 0.0)


def test_what_a_job_set_up_is_told_apart_from_its_error():
    run = {
        **{"name": "one", "model": "opt-1.3b", "percent": [100, 0, 100, 0, 100, 0], "passes": [{"seconds": 3.0}]},
        **{"gpu_batch_size": 8, "num_gpu_batches": 1, "prompt_lens": [50] * 8, "output_lens": [8] * 8},
        **{"seconds": 5.0, "set_up": {"compiled_kernels": {"count": 2, "seconds": 1.0}}},
    }
    machine = load_hardware("h100")
    predicted = plan_of({**run, "tokens_per_second": 1.0}, machine).predicted_tokens_per_second
    run["tokens_per_second"] = 0.8 * predicted
    assert pass_errors.job_error(run, machine) == pytest.approx(0.25)
    assert pass_errors.job_error(run, machine, beside_set_up=True) == pytest.approx(0.0)
    assert "2.00 s outside of passes (set-up: compiled_kernels 2: 1.00 s); throughput +25.0%, " in (
        pass_errors.counts(run, machine)
    )
    assert pass_errors.summary([run], machine) == (
        "1 jobs: throughput 25.0% median, 25.0% worst; beside set-up 0.0% median, 0.0% worst"
    )


def test_passes_are_told_apart_as_the_engine_runs_them():
    """On the GPU whole: one graph, pieces up to a number of tokens, and kernel by kernel; of each what its own passes
    launch."""
    loads = [(8, 80, 0, 0, 0, 0), (8, 80, 100, 0, 5000, 1), (8, 80, 5000, 0, 9e6, 1)]
    passes = [{"load": load, "seconds": 0.01, "busy": {}} for load in loads]
    run = {
        **{"name": "one", "model": "opt-1.3b", "percent": [100, 0, 100, 0, 100, 0], "passes": passes, "graphs": 4},
        **{"gpu_batch_size": 8, "num_gpu_batches": 1, "prompt_lens": [5000] * 8, "output_lens": [8] * 8},
        **{"prefill_budget": 5000, "piece_tokens": 2048},
    }
    machine = dataclasses.replace(load_hardware("h100"), piece_seconds=2e-4)
    kinds = {each.kind: each for each in pass_errors.kinds_of(run, machine)}
    assert list(kinds) == ["graph", "pieces", "mixed"] and all(each.count == 1 for each in kinds.values())
    launched = {kind: each.launching for kind, each in kinds.items()}
    # Of pieces the first, too, while the GPU has nothing to do.
    wanted = {"graph": 0.0, "pieces": 26 * 2e-4, "mixed": 25 * machine.launch_seconds}
    assert launched == {kind: pytest.approx(seconds, abs=1e-9) for kind, seconds in wanted.items()}
    without = [each.kind for each in pass_errors.kinds_of({**run, "piece_tokens": 0}, machine)]
    assert without == ["graph", "mixed"]


def test_an_error_is_recorded_and_the_rest_goes_on(monkeypatch, tmp_path):
    table = {
        "unknown": Setting("no-such-model", (1, 1), 2, (8, 8), (2, 2)),
        "slow": Setting(**{**TINY.__dict__, "limit_seconds": 0.05}),
        "tiny": TINY,
    }
    code, records = run(monkeypatch, tmp_path, list(table), table=table)
    assert code == 0 and [record["name"] for record in records] == list(table)
    assert (
        "no-such-model" in records[0]["error"]
        and "limit" in records[1]["error"]
        and records[2]["tokens_per_second"] > 0
    )


def test_a_cut_run_goes_on_with_what_is_missing(monkeypatch, tmp_path):
    asked = []

    class Child:
        returncode = 0

        def __init__(self, command, env):
            names = command[command.index("--only") + 1 :]
            asked.append(names)
            policy_runs.append(tmp_path / "runs.jsonl", {"name": names[0]})

        def poll(self):
            return 0

    policy_runs.append(tmp_path / "runs.jsonl", {"name": next(iter(SETTINGS))})
    monkeypatch.setattr(policy_runs.subprocess, "Popen", Child)
    monkeypatch.setattr(policy_runs, "machine", dict)
    monkeypatch.setattr("sys.argv", ["policy_runs", str(tmp_path / "runs.jsonl")])
    assert policy_runs.main() == 0
    assert asked[0] == list(SETTINGS)[1:] and asked[1] == list(SETTINGS)[2:]
    assert sorted(policy_runs.recorded(tmp_path / "runs.jsonl")) == sorted(SETTINGS)


def test_planned_settings_run_the_shortest_first(monkeypatch, tmp_path):
    """Plans are made in other processes. A setting that is refused there is run all the same, after the others."""
    table = {
        "refused": Setting("opt-1.3b", (0.1, 0.1), 5, (8, 8), (2, 2)),
        "long": Setting("opt-1.3b", (8, 8), 701, (64, 128), (32, 32)),
        "short": Setting("opt-1.3b", (8, 8), 7, (64, 128), (4, 4)),
    }
    monkeypatch.setattr(policy_runs, "SETTINGS", table)
    monkeypatch.setattr(policy_runs, "machine", dict)
    ran = []
    monkeypatch.setattr(policy_runs, "drive", lambda names, arguments: ran.extend(names))
    plans = tmp_path / "plans.json"
    command = ["policy_runs", str(tmp_path / "runs.jsonl"), "--hardware", "h100"]
    monkeypatch.setattr("sys.argv", [*command, "--plan", str(plans), "--processes", "2"])
    assert policy_runs.main() == 1
    assert sorted(json.loads(plans.read_text())) == ["long", "short"] and not ran
    monkeypatch.setattr("sys.argv", [*command, "--plans", str(plans)])
    assert policy_runs.main() == 0 and ran == ["short", "long", "refused"]


def test_a_process_that_hangs_is_ended(monkeypatch, tmp_path):
    killed = []

    class Child:
        returncode = -9

        def __init__(self, command, env):
            self.code = None

        def poll(self):
            return self.code

        def kill(self):
            killed.append(1)
            self.code = -9

        def wait(self):
            return -9

    clock = iter(range(0, 100000, 40))
    monkeypatch.setattr(policy_runs.subprocess, "Popen", Child)
    monkeypatch.setattr(policy_runs, "machine", dict)
    monkeypatch.setattr(policy_runs.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(policy_runs.time, "sleep", lambda seconds: None)
    names = list(SETTINGS)[:2]
    monkeypatch.setattr(
        "sys.argv", ["policy_runs", str(tmp_path / "runs.jsonl"), "--seconds", "2000", "--only", *names]
    )
    assert policy_runs.main() == 0
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(record["name"], record["error"]) for record in records] == [(name, "hangs") for name in names] and len(
        killed
    ) == 2


def test_neighbors_differ_from_the_policy_and_from_each_other():
    for cache in (Split(0.1, 0.8, 0.1), Split(0, 1)):
        policy = Policy(Split(0.4, 0.6), cache, Split(1, 0), 24, 2, cpu_attention=0.5, prefill_budget=1024)
        found = [other for _, other in policy_neighbors.neighbors(policy)]
        assert len({other for other in found if other != policy}) >= 18
        assert all(other.weights == policy.weights for other in found[:6])


def test_a_neighborhood_runs_every_policy(monkeypatch, tmp_path):
    tiny = Setting(
        **{
            **TINY.__dict__,
            "memory": (0.003, 0.003),
            "num_prompts": 4,
            "gen_len": (2, 2),
            "fixed": {"device": "cpu", "dtype": "float32"},
        }
    )
    _, (record,) = run(monkeypatch, tmp_path, ["tiny"], "--neighbors", table={"tiny": tiny})
    tried = record["tried"]
    assert [each["name"] for each in tried].count("chosen") == 2 and len(tried) == 2 + policy_neighbors.NUM_NEIGHBORS
    assert all(each["gpu_batch_size"] * each["num_gpu_batches"] <= tiny.num_prompts for each in tried), (
        "blocks that no job of so many sequences fills"
    )
    assert (
        len(
            {
                json.dumps(
                    [
                        each[key]
                        for key in ("percent", "gpu_batch_size", "num_gpu_batches", "cpu_attention", "prefill_budget")
                    ]
                )
                for each in tried
            }
        )
        > 5
    )


def test_settings_cover_what_the_model_distinguishes():
    settings = SETTINGS.values()
    assert len(settings) >= 12 and len(NEIGHBORHOODS) == 3
    assert len(EXPERTS) >= 8 and not set(EXPERTS) & set(SETTINGS)
    assert all(public_shape(setting.model).experts for setting in (EXPERTS | FEW_LAYERS).values())
    assert len(FEW_LAYERS) >= 8 and not set(FEW_LAYERS) & set(EXPERTS)
    assert (
        {s.fixed.get("weight_bits", 16) for s in settings}
        == {s.fixed.get("cache_bits", 16) for s in settings}
        == {16, 8, 4}
    )
    assert min(s.prompt_len[0] for s in settings) == 32 and max(s.prompt_len[1] for s in settings) == 1024
    assert max(s.memory[1] for s in settings) < 100


def test_a_time_limit_ends_what_takes_longer():
    with pytest.raises(TimeoutError, match=r"limit of 0\.05 s"), policy_runs.time_limit(0.05):
        time.sleep(2)


def test_a_time_limit_is_seen_through_code_that_changes_errors():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"limit of 0\.05 s") as found, policy_runs.time_limit(0.05):
        try:
            time.sleep(2)
        except TimeoutError:
            raise TypeError("addRow(): incompatible function arguments") from None
    assert isinstance(found.value.__cause__, TypeError)
    with (
        pytest.raises(TimeoutError, match=r"limit of 0\.05 s"),
        policy_runs.time_limit(0.05),
        contextlib.suppress(TimeoutError),
    ):
        time.sleep(2)
    assert time.monotonic() < started + 2


def test_a_time_limit_leaves_other_errors_and_the_timer_alone():
    with pytest.raises(ValueError, match="other"), policy_runs.time_limit(60):
        raise ValueError("other")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("name", FEW_LAYERS)
def test_models_of_few_layers_are_those_but_for_the_number(name):
    setting = FEW_LAYERS[name]
    cut, whole = public_shape(setting.shape), public_shape(setting.model)
    assert cut.num_layers == setting.layers < whole.num_layers and setting.shape != setting.model
    assert cut.experts == whole.experts and cut.block_bytes(16) == whole.block_bytes(16)
