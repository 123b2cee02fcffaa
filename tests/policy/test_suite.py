"""The suite runs hand-placed and chosen plans of the same job beside each other."""

from __future__ import annotations

import json
import sys

import pytest

from benchmark import suite
from benchmark.observed import fixed_by
from benchmark.scenarios import PLACED_BY_HAND, SCENARIOS
from benchmark.shares import layers_of, part_of
from flexbatch import LLM
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_chosen_plan_keeps_the_job_and_what_is_no_placement(name):
    by_hand, chosen = SCENARIOS[name], SCENARIOS[name].with_chosen_plan
    assert not set(PLACED_BY_HAND) & chosen.settings.keys()
    assert {**by_hand.settings, **chosen.settings} == by_hand.settings
    assert (chosen.model, chosen.gpu_gib, chosen.num_prompts, chosen.prompt_len, chosen.gen_len) == (
        by_hand.model, by_hand.gpu_gib, by_hand.num_prompts, by_hand.prompt_len, by_hand.gen_len,
    )  # fmt: skip


def test_both_run_and_are_compared(monkeypatch, tmp_path, capfd):
    rates = {"opt-30b-4-4": 200.0, "opt-30b-4-4 chosen": 190.0, "llama-3-70b-4-4": 800.0}
    ran = []

    def run(name, scenario, loaded, overrides, trace, share):
        ran.append((name, "percent" in scenario.settings, scenario.num_prompts, share))
        return {"scenario": name, "tokens_per_second": rates[name], "predicted_tokens_per_second": rates[name] + 1}

    monkeypatch.setattr(suite, "run", run)
    names = ["opt-30b-4-4", "llama-3-70b-4-4"]
    monkeypatch.setattr(sys, "argv", ["suite", "--scenarios", *names, "--chosen", "--num-prompts", "7", "--share", "3"])
    assert suite.main() == 0
    # Where nothing was placed by hand there is nothing to compare.
    assert ran == [("opt-30b-4-4", True, 7, 3), ("opt-30b-4-4 chosen", False, 7, 3), ("llama-3-70b-4-4", False, 7, 3)]
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    rates = {"predicted": 191.0, "chosen": 190.0, "placed": 200.0, "share_of_hand_placed": 0.95}
    assert lines[3:] == [{"scenario": "opt-30b-4-4 chosen", **rates}]


@pytest.mark.parametrize("chosen", [False, True])
def test_a_part_of_the_layers_runs_by_the_plan_of_all(chosen):
    by_hand = SCENARIOS["opt-30b-16-4"]
    scenario = by_hand.with_chosen_plan if chosen else by_hand
    settings = {**scenario.settings, "hardware": "h200"}
    job = Job((543,) * 300, (512,) * 300)

    def planned(scenario, settings):
        config = EngineConfig(model=scenario.model, dummy_weights=True, **scenario.engine_settings(settings))
        return LLM.plan(config, job)["plan"]

    part, fixed = part_of(scenario, settings, 5, [512] * 300)
    assert (layers_of(part.model), fixed["cpu_memory"]) == (10, f"{122 / 5 + 8:.3f}GiB")
    # It fits, and is what all layers have.
    assert fixed_by(planned(part, fixed).policy) == fixed_by(planned(scenario, settings).policy)
    assert part_of(scenario, settings, 1, [512] * 300) == (scenario, settings)


ROWS = {"opt-30b-16-16": 92, "opt-30b-16-4": 300, "opt-30b-4-4": 448, "llama-3-70b-4-16": 384}


@pytest.mark.parametrize("hardware", ["h200", "RTX 4090"])
@pytest.mark.parametrize("name", ROWS)
def test_no_placement_by_hand_is_priced_better_than_what_is_chosen(name, hardware):
    """One block, in which the search does best with the right number of passes that read prompts."""
    by_hand, job = SCENARIOS[name], Job((543,) * ROWS[name], (512,) * ROWS[name])

    def rate(scenario, **settings):
        settings = {**scenario.settings, "hardware": hardware, "cpu_memory": "118GiB", **settings}
        config = EngineConfig(model=scenario.model, dummy_weights=True, **scenario.engine_settings(settings))
        return LLM.plan(config, job)["plan"].predicted_tokens_per_second

    chosen = rate(by_hand.with_chosen_plan)
    sizes = {each: by_hand.settings[each] for each in ("gpu_batch_size", "num_gpu_batches", "prefill_budget")}
    assert chosen >= 0.99 * rate(by_hand)
    # Nor where only the block is given, and the rest is placed as well as can be.
    assert chosen >= 0.98 * rate(by_hand.with_chosen_plan, **sizes)
