"""What the passes of a job that was logged did, by their kind."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmark.pass_errors import kinds_of_passes


def tokens_of(passes: list[dict[str, Any]]) -> int:
    """Generated: one by each sequence that decodes, and the first of each whose prompt is complete."""
    return int(sum(each["load"][0] + each["load"][5] for each in passes))


def told_passes(plan: Any, passes: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of the average pass of each kind, tokens per second, and the shares of the time that resources
    were busy for."""
    told = {}
    for each in kinds_of_passes("", plan, passes) if passes else ():
        mixed = np.array([one["load"][2] > 0 for one in passes])
        own = [one for one, with_prompts in zip(passes, mixed, strict=True) if with_prompts == (each.kind == "mixed")]
        told[each.kind] = {
            "passes": each.count,
            "measured_ms": round(1e3 * each.measured, 1),
            "predicted_ms": round(1e3 * each.predicted, 1),
            "launching_ms": round(1e3 * (each.host + each.launching), 1),
            "tokens_per_second": round(tokens_of(own) / sum(one["seconds"] for one in own), 1),
            "predicted_busy_ms": {name: round(1e3 * value, 1) for name, value in each.busy.items() if value},
            "measured_busy_ms": {name: round(1e3 * value, 1) for name, value in each.measured_busy.items() if value},
            "link_busy_percent": round(100 * each.measured_busy.get("h2d", 0.0) / each.measured, 1),
        }
    return told


def line_of(plan: Any, passes: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"{each['passes']} {kind} passes of {each['measured_ms']} ms, planned {each['predicted_ms']}, "
        f"{each['tokens_per_second']} tok/s, link busy {each['link_busy_percent']} %, "
        f"busy ms {each['measured_busy_ms']}, planned {each['predicted_busy_ms']}"
        for kind, each in told_passes(plan, passes).items()
    )
