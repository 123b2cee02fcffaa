"""What `LLM.report()` says of an engine's runs, and its tables."""

from __future__ import annotations

import json

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.planner import tables

PERCENT = (50, 50, 0, 100, 100, 0)
NUM_TOKENS = 5


@pytest.fixture(scope="module")
def reports(reference, tmp_path_factory):
    """A model with the reports of one engine: before any run, after one, and after another."""
    model = reference("llama")
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    settings = {"gpu_batch_size": 3, "num_gpu_batches": 2, "gpu_memory": "256MiB", "cpu_memory": "256MiB"}
    folder = str(tmp_path_factory.mktemp("offload"))
    with LLM(str(model.folder), device="cpu", percent=PERCENT, offload_dir=folder, **settings) as llm:
        found = [llm.report()]
        for prompts in (model.prompts[:4], model.prompts[4:6]):
            llm.generate(prompts, params)
            found.append(llm.report())
    return model, found


def test_sums_over_the_runs(reports) -> None:
    model, (before, first, second) = reports
    assert (before["requests"], before["passes"], before["generated_tokens_per_second"]) == (0, 0, 0.0)
    for report, prompts in ((first, model.prompts[:4]), (second, model.prompts[:6])):
        assert report["requests"] == len(prompts)
        assert report["prompt_tokens"] == sum(map(len, prompts))
        assert report["generated_tokens"] == NUM_TOKENS * len(prompts)
        assert report["generated_tokens_per_second"] == pytest.approx(report["generated_tokens"] / report["seconds"])
        total = report["prompt_tokens"] + report["generated_tokens"]
        assert report["total_tokens_per_second"] == pytest.approx(total / report["seconds"])
    assert second["passes"] > first["passes"] >= NUM_TOKENS
    assert second["moved_bytes"]["h2d"] > first["moved_bytes"]["h2d"] > 0


def test_placement_and_memory_are_those_of_the_run(reports) -> None:
    _, (_, first, _) = reports
    for kind, gpu, cpu in zip(("weights", "cache", "activations"), PERCENT[0::2], PERCENT[1::2], strict=True):
        assert sum(first["realized_percent"][kind].values()) == pytest.approx(100)
        assert (first["policy"][kind]["gpu"], first["policy"][kind]["cpu"]) == (gpu / 100, cpu / 100)
    assert first["realized_percent"]["cache"] == {"gpu": 0, "cpu": 100, "disk": 0}
    for tier in ("gpu", "cpu"):
        required = sum(row["num_bytes"] for row in first["memory"] if row["tier"] == tier)
        assert 0 < first["peak_bytes"][tier] <= required <= first["budgets"][tier] == 256 * 2**20


def test_the_report_is_json(reports) -> None:
    for report in reports[1]:
        assert json.loads(json.dumps(report, default=str)).keys() == report.keys()
        assert "speculation" not in report and "prediction" not in report


def test_a_report_prints_as_tables_and_is_a_dict(reports) -> None:
    for report in reports[1]:
        assert isinstance(report, dict) and json.loads(json.dumps(report, default=str)) == json.loads(
            json.dumps(dict(report), default=str)
        )
        text = str(report)
        assert text == f"{report}" and text.startswith("placement (") and "throughput (" in text
        assert not {"{", "}", "'"} & set(text)


def test_its_text_shows_the_numbers(reports) -> None:
    _, (_, _, report) = reports
    text = tables.throughput(report)
    assert any(line.split()[:2] == ["requests", "6"] for line in text.splitlines())
    assert f"{report['prompt_tokens']:,}" in text and f"{report['generated_tokens']:,}" in text
    text = tables.placement(report)
    assert "gpu batch size 3" in text and "num gpu batches 2" in text
    shares = next(line.split()[1:4] for line in text.splitlines() if line.split()[:1] == ["cache"])
    assert shares == ["0.0", "100.0", "0.0"]
    assert tables.speculation(report) == tables.prediction(report) == ""
