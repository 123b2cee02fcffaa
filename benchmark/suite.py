"""Throughput of the engine on a GPU with capped memory: one scenario per line of the table, random weights, random
distinct prompts.

    python -m benchmark.suite --scenarios opt-30b-16-16 opt-30b-16-4 --output results.json
    python -m benchmark.suite --scenarios opt-30b-4-4 --chosen --share 2

Figures are generated tokens / (prefill + decode) seconds of a whole job, start-up and drain included; nothing is
projected. With --chosen every scenario runs twice, placed by hand and by the plan that the engine chooses; what was
predicted for that, both rates and their ratio are told. Neighboring scenarios of one model with the same settings
share its weights, which are loaded once.

``--share N`` runs one N-th of the layers, chosen by the plan of all (`benchmark.shares`); "layers" and "of_layers" say
so, and tokens per second are those of the part. What is compared is then the same share of both.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmark.machine import machine
from benchmark.scenarios import GIB, SCENARIOS, Scenario
from benchmark.shares import layers_of, part_of
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.stdout import data_apart, run_process


def cap_gpu_memory(gib: float) -> Any:
    """Hold the process to ``gib``: the allocator's fraction, and a ballast in the rest of the card. Returns the
    ballast."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    free = torch.cuda.mem_get_info()[0]
    ballast = torch.empty(max(0, int(free - gib * GIB)), dtype=torch.uint8, device="cuda")
    torch.cuda.set_per_process_memory_fraction(min(1.0, (ballast.numel() + gib * GIB) / total))
    return ballast


def prompts_of(scenario: Scenario, vocab_size: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    low, high = scenario.prompt_len
    return [
        [generator.randrange(10, vocab_size) for _ in range(generator.randint(low, high))]
        for _ in range(scenario.num_prompts)
    ]


class Loaded:
    """The engine of the latest scenario with its ballast, kept for the next one where that fits."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.ballast: Any = None
        self.kind: tuple[Any, ...] = ()

    def engine(self, scenario: Scenario, settings: dict[str, Any], trace: bool) -> tuple[Any, bool]:
        """An engine for the scenario, the loaded one when only prompts and lengths differ; and whether it was loaded
        now."""
        import torch

        from flexbatch import LLM

        kind = (scenario.model, scenario.gpu_gib, scenario.reserve_gib, settings, trace)
        fresh = self.llm is None or kind != self.kind
        if fresh:
            self.close()
            self.ballast = cap_gpu_memory(scenario.gpu_gib) if torch.cuda.is_available() else None
            self.llm = LLM(scenario.model, dummy_weights=True, trace=trace, **scenario.engine_settings(settings))
            self.kind = kind
        return self.llm, fresh

    def peak_gpu_gib(self) -> float | None:
        import torch

        return (torch.cuda.max_memory_allocated() - self.ballast.numel()) / GIB if self.ballast is not None else None

    def close(self) -> None:
        """Give everything back, also after a failure."""
        import torch

        if self.llm is not None:
            self.llm.close()
        self.llm = self.ballast = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def warm_up(llm: Any, scenario: Scenario, prompts: list[list[int]]) -> None:
    """Kernels compile, graphs are captured and the link wakes up: a small block whole, of a large one a few prompts
    and two tokens each. Speculation first decodes plainly, and its first tree comes a pass later."""
    from flexbatch import SamplingParams

    small = len(prompts) <= 32
    few, gen_len = (prompts[: len(prompts) // 2], scenario.gen_len) if small else (prompts[: len(prompts) // 50], 2)
    if "draft" in scenario.settings:
        few, gen_len = prompts[:4], 6
    llm.generate(few, SamplingParams(max_tokens=gen_len, temperature=0, ignore_eos=True))


def run(
    name: str, scenario: Scenario, loaded: Loaded, overrides: dict[str, Any], trace: Path | None, share: int = 1
) -> dict[str, Any]:
    """Run one scenario, or a part of its layers; returns what it measured."""
    from flexbatch import SamplingParams

    of_layers, settings = layers_of(scenario.model), {**scenario.settings, **overrides}
    prompts = prompts_of(scenario, SHAPES[scenario.model]["vocab_size"], 1)
    scenario, settings = part_of(scenario, settings, share, [len(prompt) for prompt in prompts])
    started = time.perf_counter()
    llm, fresh = loaded.engine(scenario, settings, trace is not None)
    params = SamplingParams(max_tokens=scenario.gen_len, temperature=0, ignore_eos=True)
    llm.prepare(prompts, params)
    if fresh:
        warm_up(llm, scenario, prompts)
    ready, plan = time.perf_counter(), llm.engine_plan.plan
    before = llm.report()
    completions = llm.generate(prompts, params)
    report = llm.report()
    # With compare_plain the job ran twice or more: these are the seconds of the run that gave the completions.
    seconds = report["seconds"] - before["seconds"]
    generated = sum(len(completion.token_ids) for completion in completions)
    assert generated == scenario.num_prompts * scenario.gen_len, (generated, scenario)
    if trace is not None:
        llm.tracer.write(trace)
    speculation = speculation_of(before["speculation"], report["speculation"]) if "speculation" in report else {}
    # All turns of the same job move bytes.
    moving_seconds = speculation.get("plain_seconds", 0.0) + speculation.get("compared_seconds", seconds)
    moved = {
        resource: report["moved_bytes"][resource] - before["moved_bytes"].get(resource, 0)
        for resource in report["moved_bytes"]
    }
    return {
        "scenario": name,
        **asdict(scenario),
        "settings": settings,
        "layers": llm.arch.num_layers,
        "of_layers": of_layers,
        "seconds": seconds,
        "wall_seconds": time.perf_counter() - ready,
        "generated_tokens": generated,
        "tokens_per_second": generated / seconds,
        "predicted_tokens_per_second": plan.predicted_tokens_per_second if plan else None,
        "setup_seconds": ready - started,
        "passes": report["passes"] - before["passes"],
        "moved_bytes": moved,
        "link_GBps": moved.get("h2d", 0) / moving_seconds / 1e9,
        "cpu_attention_GBps": moved.get("cpu_attention", 0) / moving_seconds / 1e9,
        "resources": report["resources"],
        **({"speculation": speculation} if speculation else {}),
        "memory": report["memory"],
        "peak_gpu_gib": loaded.peak_gpu_gib(),
    }


def variants(names: list[str], changes: dict[str, Any], chosen: bool) -> dict[str, Scenario]:
    """The scenarios that are run, by name."""
    found = {}
    for name in names:
        found[name] = by_hand = replace(SCENARIOS[name], **changes)
        if chosen and by_hand.with_chosen_plan.settings != by_hand.settings:
            found[f"{name} chosen"] = by_hand.with_chosen_plan
    return found


def beside_hand_placed(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens a second of each chosen plan that ran beside a hand-placed one, what was predicted, and the share of the
    hand-placed one's throughput."""
    ran = {each["scenario"]: each for each in results if "tokens_per_second" in each}
    found = []
    for name, chosen in ran.items():
        by_hand = name.removesuffix(" chosen")
        if by_hand != name and by_hand in ran:
            rates = {"chosen": chosen["tokens_per_second"], "placed": ran[by_hand]["tokens_per_second"]}
            predicted = {"predicted": chosen.get("predicted_tokens_per_second")}
            share = {"share_of_hand_placed": rates["chosen"] / rates["placed"]}
            found.append({"scenario": name, **predicted, **rates, **share})
    return found


def speculation_of(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What one job added to the engine's figures on speculation; what was learned is that of all jobs."""
    counted = (
        "passes",
        "drafted_tokens",
        "accepted_tokens",
        "emitted_tokens",
        "sequence_passes",
        "draft_seconds",
        "pass_seconds",
    )
    result = {name: after[name] - before[name] for name in counted}
    result |= {name: after[name] for name in ("drafts", "tree", "simulated_acceptance", "acceptance", "costs")}
    if "plain_seconds" in after:
        names = ("plain_seconds", "plain_passes", "plain_tokens", "compared_seconds", "compared_tokens")
        turns = {name: after[name] - before.get(name, 0) for name in names}
        rate = turns["plain_tokens"] / turns["plain_seconds"]
        speed_up = turns["compared_tokens"] / turns["compared_seconds"] / rate
        result |= {**turns, "plain_tokens_per_second": rate, "speed_up": speed_up}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scenarios",
        nargs="+",
        default=list(SCENARIOS),
        choices=list(SCENARIOS),
        metavar="NAME",
        help=f"of {', '.join(SCENARIOS)}",
    )
    parser.add_argument("--output", type=Path, help="JSON file; written after every scenario")
    parser.add_argument("--trace", type=Path, help="folder for Perfetto traces")
    parser.add_argument("--chosen", action="store_true", help="also with the plan that the engine chooses")
    parser.add_argument(
        "--num-prompts", type=int, help="prompts instead of the scenario's own number (for a quick look)"
    )
    parser.add_argument("--share", type=int, default=1, metavar="N", help="run one N-th of the layers, as all would be")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=JSON", help="engine settings instead of the scenario's"
    )
    parser.add_argument("--model", help="shape of public weights instead of the scenario's own (for a quick look)")
    arguments = parser.parse_args()
    with data_apart() as data:
        # Chunks of different prompts differ in size; without it the allocator near the cap frees and asks the driver
        # again, which stalls every stream.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        overrides = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.set)}
        changes = {
            name: value for name, value in (("num_prompts", arguments.num_prompts), ("model", arguments.model)) if value
        }
        results, loaded = [], Loaded()
        for name, scenario in variants(arguments.scenarios, changes, arguments.chosen).items():
            trace = arguments.trace / f"{name}.json" if arguments.trace else None
            try:
                results.append(run(name, scenario, loaded, overrides, trace, arguments.share))
            except Exception as error:  # the remaining scenarios still count
                results.append({"scenario": name, "error": f"{type(error).__name__}: {error}"})
                loaded.close()
            shown = {key: value for key, value in results[-1].items() if key not in ("memory", "resources", "settings")}
            print(json.dumps(shown), file=data, flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))
        loaded.close()
        for each in beside_hand_placed(results):
            print(json.dumps(each), file=data)
        return 1 if any("error" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(run_process(main))
