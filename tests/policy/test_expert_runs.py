"""Whole jobs of mixtures of experts: what a row tells, also of a job that was stopped."""

from __future__ import annotations

import json
import os
import signal

import pytest

from benchmark import expert_runs
from flexbatch.policy.shapes import SHAPES


@pytest.mark.parametrize("passes", [None, 7], ids=["whole", "stopped"])
def test_a_row_tells_the_passes_of_a_job_also_of_one_that_sigterm_ends(monkeypatch, tmp_path, passes):
    sizes = {
        **{"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 16, "vocab_size": 500, "moe_intermediate_size": 32, "intermediate_size": 64},
        **{"num_experts": 8, "num_experts_per_tok": 2},
    }
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["qwen3-30b-a3b"] | sizes)
    monkeypatch.setitem(expert_runs.RUNS, "tiny", expert_runs.Run(5, memory=(0.01, 0.06)))
    monkeypatch.setattr(expert_runs, "WORKSPACE_GIB", 0.001)
    options = {"hardware": "cpu", "prompt-tokens": 40, "new-tokens": 12, "output": tmp_path / "runs.jsonl"}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr("sys.argv", ["expert_runs", "tiny", *arguments])
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
    assert row["experts"]["count"] == 8 and 0 < row["experts"]["distinct_per_pass"] <= 8
