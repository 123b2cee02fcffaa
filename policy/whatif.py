"""What would another amount of memory give: a sweep of the GPU or CPU budget, and the plots of plans and sweeps."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

from flexbatch.policy.explain import headline, job_text
from flexbatch.policy.footprint import KIND_LABELS
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.optimizer import choose
from flexbatch.policy.percent import percent_text
from flexbatch.policy.plan import DoesNotFit, Plan
from flexbatch.policy.policy import TIERS, Constraints
from flexbatch.policy.sweep_request import SweepRequest
from flexbatch.policy.units import BINARY, GIB, duration_text, fitting_unit, number_text
from flexbatch.policy.workload import Workload


def sweep(
    shape: ModelShape, hardware: Hardware, workload: Workload, constraints: Constraints, request: SweepRequest
) -> list[tuple[int, Plan | None]]:
    """The best plan for every size, None where nothing fits.

    A plan that fits less memory fits more, so the best of the smaller sizes stands where the search finds nothing
    better.
    """
    found: list[tuple[int, Plan | None]] = []
    best: Plan | None = None
    for size in request.sizes:
        try:
            plan: Plan | None = choose(shape, hardware, workload, request.constrain(constraints, size))
        except DoesNotFit:
            plan = None
        if best is not None and (plan is None or plan.predicted_tokens_per_second < best.predicted_tokens_per_second):
            plan = dataclasses.replace(
                best, hardware=best.hardware.with_memory(**{request.kind.removesuffix("_memory"): size})
            )
        best = plan or best
        found.append((size, plan))
    return found


def sweep_table(request: SweepRequest, plans: list[tuple[int, Plan | None]]) -> str:
    """Throughput against memory, with a bar for each size."""
    top = max((p.predicted_tokens_per_second for _, p in plans if p), default=1.0)
    lines = [f"{request.kind + ', GiB':>16s} {'tok/s':>10s}  {'limited by':14s}{'percent':>26s}  block"]
    fitting = [plan for _, plan in plans if plan]
    if fitting:
        lines = [headline(fitting[0]), job_text(fitting[0]), "", *lines]
    for size, plan in plans:
        if plan is None:
            lines.append(f"{size / GIB:16.1f} {'-':>10s}  does not fit")
            continue
        percent = percent_text(plan.policy.percent, 3)
        bar = "#" * max(1, round(30 * plan.predicted_tokens_per_second / top))
        block = f"{plan.policy.gpu_batch_size} x {plan.policy.num_gpu_batches}"
        lines.append(
            f"{size / GIB:16.1f} {number_text(plan.predicted_tokens_per_second):>10s}  "
            f"{plan.limiting_resource:14s}{percent:>26s}  {block:10s} {bar}"
        )
    return "\n".join(lines)


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Time per resource in the average pass, and memory per tier, as an image. Raises ImportError that names the
    extra."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    draw_pass(plan, left)
    draw_memory(plan, right)
    job = f"{job_text(plan)}: {number_text(plan.predicted_tokens_per_second)} new tokens/s"
    figure.suptitle(titled(headline(plan), job))
    finished(plt, figure, path)


def draw_pass(plan: Plan, axes: Any) -> None:
    """What every resource needs in the average pass, each bar with its time and share; what limits in another
    color."""
    seconds = {**plan.row_seconds, "launch": plan.launch_seconds}
    names = [*plan.told_rows, "launch"]
    limits = {plan.limiting_row, plan.limiting_resource}
    unit, scale = ("s", 1.0) if plan.pass_seconds >= 1 else ("ms", 1e3)
    for what, color in (("what limits", "tab:red"), ("other resources", "tab:blue")):
        chosen = [name for name in names if (name in limits) == (what == "what limits")]
        axes.barh(
            [names.index(name) for name in chosen], [scale * seconds[name] for name in chosen], color=color, label=what
        )
    # In a column of their own, right of the frame, where no bar, line or other label is; the layout gives them room.
    longest = scale * max(plan.pass_seconds, *seconds.values())
    for row, name in enumerate(names):
        text = f"{duration_text(seconds[name])}, {seconds[name] / plan.pass_seconds:.0%}" if seconds[name] else "-"
        axes.annotate(
            text, (1.02, row), xycoords=axes.get_yaxis_transform(), va="center", annotation_clip=False, in_layout=True
        )
    axes.axvline(
        scale * plan.pass_seconds,
        color="black",
        linestyle="--",
        zorder=0.5,
        label=f"average pass, {duration_text(plan.pass_seconds)}",
    )
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_xlim(0, 1.05 * longest)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} in the average pass, each resource alone")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def draw_memory(plan: Plan, axes: Any) -> None:
    """Peak memory of every tier by what it is for; the bytes stand below the tiers, so that no label meets another."""
    bottom = [0.0] * len(TIERS)
    for kind in KIND_LABELS:
        shares = [100 * plan.memory[tier].get(kind, 0) / max(1, plan.budgets[tier]) for tier in TIERS]
        if any(shares):
            axes.bar(TIERS, shares, bottom=bottom, label=kind)
            bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
    axes.axhline(100, color="black", linestyle="--", zorder=0.5, label="budget")
    labels = []
    for tier in TIERS:
        used = sum(plan.memory[tier].values())
        unit, size = fitting_unit(used, BINARY)
        text = f"{used / size:,.1f} {unit}" if used else "nothing"
        labels.append(f"{tier}\n{text} of\n{plan.budgets[tier] / GIB:,.1f} GiB")
    axes.set_xticks(range(len(TIERS)), labels)
    axes.set_ylabel("peak memory, % of the budget")
    axes.set_ylim(0, 1.08 * max(100, *bottom))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def plot_sweep(request: SweepRequest, plans: list[tuple[int, Plan | None]], path: str | Path) -> None:
    """Throughput and its bound against memory. Raises ImportError that names the extra."""
    plt = pyplot()
    fitting = [(size / GIB, plan) for size, plan in plans if plan]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    if fitting:
        sizes = [size for size, _ in fitting]
        axes.plot(sizes, [plan.predicted_tokens_per_second for _, plan in fitting], "o-", label="predicted")
        axes.plot(sizes, [plan.bound_tokens_per_second for _, plan in fitting], "--", label="bound of the policy")
    short = [size / GIB for size, plan in plans if not plan]
    if short:
        axes.plot(short, [0.0] * len(short), "x", color="tab:gray", clip_on=False, label="does not fit")
    axes.set_xlabel(f"{request.kind.replace('_memory', '').upper()} memory, GiB")
    axes.set_ylabel("generated tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_title(titled(headline(fitting[0][1]), job_text(fitting[0][1])) if fitting else "nothing fits")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    finished(plt, figure, path)


def titled(*lines: str) -> str:
    """Lines that are no wider than a figure."""
    return "\n".join(textwrap.fill(line, 100) for line in lines)


def finished(plt: Any, figure: Any, path: str | Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib without a display. Raises ImportError with the remedy."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'flexbatch[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
