"""What the benchmark says of a GPU's time: by spans of kernels that run beside and after each other, by passes, and by
what nvidia-smi prints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.card_state import FIELDS, CardState
from benchmark.gpu_busy import busy
from benchmark.pass_times import PIECES, SINGLE, PassTime, PassTimes
from flexbatch import LLM, SamplingParams
from flexbatch.execution.executor import Executor
from flexbatch.execution.passes import Passes


def test_waits_are_named_by_what_is_around_them():
    found = busy([(0, 10, "a"), (2, 5, "inside"), (5, 12, "b"), (20, 30, "a"), (30, 40, "c"), (41, 50, "d")])
    assert found["busy"] == pytest.approx(41 / 50)
    assert found["gaps"] == [{"us": 8, "after": "b", "before": "a"}, {"us": 1, "after": "c", "before": "d"}]
    assert found["kernels"]["a"] == pytest.approx(20 / 50)
    assert busy([])["busy"] == 0


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=12))
def test_every_instant_counts_once(spans):
    spans = sorted((start, start + length, "kernel") for start, length in spans)
    instants = {instant for start, end, _ in spans for instant in range(start, end)}
    whole = max(end for _, end, _ in spans) - spans[0][0]
    assert busy(spans)["busy"] == pytest.approx(len(instants) / whole, abs=1e-4)


def test_passes_are_told_apart_by_how_they_were_launched():
    originals = Executor.begin_pass, Passes.turn
    prompts = [{"prompt_token_ids": list(range(length, 2 * length))} for length in (60, 41, 50)]
    with LLM("demo", gpu_batch_size=3, prefill_chunk=20, async_scheduling=True) as llm, PassTimes() as passes:
        llm.generate(prompts, SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    assert (Executor.begin_pass, Passes.turn) == originals and not passes.in_flight
    assert sum(each.prompt_tokens for each in passes.passes) == 151
    # The last token of an answer is drawn, and no pass reads it.
    assert sum(each.tokens for each in passes.passes) == 151 + 3 * 4
    assert all(each.launched == SINGLE and each.seconds > 0 for each in passes.passes)
    report = passes.report()
    assert sum(kind["passes"] for kind in report.values()) == len(passes.passes)
    assert set(report) == {SINGLE, f"{SINGLE}, with prompts"}


def test_the_passes_with_prompts_that_are_profiled_lie_within_those_that_read_prompts():
    times = PassTimes()
    times.in_flight.append(newest := PassTime())
    times.noting(lambda: None, "no graph")()
    assert newest.launched == SINGLE
    times.noting(lambda: 1, PIECES)()
    assert newest.launched == PIECES
    for reading in range(12):
        times.passes = [PassTime(prompt_tokens=5)] * reading + [PassTime()] * 3 + [PassTime(prompt_tokens=5)]
        first, count = times.with_prompts(4)
        assert (count > 0) == (reading > 1) and count <= 4 and first + count < max(1, reading)


def test_a_card_is_sampled_by_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    lines = "1755, 1980, 650.5, 700.00, 61\\n1745, 1980, 649.5, 700.00, 61\\n1700, 1980, [N/A], 700.00, 61\\n1600, 19"
    program.write_text(f"#!/bin/sh\nprintf '{lines}'\n: > {tmp_path}/done\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with CardState() as card:
        while not (tmp_path / "done").exists():
            pass
    assert card.report() == {"samples": 2, **dict(zip(FIELDS.values(), [1750, 1980, 650, 700, 61], strict=True))}


def test_without_nvidia_smi_there_are_no_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with CardState() as card:
        pass
    assert card.report() == {"samples": 0}
