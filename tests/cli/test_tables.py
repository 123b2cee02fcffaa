"""The tables of a run, from a report."""

from __future__ import annotations

from flexbatch.planner import tables
from flexbatch.policy.units import BINARY, fitting_unit

SPLIT = {"gpu": 0.2, "cpu": 0.5, "disk": 0.3}
SIZES = {
    "gpu_batch_size": 4,
    "num_gpu_batches": 2,
    "weight_bits": 16,
    "cache_bits": 8,
    "prefill_chunk": 64,
    "cpu_attention": 0.5,
    "overlap": True,
}
REPORT = {
    "policy": {"weights": SPLIT, "cache": SPLIT, "activations": SPLIT, **SIZES},
    "realized_percent": {"weights": {"gpu": 19.5, "cpu": 50.25, "disk": 30.25}, "cache": {}, "activations": {}},
    "memory": [
        {"what": "weights", "tier": "gpu", "num_bytes": 3 * 2**20},
        {"what": "weights", "tier": "disk", "num_bytes": 2**19},
        {"what": "cache", "tier": "gpu", "num_bytes": 2**20},
    ],
    "budgets": {"gpu": 2**30, "cpu": 2**31, "disk": 0},
    "peak_bytes": {"gpu": 2**21, "cpu": 0, "disk": 0},
    "requests": 10,
    "prompt_tokens": 1200,
    "generated_tokens": 400,
    "passes": 40,
    "seconds": 2.0,
    "load_seconds": 0.5,
    "moved_bytes": {"h2d": 6_000_000, "d2h": 0},
    "resources": {
        "h2d": {"spans": 3, "busy": 0.5, "num_bytes": 6_000_000, "wall": 2.0},
        "compute": {"spans": 1, "busy": 2.0, "num_bytes": 0, "wall": 2.0},
    },
}


def cells(text: str, first: str) -> list[str]:
    """The cells of the line that begins with `first`."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(first + "  ")]
    return line.strip()[len(first) :].split()


def test_placement_shows_asked_and_realized_shares_and_memory() -> None:
    text = tables.placement(REPORT)
    assert "gpu batch size 4" in text and "overlap True" in text
    assert [line.split() for line in text.splitlines() if "weights  " in line] == [
        ["weights", "20.0", "50.0", "30.0", "19.5", "50.2", "30.2"],
        ["weights", "3.00", "-", "0.50"],
    ]
    assert cells(text, "MiB") == ["gpu", "cpu", "disk"]
    assert cells(text, "needed") == ["4.00", "-", "0.50"]
    assert cells(text, "peak") == ["2.00", "-", "-"]
    assert cells(text, "budget") == ["1,024.00", "2,048.00", "-"]
    plan = {key: value for key, value in REPORT.items() if key != "peak_bytes"}
    assert "peak" not in tables.placement(plan)


def test_throughput_counts_and_rates() -> None:
    text = tables.throughput(REPORT)
    assert cells(text, "generated tokens") == ["400", "200.00"]
    assert cells(text, "prompt tokens") == ["1,200", "600.00"]
    assert cells(text, "h2d") == ["6.00", "3.00"] and "d2h" not in text and "MB/s" in text
    assert "per second" in tables.throughput({**REPORT, "seconds": 0.0, "moved_bytes": {}})


def test_resources_only_with_a_trace() -> None:
    text = tables.resources(REPORT)
    assert cells(text, "h2d link") == ["0.500", "25.0", "6.00", "12.00"]
    assert cells(text, "gpu compute") == ["2.000", "100.0", "-", "-"]
    assert tables.resources({"resources": {}}) == ""


def test_units_fit_the_largest_value() -> None:
    assert [fitting_unit(count, BINARY)[0] for count in (0, 5, 2**20, 2**30, 2**40)] == [
        "KiB",
        "KiB",
        "MiB",
        "GiB",
        "GiB",
    ]
