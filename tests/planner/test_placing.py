"""When weights are placed, and when they move: nothing before a job is known, for the job that is there, and anew for
one that gains by it."""

from __future__ import annotations

import logging
import math

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.policy.policy import Split
from flexbatch.validation.errors import CheckpointError, DoesNotFitError
from tests.planner.test_choosing import plan
from tests.tiny_models import make_model, random_prompts

GIB = 2**30


def params(max_tokens: int, **more):
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **more)


def open_tiny(reference, folder, **settings):
    return LLM(str(reference.folder), device="cpu", hardware="cpu", offload_dir=str(folder), **settings)


def test_nothing_is_placed_before_a_job_is_known(reference, tmp_path):
    model = reference("llama")
    with open_tiny(model, tmp_path, gpu_memory="2400KiB", cpu_memory="1MiB") as llm:
        assert llm.tiers.gpu.total_used_bytes == llm.tiers.cpu.total_used_bytes == 0
        llm.prepare(model.prompts[:1], params(2))
        assert llm.tiers.gpu.total_used_bytes > 0 and llm.report()["load_seconds"] > 0


def test_a_stream_places_for_what_it_has_seen(reference, tmp_path):
    model = reference("llama")
    with open_tiny(model, tmp_path, gpu_memory="2400KiB", cpu_memory="1MiB") as llm:
        done = dict(llm.stream((key, prompt, params(3)) for key, prompt in enumerate(model.prompts)))
        assert {key: len(each.token_ids) for key, each in done.items()} == dict.fromkeys(range(len(model.prompts)), 3)
        assert llm.planner.problem.job.num_requests == len(model.prompts)


@pytest.mark.parametrize("percent", [None, (100, 0, 100, 0, 100, 0)])
def test_what_cannot_run_is_refused_at_once(percent, reference, tmp_path):
    """Budgets that do not hold one sequence, a checkpoint without one of its tensors."""
    model = reference("llama")
    with pytest.raises(DoesNotFitError):
        open_tiny(model, tmp_path, gpu_memory="20KiB", cpu_memory="20KiB", percent=percent)
    make_model("llama", tmp_path / "model")
    from safetensors.torch import load_file, save_file

    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="lack"):
        LLM(str(tmp_path / "model"), device="cpu", percent=percent, hardware="cpu")


@pytest.mark.parametrize("known", ["prepared", "when the engine is made"])
def test_the_job_that_weights_were_placed_for_is_planned_once(known, reference, tmp_path, monkeypatch):
    """Runs of every command searched for a better placement right after they had chosen one: 4 s of OPT-30B's 9."""
    from flexbatch.planner import planner

    searched, choose = [], planner.choose_policy
    monkeypatch.setattr(planner, "choose_policy", lambda problem, *more: searched.append(1) or choose(problem, *more))
    monkeypatch.setattr(planner, "could_gain", lambda *_: True)
    settings = {"device": "cpu", "hardware": "cpu", "offload_dir": str(tmp_path), "cpu_memory": "1MiB"}
    config = EngineConfig(model=str(reference("llama").folder), gpu_memory="2400KiB", **settings)
    job = Job.alike(3, 9, 4, 64) if known == "when the engine is made" else None
    prompts = random_prompts([9, 9, 9])
    with LLM.from_config(config, job=job) as llm:
        if job is None:
            llm.prepare(prompts, params(4))
        llm.generate(prompts, params(4))
        assert len(searched) == 1
        llm.generate(random_prompts([60] * 40), params(4))
        assert len(searched) > 1, "another kind of job is looked at"


def test_weights_move_for_a_job_that_gains_by_it(reference, tmp_path, caplog, monkeypatch):
    """Many long sequences leave no memory for weights on the gpu tier; for a few short ones all of them fit there. The
    job saves milliseconds, which nobody searches for."""
    from flexbatch.planner import planner, relocation

    could_gain = planner.could_gain
    monkeypatch.setattr(planner, "could_gain", lambda *given: could_gain(*given[:-1], 0.0))
    monkeypatch.setattr(relocation, "MOVED_BYTES_PER_SECOND", float("inf"))
    model = reference("llama")
    many, few = random_prompts([60] * 40), model.prompts[:2]
    caplog.set_level(logging.INFO, "flexbatch")
    with open_tiny(model, tmp_path, gpu_memory="1700KiB", cpu_memory="4MiB") as llm:
        llm.generate(many, params(8))
        before, read = llm.policy.weights, llm.report()["loaded_bytes"]
        assert before.gpu < 1
        done = llm.generate(few, params(12))
        assert [each.token_ids for each in done] == [
            each.token_ids for each in reference_tokens(model, tmp_path / "other", few, params(12))
        ]
        assert llm.policy.weights.gpu > before.gpu
        assert "weights move: the job should take" in caplog.text
        assert llm.report()["loaded_bytes"] == read
        llm.weights.check()
        llm.tiers.check()


@pytest.mark.parametrize(("search_seconds", "rate"), [(0.0, 1e4), (1e9, math.inf)], ids=["moving", "searching"])
def test_weights_stay_for_a_job_that_saves_less_than_it_takes(
    reference, tmp_path, caplog, monkeypatch, search_seconds, rate
):
    """A job of 1.5 s had 4.2 GiB moved to save 0.3; that took 5.3, and the next job searched and moved them back."""
    from flexbatch.planner import planner, relocation

    could_gain = planner.could_gain
    monkeypatch.setattr(planner, "could_gain", lambda *given: could_gain(*given[:-1], search_seconds))
    monkeypatch.setattr(relocation, "MOVED_BYTES_PER_SECOND", rate)
    model = reference("llama")
    caplog.set_level(logging.INFO, "flexbatch")
    with open_tiny(model, tmp_path, gpu_memory="1700KiB", cpu_memory="4MiB") as llm:
        llm.generate(random_prompts([60] * 40), params(8))
        before = llm.policy.weights
        llm.generate(model.prompts[:2], params(12))
        assert llm.policy.weights == before and "weights move" not in caplog.text


def reference_tokens(model, folder, prompts, sampling):
    with open_tiny(model, folder, gpu_memory="64MiB", cpu_memory="64MiB") as llm:
        return llm.generate(prompts, sampling)


def test_what_the_user_places_does_not_move(reference, tmp_path):
    model = reference("llama")
    settings = {"gpu_memory": "1700KiB", "cpu_memory": "4MiB", "percent": (0, 100, 0, 100, 100, 0)}
    with open_tiny(model, tmp_path, **settings) as llm:
        llm.generate(random_prompts([60] * 40), params(8))
        llm.generate(model.prompts[:2], params(12))
        assert llm.policy.weights == Split(0, 1)


@pytest.mark.parametrize(
    ("model", "gpu", "cpu", "job", "on_gpu"),
    [
        ("opt-125m", "5GiB", "5GiB", Job((60,) * 40, (40,) * 40), True),
        ("opt-125m", "900MiB", "5GiB", Job((60,) * 40, (40,) * 40), True),
        ("opt-350m", "8GiB", "8GiB", Job((300,) * 67, (250,) * 67), True),
        ("llama-2-13b", "10GiB", "40GiB", Job((191,) * 64, (128,) * 64), False),
        ("opt-6.7b", "8GiB", "40GiB", Job((543,) * 23, (512,) * 23), False),
    ],
)
def test_nothing_leaves_a_tier_that_holds_it(model, gpu, cpu, job, on_gpu):
    policy = plan(model, job, gpu_memory=gpu, cpu_memory=cpu, hardware="cpu" if on_gpu else "h200")["policy"]
    kinds = [policy[kind] for kind in ("weights", "cache", "activations")]
    assert not any(split["disk"] for split in kinds)
    if on_gpu:
        assert all(split["gpu"] == 1 for split in kinds)


def test_a_planner_without_a_job_measures_and_searches_nothing(monkeypatch, reference):
    from flexbatch.planner.planner import Planner

    monkeypatch.setattr("flexbatch.calibrate.machine.this_machine", lambda *arguments, **more: pytest.fail("measured"))
    monkeypatch.setattr("flexbatch.planner.choose.choose", lambda *arguments: pytest.fail("searched"))
    folder = str(reference("llama").folder)
    planner = Planner(EngineConfig(model=folder, device="cpu", gpu_memory="1200KiB", cpu_memory="1MiB"))
    assert planner.placed is None
