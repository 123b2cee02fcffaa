"""A plan in words, tables and JSON: where everything lives, what each resource has to do, which one limits, what
more memory would buy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexbatch.policy.explain_experts import experts_of, experts_text
from flexbatch.policy.explain_tables import memory_table, resource_table
from flexbatch.policy.explain_windows import windows_of, windows_text
from flexbatch.policy.footprint import KIND_LABELS
from flexbatch.policy.percent import percent_text
from flexbatch.policy.plan import Plan
from flexbatch.policy.policy import TIERS
from flexbatch.policy.units import duration_text, number_text, size_text


def summary(plan: Plan) -> dict:
    """For ``--json``: plain numbers under stable names."""
    policy = plan.policy
    kinds = ("weights", "cache", "activations")
    return {
        "model": plan.shape.name,
        "hardware": plan.hardware.name,
        "hardware_origin": plan.hardware.origin,
        "fits": not plan.missing,
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
        "cpu_experts": policy.cpu_experts,
        "prefill_chunk": policy.prefill_chunk,
        "prefill_budget": policy.prefill_budget,
        "admission_passes": policy.admission_passes,
        "weight_bits": policy.weight_bits,
        "cache_bits": policy.cache_bits,
        "overlap": policy.overlap,
        "bytes": {kind: {tier: plan.memory[tier].get(kind, 0) for tier in TIERS} for kind in KIND_LABELS},
        "free_bytes": {tier: plan.budgets[tier] - sum(plan.memory[tier].values()) for tier in TIERS},
        "pass_seconds": plan.pass_seconds,
        "passes": plan.passes,
        "sequences": plan.num_sequences,
        "stages": plan.shape.stages,
        "experts": experts_of(plan, plan.shape.experts) if plan.shape.experts else None,
        "windows": windows_of(plan) if plan.shape.window_layers else None,
        "waves": plan.waves,
        "tail_passes": plan.tail_passes,
        "tail_sequences": plan.tail_sequences,
        "tail_seconds": plan.tail_seconds,
        "assumed_prompt_tokens": plan.workload.mean_prompt,
        "assumed_answer_tokens": plan.workload.mean_output,
        "job_seconds": plan.seconds,
        "launch_seconds": plan.launch_seconds,
        "first_answer_seconds": plan.first_answer_seconds,
        "predicted_load_seconds": load_seconds(plan),
        "disk_write_bytes": plan.disk_write_bytes,
        "resource_seconds": plan.resource_seconds,
        "resource_work": plan.work,
        "tokens_per_second_per_gib": plan.tokens_per_second_per_gib,
        "linear_programs": plan.linear_programs,
        "search_seconds": plan.search_seconds,
    }


def explain(plan: Plan, placement: str | None = None, smaller_caches: Mapping[int, Plan] | None = None) -> str:
    """The plan for a reader: first what it means for the job, in words, then the tables.

    placement: the engine's exact table of where everything is; without it the plan's own `memory_table` is shown.
    smaller_caches: what was planned with fewer bits of the cache, by these bits.
    """
    lines = [headline(plan), "", *in_words(plan, smaller_caches or {}), "", f"policy: {policy_text(plan)}", ""]
    lines += [placement] if placement else memory_table(plan)
    lines += ["", *resource_table(plan), "", *bounds(plan)]
    return "\n".join(lines)


def headline(plan: Plan) -> str:
    """The model, the machine, and whether the machine's rates were measured."""
    hardware = plan.hardware
    derived = ", its rates derived from published figures, not measured" if hardware.origin == "derived" else ""
    return f"{plan.shape.name} on {hardware.name}{derived}"


def engines_summary(plan: Plan, engines: int) -> dict:
    """`engines_text` for ``--json``."""
    together = engines * plan.predicted_tokens_per_second
    return {"engines": engines, "predicted_tokens_per_second_together": together}


def engines_text(plan: Plan, engines: int) -> str:
    """What several engines that share the prompts of a job make together; empty for one."""
    if engines == 1:
        return ""
    rate = number_text(engines * plan.predicted_tokens_per_second)
    return f"{engines} engines share the prompts: {rate} new tokens/s together. What follows is one of them.\n\n"


def job_text(plan: Plan) -> str:
    prompt, output = plan.workload.columns
    count = plan.num_sequences

    def lengths(tokens: Any) -> str:
        low, high = round(min(tokens)), round(max(tokens))
        return f"{low:,}" if low == high else f"{low:,} to {high:,}"

    prompts = "prompts without end" if count is None else f"{count:,} prompt{'s' if count > 1 else ''}"
    return f"{prompts} of {lengths(prompt)} tokens, {lengths(output)} new tokens each"


def in_words(plan: Plan, smaller_caches: Mapping[int, Plan]) -> list[str]:
    """What a user wants to know first: whether it fits, how fast, how long, what limits and what would help."""
    lines = [("It fits: " if not plan.missing else "IT DOES NOT FIT: ") + job_text(plan) + "."]
    if plan.missing:
        short = ", ".join(f"{size_text(size)} on the {tier} tier" for tier, size in plan.missing.items())
        lines.append(said("missing", short))
    rate, prompts = plan.predicted_tokens_per_second, prompt_rate(plan)
    lines.append(said("speed", f"{number_text(rate)} new tokens/s, beside {number_text(prompts)} prompt tokens/s read"))
    if plan.shape.stages > 1:
        lines.append(said("stages", stages_text(plan)))
    if plan.seconds is not None and plan.first_answer_seconds is not None:
        per_pass = duration_text(plan.pass_seconds)
        lines.append(said("this job", f"{duration_text(plan.seconds)}, in {plan.passes:,.0f} passes of {per_pass}"))
        lines += [said("waves", waves_text(plan)), said("tail", tail_text(plan))]
        load = f"loading the model takes about {duration_text(load_seconds(plan))} before"
        lines.append(said("first answer", f"after {duration_text(plan.first_answer_seconds)}; {load}"))
    if plan.shape.experts is not None:
        lines.append(said("experts", experts_text(plan, plan.shape.experts)))
    if plan.shape.window_layers:
        lines.append(said("windows", windows_text(plan)))
    lines += [said("disk", disk_text(plan)), said("limited by", limit_text(plan))]
    lines.append(said("1 GiB more", what_more_memory_buys(plan)))
    lines += [said(f"{bits}-bit cache", compared(plan, other)) for bits, other in smaller_caches.items()]
    return lines


def waves_text(plan: Plan) -> str:
    """How often the job fills the block, and the lengths that this stands for."""
    waves = "1 wave" if plan.waves == 1 else f"{plan.waves:,} waves"
    prompt, answer = plan.workload.mean_prompt, plan.workload.mean_output
    lengths = f"assumed are prompts of {number_text(prompt)} tokens and answers of {number_text(answer)} on average"
    return f"{waves} of up to {plan.shape.stages * plan.most_in_flight:,.0f} sequences; {lengths}"


def stages_text(plan: Plan) -> str:
    """What the numbers of a pipeline are of."""
    shape = plan.shape
    return (
        f"{shape.stages}, each with a pass of its own in flight; passes, memory and resources are those of the slowest "
        f"stage, of {shape.num_layers} layers{'' if shape.head_tensors else ' without embedding and head'}"
    )


def tail_text(plan: Plan) -> str:
    """What the passes after the last admission cost that are not full."""
    if plan.seconds is None or plan.tail_passes < 0.5:
        return "none: the block is full until the end"
    return (
        f"the last {plan.tail_passes:,.0f} passes run {number_text(plan.tail_sequences)} of {plan.most_in_flight:,.0f} "
        f"sequences and take {duration_text(plan.tail_seconds)}, {plan.tail_seconds / plan.seconds:.0%} of the job"
    )


def said(what: str, text: str) -> str:
    return f"  {what:14s}{text}"


def prompt_rate(plan: Plan) -> float:
    prompt, output = plan.workload.columns
    return plan.predicted_tokens_per_second * float(prompt.sum() / output.sum())


def load_seconds(plan: Plan) -> float:
    """The checkpoint is read once, and what goes to the disk tier is written."""
    hardware, shape = plan.hardware, plan.shape
    stored = shape.total_bytes(plan.policy.weight_bits if shape.stored_block_bytes else 16)
    return stored / hardware.disk_read + plan.disk_write_bytes["weights"] / hardware.disk_write


def disk_text(plan: Plan) -> str:
    written = plan.disk_write_bytes
    over = "during the job" if plan.seconds is not None else "in every pass"
    parts = [f"{size_text(written['weights'])} of weights once"] if written["weights"] else []
    if written["cache and activations"]:
        parts.append(f"{size_text(written['cache and activations'])} of cache and activations {over}")
    return f"writes {' and '.join(parts)}" if parts else "writes nothing"


LIMITS = {
    "h2d": "the link from the host to the GPU",
    "d2h": "the link from the GPU to the host",
    "disk_read": "reading the disk",
    "disk_write": "writing the disk",
    "gpu_compute": "computing on the GPU",
    "gpu_memory": "the GPU's memory bandwidth",
    "cpu_attention": "attention on the CPU",
    "cpu_experts": "experts on the CPU",
    "host_memory": "the host's memory bandwidth",
    "between stages": "hidden states on their way to the next stage",
    "launch": "launching work and waiting in between, while no link and no processor is busy",
}


def limit_text(plan: Plan) -> str:
    name = plan.limiting_resource
    shared = "nothing overlaps" if plan.limiting_row == "no overlap" else f"beside what shares it ({plan.limiting_row})"
    slowed = f"; {shared}" if plan.limiting_row != name != "launch" else ""
    what, verb = LIMITS[name], "" if name == "launch" else "busy "
    if plan.hardware.device == "cpu":
        what = what.replace("on the GPU", "the layers").replace("the GPU's", "the compute tier's")
        what = what.replace("the link from the host to the GPU", "copies to the compute tier")
        what = what.replace("the link from the GPU to the host", "copies from the compute tier")
    return f"{what} ({name}), {verb}{plan.limiting_seconds / plan.pass_seconds:.0%} of the time{slowed}"


def compared(plan: Plan, other: Plan) -> str:
    """Another plan beside this one."""
    change = other.predicted_tokens_per_second / plan.predicted_tokens_per_second - 1
    if abs(change) < 0.01:
        return "no faster"
    took = f", {duration_text(other.seconds)} for the job" if other.seconds is not None else ""
    return f"{number_text(other.predicted_tokens_per_second)} new tokens/s ({change:+.0%}){took}"


def bounds(plan: Plan) -> list[str]:
    """How near the plan is to what the machine could do, and how it was found."""
    bound = number_text(plan.bound_tokens_per_second)
    lines = [f"bound of this policy {bound} tokens/s, of which the plan reaches {plan.fraction_of_bound:.0%}"]
    if plan.seconds is not None:
        lines.append(f"with a full block {number_text(plan.steady_tokens_per_second)} tokens/s")
    if plan.machine_bound_tokens_per_second:
        limit = number_text(plan.machine_bound_tokens_per_second)
        lines.append(f"no policy on this machine can exceed {limit} tokens/s with these bits and lengths")
    if plan.linear_programs:
        lines.append(f"found with {plan.linear_programs:,} linear programs in {duration_text(plan.search_seconds)}")
    return lines


def policy_text(plan: Plan) -> str:
    policy = plan.policy
    percent = percent_text(policy.percent)
    count = policy.num_gpu_batches
    micro_batches = f"{count} micro-batches" if count > 1 else "one micro-batch"
    return f"--percent {percent}, {micro_batches} of {policy.gpu_batch_size}" + extras(plan)


def extras(plan: Plan) -> str:
    policy = plan.policy
    parts = [
        f"weights {policy.weight_bits} bit",
        f"cache {policy.cache_bits} bit",
        f"CPU attention {policy.cpu_attention:.0%} of the CPU's sequences",
    ]
    if plan.shape.experts is not None:
        parts.append(f"CPU experts {policy.cpu_experts:.0%} of those in host memory")
    budget = f", at most {policy.prefill_budget} of a micro-batch" if policy.prefill_budget else ""
    parts.append(f"prompt chunks of {policy.prefill_chunk} tokens{budget}")
    if not policy.overlap:
        parts.append("no overlap")
    return ", " + ", ".join(parts)


def what_more_memory_buys(plan: Plan) -> str:
    """From the duals of the linear program; they hold for the block's sizes as chosen."""
    gains = {
        tier: gain
        for tier, gain in plan.tokens_per_second_per_gib.items()
        if gain > 1e-3 * plan.predicted_tokens_per_second
    }
    if not plan.tokens_per_second_per_gib:
        return "not known: the placement was given or found without a search"
    if not gains:
        return "on any tier buys nothing with a block of this size"
    rate = plan.predicted_tokens_per_second
    parts = [
        f"on the {tier} tier buys {number_text(gain)} tokens/s ({gain / rate:+.1%})" for tier, gain in gains.items()
    ]
    return "; ".join(parts)
