"""A plan in words, tables and JSON: where everything lives, what each resource has to do, which one limits, what
more memory would buy."""

from __future__ import annotations

from collections.abc import Mapping

from flexbatch.policy.footprint import KIND_LABELS
from flexbatch.policy.plan import Plan
from flexbatch.policy.policy import TIERS
from flexbatch.policy.units import BINARY, FLOPS, fitting_unit, size_text


def summary(plan: Plan) -> dict:
    """For ``--json``: plain numbers under stable names."""
    policy = plan.policy
    kinds = ("weights", "cache", "activations")
    return {
        "model": plan.shape.name,
        "hardware": plan.hardware.name,
        "predicted_tokens_per_second": plan.predicted_tokens_per_second,
        "bound_tokens_per_second": plan.bound_tokens_per_second,
        "fraction_of_bound": plan.fraction_of_bound,
        "steady_tokens_per_second": plan.steady_tokens_per_second,
        "machine_bound_tokens_per_second": plan.machine_bound_tokens_per_second,
        "limiting_resource": plan.limiting_resource,
        "percent": list(policy.percent),
        "splits_percent": {
            kind: dict(zip(TIERS, (100 * x for x in getattr(policy, kind).fractions), strict=True)) for kind in kinds
        },
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
        "cpu_attention": policy.cpu_attention,
        "prefill_chunk": policy.prefill_chunk,
        "prefill_budget": policy.prefill_budget,
        "weight_bits": policy.weight_bits,
        "cache_bits": policy.cache_bits,
        "overlap": policy.overlap,
        "bytes": {kind: {tier: plan.memory[tier].get(kind, 0) for tier in TIERS} for kind in KIND_LABELS},
        "free_bytes": {tier: plan.budgets[tier] - sum(plan.memory[tier].values()) for tier in TIERS},
        "pass_seconds": plan.pass_seconds,
        "passes": plan.passes,
        "job_seconds": plan.seconds,
        "launch_seconds": plan.launch_seconds,
        "resource_seconds": plan.resource_seconds,
        "resource_work": plan.work,
        "tokens_per_second_per_gib": plan.tokens_per_second_per_gib,
        "linear_programs": plan.linear_programs,
        "search_seconds": plan.search_seconds,
    }


def explain(plan: Plan) -> str:
    """The plan for a reader; `memory_table` and `resource_table` are its two tables."""
    policy, lines = plan.policy, []
    lines.append(f"{plan.shape.name} on {plan.hardware.name}")
    percent = " ".join(f"{x:.4g}" for x in policy.percent)
    lines.append(
        f"policy: percent {percent}, micro-batches {policy.gpu_batch_size} x {policy.num_gpu_batches}" + extras(plan)
    )
    lines += ["", *memory_table(plan), "", *resource_table(plan), ""]
    slowed = f" ({plan.limiting_row})" if plan.limiting_row != plan.limiting_resource else ""
    lines.append(
        f"limited by {plan.limiting_resource}{slowed}; launching ticks {plan.launch_seconds:.4g} s of a pass of "
        f"{plan.pass_seconds:.4g} s"
    )
    over = "the job" if plan.seconds is not None else "a job without end"
    bound = f"bound {plan.bound_tokens_per_second:.4g} ({plan.fraction_of_bound:.1%} of bound)"
    lines.append(f"predicted {plan.predicted_tokens_per_second:.4g} tok/s over {over}, {bound}")
    if plan.seconds is not None:
        lines.append(
            f"the job: {plan.passes:.0f} passes, {plan.seconds:.4g} s; with a full block "
            f"{plan.steady_tokens_per_second:.4g} tok/s"
        )
    if plan.machine_bound_tokens_per_second:
        lines.append(
            f"no policy on this machine can exceed {plan.machine_bound_tokens_per_second:.4g} tok/s with these bits "
            "and lengths"
        )
    lines += what_more_memory_buys(plan)
    if plan.missing:
        lines.append(
            "DOES NOT FIT: missing " + ", ".join(f"{size_text(size)} on {tier}" for tier, size in plan.missing.items())
        )
    if plan.linear_programs:
        lines.append(f"search: {plan.linear_programs} linear programs in {plan.search_seconds:.1f} s")
    return "\n".join(lines)


def extras(plan: Plan) -> str:
    policy = plan.policy
    parts = [
        f"weights {policy.weight_bits} bit",
        f"cache {policy.cache_bits} bit",
        f"CPU attention {policy.cpu_attention:.0%} of the CPU's sequences",
    ]
    budget = f", at most {policy.prefill_budget} of a micro-batch" if policy.prefill_budget else ""
    parts.append(f"prompt chunks of {policy.prefill_chunk} tokens{budget}")
    if not policy.overlap:
        parts.append("no overlap")
    return ", " + ", ".join(parts)


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
    lines = [f"{'average pass':28s}{'demand':>16s}{'seconds':>10s}{'busy':>8s}"]
    for name in plan.told_rows:
        work, seconds = plan.work.get(name), plan.row_seconds[name]
        unit, size = fitting_unit(work or 0, FLOPS if name == "gpu_compute" else BINARY)
        demand = f"{work / size:.3f} {unit}" if work else "-"
        lines.append(f"{name:28s}{demand:>16s}{seconds:10.4f}{seconds / plan.pass_seconds:8.0%}")
    return lines


def what_more_memory_buys(plan: Plan) -> list[str]:
    """One line a tier that limits, from the duals of the linear program; they hold for the block's sizes as chosen."""
    gains = {
        tier: gain
        for tier, gain in plan.tokens_per_second_per_gib.items()
        if gain > 1e-4 * plan.predicted_tokens_per_second
    }
    if not plan.tokens_per_second_per_gib:
        return []
    if not gains:
        return ["1 GiB more on any tier buys nothing at this block size"]
    return [f"1 GiB more on {tier} buys {gain:.3g} tok/s" for tier, gain in gains.items()]
