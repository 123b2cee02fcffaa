"""Real ``helm-run``, without network: FlexBatch against HELM's own Hugging Face client on the same tiny model,
metric by metric."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from oracle import make_model

ROOT = Path(__file__).resolve().parents[3]
HELM_RUN = [str(Path(sys.executable).parent / "helm-run")]
INSTALLED = any(point.value == "flexbatch.apps.helm" for point in entry_points(group="helm"))
PLUGIN = () if INSTALLED else ("--plugins", "flexbatch.apps.helm")
"""An installed FlexBatch is found through its entry point, as users have it; a checkout that is not installed is
named."""
SCENARIOS = (
    "simple_mcqa",
    "simple_classification",
    "dyck_language:num_parenthesis_pairs=2",
    "synthetic_reasoning:mode=pattern_match",
    "synthetic_reasoning_natural:difficulty=easy",
)
METHODS = ("multiple_choice_joint", "multiple_choice_separate_original", "multiple_choice_separate_calibrated")
OURS = ("finish_reason_", "inference_", "batch_size")
"""Metrics that differ on purpose: HELM's client gives no finish reason and no batch size, and time is time."""
LOGPROBS = ("logprob", "bits_per_byte", "perplexity", "max_prob", "ece_", "platt_", "selective_")
"""Metrics of the log-probabilities of generated tokens, which HELM's client reports as 0 at temperature 0."""


@pytest.fixture(scope="module")
def model(folder):
    return make_model(folder / "models" / "llama")


def question(number: int, text: str | None = None) -> dict:
    text = text or f"Question number {number}: what is {number} plus {number % 7}?"
    references = [
        {"output": {"text": f"{number + number % 7 + d} apples"}, "tags": ["correct"] if d == number % 4 else []}
        for d in range(4)
    ]
    return {"input": {"text": text}, "references": references, "split": "test", "id": f"id{number}"}


def write_questions(path: Path, count: int, **texts: str) -> Path:
    path.write_text("".join(json.dumps(question(number, texts.get(f"q{number}"))) + "\n" for number in range(count)))
    return path


def ran(
    command: list[str], folder: Path, suite: str, *options: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Runs HELM in the folder, with all that it prints in ``stdout``."""
    return subprocess.run(
        [
            *command,
            "--suite",
            suite,
            "-o",
            str(folder / "out"),
            "--local-path",
            str(folder / f"config-{suite}"),
            *options,
        ],
        cwd=folder,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "FLEXBATCH_DTYPE": "float32",
            **environ,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )


def helm(command: list[str], folder: Path, suite: str, *options: str, **environ: str) -> float:
    """Runs HELM in the folder; seconds. Its output is shown when it fails."""
    began = time.perf_counter()
    done = ran(command, folder, suite, *options, **environ)
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout[-6000:]
    if "flexbatch.apps.helm_run" in command and "--dry-run" not in (*command, *options):
        assert "mean  instances" in done.stdout, done.stdout[-6000:]
    return time.perf_counter() - began


def entries(model: str, questions: Path, scenarios=SCENARIOS, methods=METHODS) -> list[str]:
    found = [f"{name}{',' if ':' in name else ':'}model={model}" for name in scenarios]
    return ["-r", *found, *(f"custom_mcqa:path={questions},method={method},model={model}" for method in methods)]


def runs(folder: Path, suite: str, file: str) -> dict[str, list]:
    """Run name without its model -> content of a file of the run."""
    return {
        path.parent.name.rsplit("model=", 1)[0]: json.loads(path.read_text())
        for path in (folder / "out/runs" / suite).glob(f"*/{file}")
    }


def metrics(stats: list[dict], *, without: tuple[str, ...]) -> dict[str, float]:
    """Name, split and perturbation -> mean; infinite where nothing was counted, as with the training cost of a model
    that HELM does not know."""
    return {
        json.dumps(stat["name"], sort_keys=True): stat.get("mean", math.inf)
        for stat in stats
        if not stat["name"]["name"].startswith(without)
    }


@pytest.fixture(scope="module")
def reference(folder, model):
    """HELM's own Hugging Face client, all scenarios."""
    questions = write_questions(folder / "questions.jsonl", 12)
    helm(
        [*HELM_RUN, *entries("huggingface/llama", questions), "-m", "10"],
        folder,
        "hf",
        "--enable-local-huggingface-models",
        str(model),
    )
    return runs(folder, "hf", "stats.json")


def test_every_metric_equals_the_hugging_face_client(folder, model, reference):
    command = [
        sys.executable,
        "-m",
        "flexbatch.apps.helm_run",
        *entries("text", folder / "questions.jsonl"),
        "--max-eval-instance",
        "10",
    ]
    helm(
        command,
        folder,
        "equal",
        "--model",
        str(model),
        "--logprobs",
        "huggingface",
        "--gpu-batch-size",
        "4",
        "--num-gpu-batches",
        "2",
    )
    mine = runs(folder, "equal", "stats.json")
    assert mine.keys() == reference.keys() and len(mine) == len(SCENARIOS) + len(METHODS)
    for name, stats in reference.items():
        expected, found = metrics(stats, without=OURS), metrics(mine[name], without=OURS)
        assert len(found) > 20 and found == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_the_ordinary_command_gives_the_models_logprobs_and_whole_batches(folder, model, reference):
    """``helm-run`` itself, with the plug-in and no YAML: everything but the metrics of generated log-probabilities
    is as with HELM's client."""
    command = [*HELM_RUN, *entries(f"flexbatch/{model}", folder / "questions.jsonl"), "-m", "10"]
    helm(command, folder, "plain", *PLUGIN, "--runner-class-name", "flexbatch.apps.helm.FlexBatchRunner")
    mine = runs(folder, "plain", "stats.json")
    for name, stats in reference.items():
        without = OURS + (() if "separate" in name else LOGPROBS)
        assert metrics(mine[name], without=without) == pytest.approx(
            metrics(stats, without=without), rel=1e-4, abs=1e-6
        ), name
    for name, state in runs(folder, "plain", "scenario_state.json").items():
        results = [each["result"] for each in state["request_states"]]
        fresh = [result for result in results if not result["cached"]]
        assert {result["batch_size"] for result in fresh} == {len(fresh)}, name
        assert len(fresh) == len(results) or "calibrated" in name, (
            "only the calibrated form repeats requests of another run"
        )
        assert all(result["success"] and result["batch_request_time"] > 0 for result in results)
        for completion in (completion for result in results for completion in result["completions"]):
            assert completion["finish_reason"]["reason"] in ("length", "stop", "endoftext")
            assert completion["logprob"] == pytest.approx(sum(token["logprob"] for token in completion["tokens"]))


def test_the_ordinary_runner_gathers_the_threads_requests(folder, model, reference):
    command = [
        *HELM_RUN,
        *entries(f"flexbatch/{model}", folder / "questions.jsonl", scenarios=SCENARIOS[2:3], methods=()),
        "-m",
        "10",
        "-n",
        "10",
    ]
    helm(command, folder, "threads", *PLUGIN)
    ((name, stats),) = runs(folder, "threads", "stats.json").items()
    assert metrics(stats, without=OURS + LOGPROBS) == pytest.approx(
        metrics(reference[name], without=OURS + LOGPROBS), rel=1e-4, abs=1e-6
    )
    (state,) = runs(folder, "threads", "scenario_state.json").values()
    assert max(each["result"]["batch_size"] for each in state["request_states"]) > 1


def test_a_dry_run_loads_nothing(folder, model):
    command = [
        *HELM_RUN,
        *entries(f"flexbatch/{model}", folder / "questions.jsonl", scenarios=(), methods=METHODS[:1]),
        "-m",
        "4",
        "--dry-run",
    ]
    write_questions(folder / "questions.jsonl", 12)
    helm(
        command,
        folder,
        "dry",
        *PLUGIN,
        "--runner-class-name",
        "flexbatch.apps.helm.FlexBatchRunner",
        FLEXBATCH_GPU_MEMORY="1KiB",
    )
    (state,) = runs(folder, "dry", "scenario_state.json").values()
    assert len(state["request_states"]) == 4 and all("result" not in each for each in state["request_states"])


def test_a_run_that_fails_is_told_last_and_loses_no_other(folder, model):
    (folder / "nowhere.jsonl").unlink(missing_ok=True)
    chosen = entries("text", folder / "nowhere.jsonl", scenarios=SCENARIOS[:1], methods=METHODS[:1])
    done = ran(
        [sys.executable, "-m", "flexbatch.apps.helm_run", *chosen, "-m", "4", "--model", str(model)], folder, "nowhere"
    )
    last = done.stdout.splitlines()[-1]
    assert (
        done.returncode == 1
        and last.startswith("Failed runs: ")
        and "custom_mcqa" in last
        and "simple_mcqa" not in last
    ), done.stdout[-4000:]
    assert list(runs(folder, "nowhere", "stats.json")) == ["simple_mcqa:"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-r", "nosuch:model=text"], "HELM has no run of this name"),
        (["-r", "simple_mcqa:model=text", "--model", "no/where"], "model 'no/where' is no local folder"),
    ],
)
def test_mistakes_in_the_command_are_exit_code_2_without_a_traceback(folder, words, told):
    done = ran([sys.executable, "-m", "flexbatch.apps.helm_run", *words], folder, "mistake")
    assert done.returncode == 2 and told in done.stdout and "Traceback" not in done.stdout, done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_request_is_an_error_and_loses_nothing(folder, model, method):
    """A deployment that claims more context than the model has, so that HELM does not cut the one long question."""
    suite = f"bad-{method}"
    questions = write_questions(folder / f"{suite}.jsonl", 8, q3="apple " * 700)
    config = folder / f"config-{suite}"
    config.mkdir()
    deployment = {
        "name": "flexbatch/llama",
        "tokenizer_name": f"flexbatch/{model}",
        "max_sequence_length": 100000,
        "client_spec": {
            "class_name": "flexbatch.apps.helm_client.FlexBatchClient",
            "args": {"pretrained": str(model), "dtype": "float32"},
        },
    }
    (config / "model_deployments.yaml").write_text(json.dumps({"model_deployments": [deployment]}))
    command = [*HELM_RUN, *entries("flexbatch/llama", questions, scenarios=(), methods=[method]), "-m", "100"]
    helm(command, folder, suite, *PLUGIN, "--runner-class-name", "flexbatch.apps.helm.FlexBatchRunner")
    (state,) = runs(folder, suite, "scenario_state.json").values()
    (errors,) = runs(folder, suite, "flexbatch_errors.json").values()
    (stats,) = runs(folder, suite, "stats.json").values()
    states = state["request_states"]
    per_question = {METHODS[0]: 1, METHODS[1]: 4, METHODS[2]: 8}[method]
    assert [each["instance"]["id"] for each in states] == [
        f"id{number}" for number in range(8) for _ in range(per_question)
    ]
    failed = [position for position, each in enumerate(states) if not each["result"]["success"]]
    assert failed == [error["index"] for error in errors] and {error["instance"] for error in errors} == {"id3"}
    assert all(
        states[position]["result"]["completions"] == [] and "tokens" in states[position]["result"]["error"]
        for position in failed
    )
    assert all(each["result"]["completions"] for position, each in enumerate(states) if position not in failed)
    counts = {stat["name"]["name"]: stat.get("mean") for stat in stats if "perturbation" not in stat["name"]}
    assert counts["num_instances"] == 7


@pytest.mark.parametrize("scenario", ["dyck_language:num_parenthesis_pairs=2", "custom_mcqa"])
def test_time_against_the_hugging_face_client_at_200_instances(folder, scenario, record_property):
    """Wall time of the whole command, cold caches; the numbers are printed with -s.."""
    model = make_model(folder / "models" / f"wide-{scenario[:4]}")
    questions = write_questions(folder / "many.jsonl", 200)
    chosen = ((), METHODS[:1]) if scenario == "custom_mcqa" else ([scenario], ())
    theirs = helm(
        [*HELM_RUN, *entries(f"huggingface/{model.name}", questions, *chosen), "-m", "200"],
        folder,
        f"time-hf-{scenario[:4]}",
        "--enable-local-huggingface-models",
        str(model),
    )
    command = [
        sys.executable,
        "-m",
        "flexbatch.apps.helm_run",
        *entries("text", questions, *chosen),
        "-m",
        "200",
        "--model",
        str(model),
    ]
    mine = helm(command, folder, f"time-{scenario[:4]}")
    for suite, seconds in (("time-hf", theirs), ("time", mine)):
        (state,) = runs(folder, f"{suite}-{scenario[:4]}", "scenario_state.json").values()
        assert len(state["request_states"]) == 200
        record_property(suite, seconds)
    print(f"{scenario}: 200 instances, HELM's Hugging Face client {theirs:.1f} s, FlexBatch {mine:.1f} s")
