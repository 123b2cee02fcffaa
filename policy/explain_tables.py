"""The tables of a plan: memory by kind and tier, and what every resource does in a pass."""

from __future__ import annotations

from collections.abc import Mapping

from flexbatch.policy.footprint import KIND_LABELS
from flexbatch.policy.plan import Plan
from flexbatch.policy.policy import TIERS
from flexbatch.policy.units import BINARY, FLOPS, duration_text, fitting_unit


def memory_table(plan: Plan) -> list[str]:
    """Kinds x tiers, with what stays free."""
    totals = {tier: sum(plan.memory[tier].values()) for tier in TIERS}
    unit, size = fitting_unit(max(totals.values()), BINARY)

    def line(name: str, num_bytes: Mapping[str, int]) -> str:
        return f"{name:18s}" + "".join(f"{num_bytes[tier] / size:12,.2f}" for tier in TIERS)

    kinds = {kind: {tier: plan.memory[tier].get(kind, 0) for tier in TIERS} for kind in KIND_LABELS}
    lines = [f"{'peak memory, ' + unit:18s}" + "".join(f"{tier:>12s}" for tier in TIERS)]
    lines += [line(kind, sizes) for kind, sizes in kinds.items() if any(sizes.values())]
    return [
        *lines,
        line("free", {tier: plan.budgets[tier] - totals[tier] for tier in TIERS}),
        line("budget", plan.budgets),
    ]


def resource_table(plan: Plan) -> list[str]:
    """Demand, time and share of the pass for every resource, in the average pass."""
    head = f"average pass, {duration_text(plan.pass_seconds)}"
    lines = [f"{head:28s}{'demand':>16s}{'time':>12s}{'busy':>8s}"]
    for name in (*plan.told_rows, "launch"):
        work = plan.work.get(name)
        seconds = plan.launch_seconds if name == "launch" else plan.row_seconds[name]
        unit, size = fitting_unit(work or 0, FLOPS if name == "gpu_compute" else BINARY)
        demand, took = f"{work / size:,.2f} {unit}" if work else "-", duration_text(seconds) if seconds else "-"
        lines.append(f"{name:28s}{demand:>16s}{took:>12s}{seconds / plan.pass_seconds:8.0%}")
    return lines
