"""The comparison of predicted and measured runs."""

from __future__ import annotations

import json

import pytest

from benchmark.policy_error import main, plan_of
from flexbatch.policy.hardware import load_hardware

RUN = {
    "model": "opt-6.7b", "percent": [20, 80, 0, 100, 100, 0], "gpu_batch_size": 16, "num_gpu_batches": 2,
    "cpu_attention": 0.5, "prompt_lens": [100 + 7 * i for i in range(60)], "output_lens": [32] * 60,
    "gpu_memory": 16 * 2**30,
}  # fmt: skip


@pytest.mark.parametrize("factors, code", [((1.0, 0.95, 1.08), 0), ((1.0, 1.4, 1.0), 1), ((1.2, 1.2, 1.2), 1)])
def test_error_and_verdict(tmp_path, capsys, factors, code):
    predicted = plan_of(RUN, load_hardware("h200")).predicted_tokens_per_second
    runs = tmp_path / "runs.jsonl"
    runs.write_text("\n".join(json.dumps({**RUN, "tokens_per_second": predicted / factor}) for factor in factors))
    assert main([str(runs), "--hardware", "h200", "--output", str(tmp_path)]) == code
    assert f"worst {max(abs(f - 1) for f in factors):.1%}" in capsys.readouterr().out
    assert [r["error"] for r in json.loads((tmp_path / "policy_error.json").read_text())] == pytest.approx(
        [f - 1 for f in factors]
    )
