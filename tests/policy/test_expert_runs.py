"""Whole jobs of mixtures of experts: what a row tells, also of a job that was stopped."""

from __future__ import annotations

import json
import os
import signal

import pytest

from benchmark import expert_plans, expert_runs, shares
from flexbatch.policy.shapes import SHAPES
from flexbatch.trace import Span


@pytest.fixture
def tiny(monkeypatch):
    sizes = {
        **{"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 16, "vocab_size": 500, "moe_intermediate_size": 32, "intermediate_size": 64},
        **{"num_experts": 8, "num_experts_per_tok": 2},
    }
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["qwen3-30b-a3b"] | sizes)
    monkeypatch.setitem(expert_runs.RUNS, "tiny", expert_plans.Run(5, memory=(0.01, 0.06)))


def arguments_of(monkeypatch, folder, **more):
    options = {"hardware": "cpu", "prompt-tokens": 40, "new-tokens": 12, "output": folder / "runs.jsonl"} | more
    monkeypatch.setattr("sys.argv", ["expert_runs", "tiny", *(f"--{name}={value}" for name, value in options.items())])


def test_a_part_of_the_layers_runs_by_the_plan_of_all(monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(shares, "PART_GIB", 0.06)
    monkeypatch.setitem(SHAPES, "tiny-cut", {})  # that of the run goes with the test
    for more in ({"plan": tmp_path / "plans.json"}, {}, {"share": 3, "plans": tmp_path / "plans.json"}):
        arguments_of(monkeypatch, tmp_path, **more)
        before = signal.getsignal(signal.SIGTERM)
        try:
            assert expert_runs.main() == 0
        finally:
            signal.signal(signal.SIGTERM, before)
    whole, part = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert (whole["layers"], part["layers"], part["of_layers"]) == (3, 1, 3)
    plan = ("block", "micro_batches", "percent", "cpu_attention", "cpu_experts", "prefill_chunk")
    assert {key: part[key] for key in plan} == {key: whole[key] for key in plan}
    assert part["tokens_per_second_of_all_layers"] == pytest.approx(part["tokens_per_second"] / 3, rel=0.01)
    estimated = part["predicted_of_all_layers"] * part["tokens_per_second"] / part["predicted_tokens_per_second"]
    assert part["estimated_of_all_layers"] == pytest.approx(estimated, rel=0.05)
    assert "predicted_of_all_layers" not in whole
    promised = json.loads((tmp_path / "plans.json").read_text())["tiny"]["tokens_per_second"]
    assert part["predicted_of_all_layers"] == pytest.approx(promised, abs=0.1)


def test_what_a_pass_takes_beside_its_layers_is_counted_once():
    """Passes of 10 s, the link busy for 6 of them; 6 layers of 1.2 s each, and 0.9 of it in each."""
    spans = []
    for begin in range(0, 60, 10):
        for layer in range(6):
            at = begin + 1.2 * layer
            spans.append(Span("compute", f"attention {layer}.0", at, at + 0.5))
            spans.append(Span("compute", f"mlp {layer}.0", at + 0.5, at + 1.2))
            spans.append(Span("h2d", "weights", at, at + (1.08 if layer in (2, 3) else 0.96)))
    found = expert_runs.by_layers(spans, (6, 24), passes=20, seconds=200.0, tokens=1000)
    passes, all_layers = found["passes_by_layers"], found["estimated_by_layers"]
    assert (passes["pass_ms"], passes["layer_ms"], passes["own_ms"]) == (10_000, 1200, 2800)
    assert (passes["link_busy_percent"], passes["link_busy_percent_in_layers"]) == (60, 90)
    assert all_layers["pass_ms"] == 10_000 + 18 * 1200
    assert all_layers["link_busy_percent"] == pytest.approx(100 * (6 + 18 * 1.08) / 31.6, abs=0.1)
    assert all_layers["tokens_per_second"] == pytest.approx(1000 / (20 * (10 + 18 * 1.2)), abs=0.1)
    assert expert_runs.by_layers(spans, (3, 24), 20, 200.0, 1000) == {}


def test_parts_have_the_experts_of_all_layers_and_none_of_the_dense_ones(monkeypatch):
    for name in expert_runs.RUNS:
        monkeypatch.setitem(SHAPES, f"{name}-cut", {})
        shape, part = SHAPES[name], SHAPES[shares.cut(name, 6)]
        assert part.get("first_k_dense_replace", 0) == 0, name
        changed = {key for key in shape if shape[key] != part[key]}
        assert changed <= {"num_hidden_layers", "first_k_dense_replace", "layer_types"}, (name, changed)


@pytest.mark.parametrize("passes", [None, 7], ids=["whole", "stopped"])
def test_a_row_tells_the_passes_of_a_job_also_of_one_that_sigterm_ends(monkeypatch, tmp_path, tiny, passes):
    arguments_of(monkeypatch, tmp_path)
    recorded, logs = expert_runs.ToldLog.record, []

    def record(log, load, seconds):
        recorded(log, load, seconds)
        if log not in logs:
            logs.append(log)
        # Two jobs warm up where the model lies on the device whole.
        if passes is not None and len(logs) == 3 and len(log.log) == passes:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(expert_runs.ToldLog, "record", record)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert expert_runs.main() == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    row = json.loads((tmp_path / "runs.jsonl").read_text())
    kinds = row["passes"]
    assert ("stopped_after" in row) == (passes is not None) and set(kinds) == {"decode", "mixed"}
    assert sum(each["passes"] for each in kinds.values()) == (passes or row["new_tokens"])
    tokens = sum(each["tokens_per_second"] * each["passes"] * each["measured_ms"] / 1e3 for each in kinds.values())
    assert tokens == pytest.approx(5 * (passes or row["new_tokens"]), rel=0.05)
    assert 0 < row["tokens_per_second"] < 2 * tokens / row["seconds"]
    assert all(each["measured_ms"] > 0 < each["predicted_ms"] for each in kinds.values())
    host = row["host_ms"]
    assert 0 < host["inputs"] + host["compose"] + host["commit"] < host["turn"]
    assert row["experts"]["count"] == 8 and 0 < row["experts"]["distinct_per_pass"] <= 8
