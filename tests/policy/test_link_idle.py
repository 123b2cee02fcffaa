"""What a link that stands still waited for, from spans."""

from __future__ import annotations

import json

import pytest

from benchmark.link_idle import Timeline, idle_of
from flexbatch.planner.usage import UsageTracer
from flexbatch.trace import Span


def one_pass(at: float) -> list[Span]:
    """10 s of two layers: pages and weights of 2 s each, with 1 s between, and a head without transfers."""
    return [
        Span("compute", "attention 0.0", at, at + 0.5),
        Span("h2d", "cache 0", at, at + 2),
        Span("cpu_attention", "cache 0.0", at + 2, at + 2.5),
        Span("h2d", "weights 1.0", at + 3, at + 5),
        Span("h2d", "cache 1", at + 4, at + 4.5),
        Span("h2d", "cache 1", at + 6, at + 7),
        Span("compute", "mlp 1.0", at + 6, at + 8),
        Span("compute", "head 0", at + 8, at + 9),
    ]


def test_gaps_are_charged_to_what_ends_them():
    found = idle_of([span for index in range(4) for span in one_pass(10.0 * index)])
    assert found["passes"] == 2 and found["pass_ms"] == 10_000
    assert found["link_busy_percent"] == pytest.approx(50)
    assert found["idle_ms"] == {
        "cache": {"idle": 1000, "cpu_attention_beside": 0, "compute_beside": 0},
        "pass": {"idle": 3000, "cpu_attention_beside": 0, "compute_beside": 2000},
        "weights": {"idle": 1000, "cpu_attention_beside": 500, "compute_beside": 0},
    }


def test_too_few_passes_tell_nothing():
    assert idle_of([]) == {} and idle_of(one_pass(0.0) + one_pass(10.0)) == {}


def test_spans_of_some_passes_are_kept_and_all_are_summed(tmp_path):
    clock = iter(range(1000))
    tracer = UsageTracer(clock=lambda: float(next(clock)))
    timeline = Timeline(tracer)
    for index in range(40):
        if index in (20, 30):  # the second time is one too many
            timeline.start(3)
        tracer.begin_pass()
        assert tracer.on or not 20 <= index < 23
        with tracer.span("h2d", f"weights {index}", 5):
            pass
    kept = [span.name for span in timeline.spans]
    assert kept[:3] == ["weights 20", "weights 21", "weights 22"] and len(kept) <= 4
    assert tracer.summary()["h2d"].spans > 20
    timeline.write(tmp_path / "timeline.json")
    assert len(json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]) > 3
