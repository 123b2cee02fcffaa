"""What a run says about itself, as text: where things are, how fast it was, what every resource did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexbatch.policy.units import BINARY, DECIMAL, duration_text, fitting_unit
from flexbatch.trace import RESOURCES

TIERS = ("gpu", "cpu", "disk")
EMPTY = ("", "", "")
TOLD_SET_UP = 0.05
"""Share of a run from which on the report says what was set up."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces: the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(
        [
            "  " + aligned(lines[0]),
            "  " + "  ".join("-" * width for width in widths),
            *("  " + aligned(line) for line in lines[1:]),
        ]
    )


def whole(report: Mapping[str, Any]) -> str:
    """Every table that a report has something for."""
    parts = placement, throughput, job, prediction, speculation, resources
    return "\n\n".join(text for part in parts if (text := part(report)))


def placement(report: Mapping[str, Any]) -> str:
    """The settings of the policy, and where everything is."""
    policy = report["policy"]
    sizes = ("gpu_batch_size", "num_gpu_batches", "weight_bits", "cache_bits", "prefill_chunk", "overlap")
    settings = ", ".join(f"{name.replace('_', ' ')} {policy[name]}" for name in sizes)
    head = f"placement ({settings}, cpu attention {policy['cpu_attention']:.0%})"
    return "\n".join(part for part in (head, shares(report), memory(report), cache_of_a_token(report)) if part)


def cache_of_a_token(report: Mapping[str, Any]) -> str:
    """Of the longest sequence; empty before a run."""
    found = report.get("cache")
    if not found:
        return ""
    kept = f", {found['window_layers']} layers keep {found['window_tokens']:,} tokens" if found["window_layers"] else ""
    size = f"{found['bytes_per_token'] / 1024:,.2f} KiB"
    return f"  cache: {size} a token of a sequence of {found['sequence_tokens']:,}{kept}"


def shares(report: Mapping[str, Any]) -> str:
    """Requested and realized shares of every kind of tensor on every tier; before a run only the weights are
    placed."""
    policy, realized = report["policy"], report["realized_percent"]
    rows = []
    for kind in ("weights", "cache", "activations"):
        asked = [f"{100 * policy[kind][tier]:.1f}" for tier in TIERS]
        rows.append([kind, *asked, *(f"{realized[kind][tier]:.1f}" if realized.get(kind) else "-" for tier in TIERS)])
    return table(["% of", *TIERS, *(f"real {tier}" for tier in TIERS)], rows)


def memory(report: Mapping[str, Any]) -> str:
    """What needs how much on which tier, against the budgets, and the peak where it was measured."""
    needs, budgets, peaks = report.get("memory", []), report.get("budgets", {}), report.get("peak_bytes", {})
    unit, size = fitting_unit(max((need["num_bytes"] for need in needs), default=0), BINARY)

    def line(name: str, num_bytes: Mapping[str, int]) -> list[str]:
        return [name, *(f"{num_bytes[tier] / size:,.2f}" if num_bytes.get(tier) else "-" for tier in TIERS)]

    def total(what: str | None) -> dict[str, int]:
        return {
            tier: sum(need["num_bytes"] for need in needs if need["tier"] == tier and what in (None, need["what"]))
            for tier in TIERS
        }

    rows = [line(name, total(name)) for name in dict.fromkeys(need["what"] for need in needs)]
    rows += [line("needed", total(None)), *([line("peak", peaks)] if peaks else []), line("budget", budgets)]
    return table([unit, *TIERS], rows)


def throughput(report: Mapping[str, Any]) -> str:
    """What was generated, how fast, and the traffic of every resource."""
    seconds = report["seconds"]
    rows = [
        ["requests", f"{report['requests']:,}", _rate(report["requests"], seconds)],
        ["prompt tokens", f"{report['prompt_tokens']:,}", _rate(report["prompt_tokens"], seconds)],
        ["generated tokens", f"{report['generated_tokens']:,}", _rate(report["generated_tokens"], seconds)],
        ["passes", f"{report['passes']:,}", _rate(report["passes"], seconds)],
    ]
    preempted = report.get("preemptions") or {}
    if preempted.get("total"):
        rows.append(["sequences put aside", f"{preempted['total']:,}", _rate(preempted["total"], seconds)])
        rows.append(
            ["tokens read anew", f"{preempted['recomputed_tokens']:,}", _rate(preempted["recomputed_tokens"], seconds)]
        )
    simulated = (report.get("speculation") or {}).get("simulated_acceptance")
    label = "" if simulated is None else f", SIMULATED acceptance {simulated:g}: the tokens mean nothing"
    set_up = report.get("set_up_seconds", 0.0)
    made = f", {duration_text(set_up)} of it setting up" if set_up else ""
    text = (
        f"throughput ({duration_text(seconds)}{made}, and {duration_text(report['load_seconds'])} to "
        f"load{label})\n{table(['', 'count', 'per second'], rows)}"
    )
    if set_up > TOLD_SET_UP * seconds:
        parts = (
            f"{each['count']:,} {kind.replace('_', ' ')} in {duration_text(each['seconds'])}"
            for kind, each in report["set_up"].items()
        )
        text += f"\n  set-up: {', '.join(parts)}"
    experts = report.get("experts") or {}
    if experts:
        text += (
            f"\n  experts: {experts['distinct_per_pass']:,.1f} of {experts['count']} in a pass and layer, Gini "
            f"{experts['gini']:.2f} (least even layer {experts['largest_gini']:.2f}), the busiest has "
            f"{experts['busiest']:.1f} times the mean"
        )
    moved = {name: count for name, count in report.get("moved_bytes", {}).items() if count}
    if moved:
        unit, size = fitting_unit(max(moved.values()), DECIMAL)
        traffic = [
            [name.replace("_", " "), f"{count / size:,.2f}", _rate(count / size, seconds)]
            for name, count in moved.items()
        ]
        text += "\n" + table(["traffic", unit, f"{unit}/s of the run"], traffic)
    return f"{text}\n{engines(report)}" if report.get("engines") else text


def engines(report: Mapping[str, Any]) -> str:
    """What each of several engines did of it."""
    rows = []
    for number, run in enumerate(report["engines"]):
        rate = run["generated_tokens"] / report["seconds"] if report["seconds"] else 0.0
        passes, busy = f"{run['passes']:,}", f"{run['seconds']:,.3g}"
        rows.append(
            [f"engine {number}", f"{run['requests']:,}", f"{run['generated_tokens']:,}", f"{rate:,.2f}", passes, busy]
        )
    return table(["", "requests", "new tokens", "per second", "passes", "s in passes"], rows)


def job(report: Mapping[str, Any]) -> str:
    """Passes, time and answers of the last job beside what was expected of them; empty where it was not known whole.
    Seconds only where the machine's rates are known."""
    run = report.get("job")
    if not run:
        return ""

    def line(name: str, predicted: float | None, measured: float) -> list[str]:
        if predicted is None:
            return [name, "-", f"{measured:,.4g}", "-"]
        return [name, f"{predicted:,.4g}", f"{measured:,.4g}", f"{100 * (measured / predicted - 1):+.0f} %"]

    rows = [
        line("passes", run["predicted_passes"], run["measured_passes"]),
        line("seconds", run.get("predicted_seconds"), run["measured_seconds"]),
        line("tokens of an answer", run["assumed_answer_tokens"], run["measured_answer_tokens"]),
    ]
    if "replanned_passes" in run:
        # What was known before the first answers, and at the last re-plan.
        rows.append(line("passes, re-planned", run["replanned_passes"], run["measured_passes"]))
        rows.append(line("seconds, re-planned", run.get("replanned_seconds"), run["measured_seconds"]))
        rows.append(line("tokens of an answer", run["replanned_answer_tokens"], run["measured_answer_tokens"]))
    waves = "1 wave" if run["waves"] == 1 else f"{run['waves']:,} waves"
    tail = ""
    if run["tail_passes"]:
        cost = f", {run['tail_seconds']:.3g} s" if "tail_seconds" in run else ""
        tail = f"; the last {run['tail_passes']:,} passes with {run['tail_sequences']:.1f} sequences{cost}"
    head = f"the job ({run['sequences']:,} sequences in {waves}{tail})"
    return f"{head}\n{table(['', 'predicted', 'measured', 'off'], rows)}"


def prediction(report: Mapping[str, Any]) -> str:
    """The plan beside the run: tokens per second, seconds of the passes, and of every resource in them its time,
    work, rate and share of the rate that the machine was measured at; empty where nothing was planned."""
    run = report.get("prediction")
    if not run:
        return ""

    def line(name: str, predicted: float, measured: float) -> list[str]:
        return [
            name,
            f"{predicted:,.4g}",
            f"{measured:,.4g}",
            f"{100 * (measured / predicted - 1):+.0f} %" if predicted and measured else "-",
        ]

    rows = [
        [*line("tokens/s of the job", run["predicted_tokens_per_second"], run["measured_tokens_per_second"]), *EMPTY]
    ]
    rows.append(
        [
            *line(f"seconds of {run['passes']:,} passes", run["predicted_pass_seconds"], run["measured_pass_seconds"]),
            *EMPTY,
        ]
    )
    for name, use in run["resources"].items():
        if use["predicted_seconds"] or use["measured_seconds"]:
            rows.append(
                [
                    *line(
                        f"{RESOURCES.get(name, name.replace('_', ' '))}, busy s",
                        use["predicted_seconds"],
                        use["measured_seconds"],
                    ),
                    *_done(name, use),
                ]
            )
    bound = run["bound_tokens_per_second"]
    share = f"; the run reached {100 * run['measured_tokens_per_second'] / bound:.0f} % of it" if bound else ""
    head = f"plan and run (limited by {run['limiting_resource']}; bound of this policy {bound:,.4g} tokens/s{share})"
    reasons = run["replans"]
    times = "once" if len(reasons) == 1 else f"{len(reasons)} times, the last one"
    changes = f"\n  re-planned {times}: {reasons[-1]}" if reasons else ""
    return (
        f"{head}\n{table(['', 'predicted', 'measured', 'off', 'work', 'while busy', '% of its best'], rows)}{changes}"
    )


def _done(name: str, use: Mapping[str, float]) -> tuple[str, str, str]:
    """Work, rate while busy, and the rate's share of what the machine was measured at."""
    if not use["work"] or not use["measured_seconds"]:
        return ("-", "-", "-")
    unit, size = ("TFLOP", 1e12) if name == "gpu_compute" else ("GB", 1e9)
    rate = use["work"] / use["measured_seconds"]
    return (f"{use['work'] / size:,.4g} {unit}", f"{rate / size:,.4g} {unit}/s", f"{100 * rate / use['ceiling']:.0f}")


def _rate(count: float, seconds: float) -> str:
    return f"{count / seconds:,.2f}" if seconds else "-"


def _speed_up(whole: float, by_turn: Sequence[float]) -> str:
    """With the least and the most of turns, which tell how far the machine's other work disturbs it."""
    return f"{whole:.2f} ({min(by_turn):.2f} to {max(by_turn):.2f} in {len(by_turn)} turns)"


def speculation(report: Mapping[str, Any]) -> str:
    """What drafting was worth: tokens per pass, acceptance by position in the tree, and plain decoding beside it; empty
    without a draft."""
    run = report.get("speculation")
    if not run:
        return ""
    label = "" if run["simulated_acceptance"] is None else f", SIMULATED acceptance {run['simulated_acceptance']:g}"
    rows = [
        ["tokens per sequence and pass", f"{run['tokens_per_sequence_pass']:.2f}"],
        ["drafted tokens accepted", f"{run['accepted_tokens']:,} of {run['drafted_tokens']:,}"],
        ["drafting, % of time", f"{100 * run['draft_share_of_time']:.1f}"],
    ]
    if "speed_up" in run:
        rows += [
            ["plain decoding, tokens/s", f"{run['plain_tokens_per_second']:,.2f}"],
            ["speed-up over plain", _speed_up(run["speed_up"], run["speed_up_by_turn"])],
        ]
    text = f"speculation ({' + '.join(run['drafts'])}, tree {run['tree']}{label})\n{table(['', 'value'], rows)}"
    for group, acceptance in run["acceptance"].items():
        positions = [
            [f"depth {depth + 1}", *(f"{rate:.3f}" if rate is not None else "-" for rate in row)]
            for depth, row in enumerate(acceptance["by_position"])
        ]
        seen = [row for row in positions if set(row[1:]) != {"-"}]
        if seen:
            text += "\n" + table(
                [f"accepted, {group}", *(f"child {rank + 1}" for rank in range(len(seen[0]) - 1))], seen
            )
    return text


def resources(report: Mapping[str, Any]) -> str:
    """What every resource did, by the passes that were timed; empty without a trace."""
    if report.get("engines"):
        found = [(number, resources_of(run)) for number, run in enumerate(report["engines"])]
        return "\n".join(f"engine {number}: {text}" for number, text in found if text)
    return resources_of(report)


def resources_of(report: Mapping[str, Any]) -> str:
    """Of one engine."""
    uses = report.get("resources") or {}
    unit, size = fitting_unit(max((use["num_bytes"] for use in uses.values()), default=0), DECIMAL)
    rows = []
    for name, use in uses.items():
        share = use["busy"] / use["wall"] if use["wall"] else 0.0
        moved = (
            [f"{use['num_bytes'] / size:,.2f}", f"{use['num_bytes'] / use['busy'] / size:,.2f}"]
            if use["busy"] and use["num_bytes"]
            else ["-", "-"]
        )
        rows.append([RESOURCES.get(name, name), f"{use['busy']:.3f}", f"{100 * share:.1f}", *moved])
    return "resources\n" + table(["", "busy s", "% of wall", unit, f"{unit}/s while busy"], rows) if rows else ""
