"""What happens at first use is no part of a job: it comes before, or is counted apart."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.config import EngineConfig
from flexbatch.execution import answer_lengths, set_up
from flexbatch.execution.job import Job
from flexbatch.execution.passes import Passes
from flexbatch.execution.set_up import COMPILED, DECODE_GRAPHS, LOADED, Made, SetUp, load_kernels
from flexbatch.kernels import native
from flexbatch.loop import EngineLoop
from flexbatch.planner.report import Statistics
from flexbatch.policy.policy import Policy, Split

PROMPTS = [{"prompt_token_ids": [7, 8, 9]}, {"prompt_token_ids": [11, 12]}]
SHORT = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
ON_CPU = {"device": "cpu", "hardware": "cpu", "gpu_memory": "64MiB", "cpu_memory": "64MiB"}


@pytest.mark.skipif(native.library() is None, reason="no C compiler")
@pytest.mark.parametrize("known", [True, False])
def test_the_cpus_kernels_are_compiled_before_the_first_pass(known, monkeypatch, caplog):
    """Whether a job is known when the engine starts, or comes later."""
    happened: list[str] = []
    load, run_pass = native._load, EngineLoop.run_pass

    def slow_load(folder):
        happened.append("kernels")
        return load(folder)

    def watched(loop):
        happened.append("pass")
        return run_pass(loop)

    monkeypatch.setattr(native, "_load", slow_load)
    monkeypatch.setattr(EngineLoop, "run_pass", watched)
    monkeypatch.setattr(set_up, "SAID_SECONDS", 0.0)
    native.library.cache_clear()
    config, job = EngineConfig(model="demo", **ON_CPU), Job((6, 5), (3, 2))
    with caplog.at_level("INFO"), LLM.from_config(config, job=job if known else None) as llm:
        llm.generate(PROMPTS, SHORT)
    assert happened[0] == "kernels" and happened.count("kernels") == 1 and happened.count("pass") >= 3
    assert any(message.startswith("compiled the CPU's kernels in ") for message in caplog.messages)


def test_kernels_are_loaded_where_a_policy_uses_them(monkeypatch):
    loaded = []
    monkeypatch.setattr("flexbatch.kernels.ops.load_compiled", lambda: loaded.append(1))
    whole = Split(1, 0)
    plain = Policy(whole, whole, whole, 4, 1)
    load_kernels(torch.device("cuda"), plain)
    assert not loaded
    load_kernels(torch.device("cpu"), plain)
    load_kernels(torch.device("cuda"), Policy(whole, Split(0, 1), whole, 4, 1, cpu_attention=0.5))
    load_kernels(torch.device("cuda"), Policy(Split(0, 1), whole, whole, 4, 1, cpu_experts=0.5))
    assert len(loaded) == 3


def test_what_is_made_in_passes_is_not_compared_with_the_prediction(monkeypatch):
    """A pass that compiles, as Triton's first ones do."""
    left, turn = [True], Passes.turn

    def compiling(passes):
        if left:
            with passes.executor.set_up.making(DECODE_GRAPHS):
                time.sleep(left.pop() * 0.3)
        return turn(passes)

    monkeypatch.setattr(Passes, "turn", compiling)
    with LLM("demo", async_scheduling=False, **ON_CPU) as llm:
        llm.generate(PROMPTS, SHORT)
        report = llm.report()
    assert report["set_up_seconds"] > 0.29
    assert 0 < report["job"]["measured_seconds"] <= report["seconds"] - report["set_up_seconds"]
    assert " ms of it setting up, and " in str(report) and "set-up: 1 decode graphs in " in str(report)


def test_what_is_compiled_while_something_is_made_counts_once(monkeypatch):
    clock = iter((100.0, 100.5))
    monkeypatch.setattr(set_up, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = SetUp(torch.device("cuda"))
    found.compiled(times=SimpleNamespace(total=3_000_000), src=None, cache_hit=False)
    assert found.take() == {COMPILED: Made(1, 3.0)} and found.take() == {}
    with found.making(DECODE_GRAPHS):
        found.compiled(times=SimpleNamespace(total=200_000), src=None, cache_hit=True)
    made = found.take()
    assert made[LOADED] == Made(1, 0.2) and made[DECODE_GRAPHS].count == 1
    assert made[DECODE_GRAPHS].seconds == pytest.approx(0.3)


def test_what_a_pass_waited_for_is_named(caplog):
    """The report of a job that took 16 s longer said of four kernels no more than that there were four."""
    names, kinds = ("query", "rows", "BITS"), {"query": "*bf16", "rows": "i32", "BITS": "constexpr"}
    src = SimpleNamespace(
        fn=SimpleNamespace(arg_names=names),
        name="attention_kernel",
        signature=kinds,
        constants={(2,): 4},
        attrs={(0,): [["tt.divisibility", 16]], (1,): []},
    )
    found, statistics = SetUp(torch.device("cuda")), Statistics()
    with caplog.at_level("INFO"):
        found.compiled(times=SimpleNamespace(total=2_000_000), src=src)
        found.compiled(times=SimpleNamespace(total=1_000), src=src, cache_hit=True)
    statistics.beside_set_up(3.0, found)
    told = "attention_kernel[BITS=4](query: *bf16, rows: i32; multiples of 16: query)"
    assert statistics.describe()["compiled_in_passes"] == [told]
    assert caplog.messages == [f"compiled {told} in the middle of a job: 2 s"]


def test_the_compiler_is_listened_to_during_passes_alone():
    knobs = pytest.importorskip("triton").knobs
    found, before = SetUp(torch.device("cuda")), knobs.compilation.listener
    with pytest.raises(KeyError), found.listening():
        assert knobs.compilation.listener == found.compiled
        raise KeyError
    assert knobs.compilation.listener is before
    with SetUp(torch.device("cpu")).listening():
        assert knobs.compilation.listener is before


@pytest.mark.gpu
def test_a_pass_that_records_a_graph_says_so():
    with LLM("demo", device="cuda", gpu_memory="4GiB", cpu_memory="1GiB") as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
        report = llm.report()
        assert 0.0 < report["set_up_seconds"] < report["seconds"]
        llm.generate(PROMPTS, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
        assert llm.report()["set_up_seconds"] == report["set_up_seconds"], "everything is there"


def test_time_between_passes_that_goes_into_another_block_is_time_of_the_run(monkeypatch):
    """It was in nobody's seconds: 7 of a job of 22 on an H100."""
    monkeypatch.setattr(answer_lengths, "ENOUGH", 1)
    monkeypatch.setattr(EngineLoop, "plan_for_lengths", lambda loop, complete: time.sleep(0.2))
    with LLM("demo", **ON_CPU) as llm:
        params = SamplingParams(max_tokens=2, temperature=0)
        llm.generate(PROMPTS, params)
        llm.generate(PROMPTS, params)
        report = llm.report()
    made = report["set_up"]["plan_comparisons"]
    assert made["count"] >= 1 and 0.2 * made["count"] <= made["seconds"]
    assert made["seconds"] <= report["set_up_seconds"] <= report["seconds"]
