"""What would another amount of memory give: a sweep of the GPU or CPU budget, and the plots of plans and sweeps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.policy.footprint import KIND_LABELS
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.optimizer import choose
from flexbatch.policy.plan import DoesNotFit, Plan
from flexbatch.policy.policy import TIERS, Constraints
from flexbatch.policy.units import BINARY, GIB, fitting_unit
from flexbatch.policy.workload import Workload


@dataclass(frozen=True)
class SweepRequest:
    """``kind`` "gpu_memory" or "cpu_memory", from ``first`` to ``last`` bytes in ``steps`` equal steps."""

    kind: str
    first: int
    last: int
    steps: int

    @classmethod
    def parse(cls, text: str, parse_bytes: Callable[[str], int]) -> SweepRequest:
        """From ``gpu_memory=8GiB:48GiB:5``. Raises ValueError."""
        match = re.fullmatch(r"(gpu_memory|cpu_memory)=([^:]+):([^:]+):(\d+)", text.strip())
        if match is None:
            raise ValueError(
                f"--sweep {text!r}: write gpu_memory=8GiB:48GiB:5 or cpu_memory=...: first, last and how many"
            )
        request = cls(match[1], parse_bytes(match[2]), parse_bytes(match[3]), int(match[4]))
        if request.steps < 2 or request.last <= request.first:
            raise ValueError(f"--sweep {text!r}: needs at least 2 steps and a last size above the first")
        return request

    def constrain(self, constraints: Constraints, size: int) -> Constraints:
        gpu = self.kind == "gpu_memory"
        return dataclasses.replace(
            constraints,
            gpu_memory=size if gpu else constraints.gpu_memory,
            cpu_memory=constraints.cpu_memory if gpu else size,
        )

    @property
    def sizes(self) -> list[int]:
        return [self.first + (self.last - self.first) * i // (self.steps - 1) for i in range(self.steps)]


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
    for size, plan in plans:
        if plan is None:
            lines.append(f"{size / GIB:16.1f} {'-':>10s}  does not fit")
            continue
        percent = " ".join(f"{x:.0f}" for x in plan.policy.percent)
        bar = "#" * max(1, round(30 * plan.predicted_tokens_per_second / top))
        block = f"{plan.policy.gpu_batch_size} x {plan.policy.num_gpu_batches}"
        lines.append(
            f"{size / GIB:16.1f} {plan.predicted_tokens_per_second:10.4g}  "
            f"{plan.limiting_resource:14s}{percent:>26s}  {block:10s} {bar}"
        )
    return "\n".join(lines)


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Time per resource in the average pass, and memory per tier, as an image. Raises ImportError that names the
    extra."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), constrained_layout=True)
    seconds = {**plan.row_seconds, "launch": plan.launch_seconds}
    names = [*plan.told_rows, "launch"]
    left.barh(
        names,
        [seconds[name] for name in names],
        color=["tab:red" if name == plan.limiting_row else "tab:blue" for name in names],
    )
    left.axvline(plan.pass_seconds, color="black", linestyle="--", label=f"pass: {plan.pass_seconds:.3g} s")
    left.set_xlim(0, 1.08 * max(plan.pass_seconds, *seconds.values()))
    left.invert_yaxis()
    left.set_xlabel("seconds in the average pass")
    left.legend()
    left.set_title(
        f"{plan.shape.name}: {plan.predicted_tokens_per_second:.4g} tok/s, {plan.fraction_of_bound:.0%} of bound"
    )
    bottom = [0.0] * len(TIERS)
    for kind in KIND_LABELS:
        shares = [100 * plan.memory[tier].get(kind, 0) / max(1, plan.budgets[tier]) for tier in TIERS]
        if any(shares):
            right.bar(TIERS, shares, bottom=bottom, label=kind)
            bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
    for tier, top in zip(TIERS, bottom, strict=True):
        used = sum(plan.memory[tier].values())
        unit, size = fitting_unit(used, BINARY)
        text = (
            f"{used / size:.1f} {unit} of {plan.budgets[tier] / GIB:.1f} GiB"
            if used
            else f"nothing of {plan.budgets[tier] / GIB:.1f} GiB"
        )
        right.annotate(
            text,
            (tier, top),
            (0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            bbox={"fc": "white", "ec": "none", "pad": 1.0},
        )
    right.axhline(100, color="black", linestyle="--", zorder=0.5)
    right.set_ylabel("% of the budget")
    right.set_title("peak memory")
    right.set_ylim(0, 1.2 * max(100, *bottom))
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_sweep(request: SweepRequest, plans: list[tuple[int, Plan | None]], path: str | Path) -> None:
    """Throughput and its bound against memory. Raises ImportError that names the extra."""
    plt = pyplot()
    fitting = [(size / GIB, plan) for size, plan in plans if plan]
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    axes.plot([x for x, _ in fitting], [p.predicted_tokens_per_second for _, p in fitting], "o-", label="predicted")
    axes.plot([x for x, _ in fitting], [p.bound_tokens_per_second for _, p in fitting], "--", label="bound")
    axes.set_xlabel(f"{request.kind.replace('_memory', '').upper()} memory, GiB")
    axes.set_ylabel("generated tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_title(fitting[0][1].shape.name if fitting else "nothing fits")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
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
