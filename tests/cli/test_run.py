"""The command of the main job, from its words to its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexbatch import run
from flexbatch.cli import run_settings, run_work
from flexbatch.config import EngineConfig
from tests.processes import Forked

PROMPTS = ["def add(a, b):", "x", "import os\n", "größer 🙂", "while True: pass  # and so on"]


def prompt_file(folder: Path, prompts: list = PROMPTS) -> str:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(folder / "prompts.jsonl")


def test_output_lines_are_transformers_tokens_in_input_order(
    command, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.jsonl"
    words = (
        "--percent",
        "30",
        "30",
        "50",
        "25",
        "100",
        "0",
        "--num-gpu-batches",
        "2",
        "--gpu-batch-size",
        "2",
        "--offload-dir",
        str(tmp_path / "offload"),
    )
    assert command("--prompts", prompt_file(tmp_path), "--output", str(out), "--ignore-eos", *words) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model_folder),
    )
    for line, prompt in zip(lines, PROMPTS, strict=True):
        input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = model.generate(
                input_ids, max_new_tokens=6, min_new_tokens=0, do_sample=False, eos_token_id=-1, pad_token_id=0
            )[0, input_ids.shape[1] :].tolist()
        assert line == {
            "prompt": prompt,
            "text": tokenizer.decode(expected, skip_special_tokens=True),
            "token_ids": expected,
            "finish_reason": "length",
            "num_input_tokens": input_ids.shape[1],
            "num_generated_tokens": 6,
        }
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "placement" in captured.err and "throughput" in captured.err and "wrote 5 completions" in captured.err


def test_completions_are_printed_as_data_and_tables_go_elsewhere(
    command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("--prompts", prompt_file(tmp_path), "--num-prompts", "2") == 0
    captured = capsys.readouterr()
    assert captured.out.count("----- prompt") == 2 and PROMPTS[0] in captured.out and PROMPTS[2] not in captured.out
    assert "throughput" not in captured.out and "throughput" in captured.err


def test_json_is_one_document(command, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trace = tmp_path / "trace.json"
    assert (
        command(
            "--prompts",
            prompt_file(tmp_path),
            "--json",
            "--trace",
            str(trace),
            "--logprobs",
            "1",
            "--n",
            "2",
            "--temperature",
            "1",
        )
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert [line["prompt"] for line in document["completions"]] == PROMPTS
    assert all(
        len(line["samples"]) == 2 and len(line["logprobs"]) == line["num_generated_tokens"]
        for line in document["completions"]
    )
    assert document["report"]["requests"] == 2 * len(PROMPTS)
    assert any(event["ph"] == "X" for event in json.loads(trace.read_text())["traceEvents"])


def test_made_up_prompts_of_given_lengths(command, capsys: pytest.CaptureFixture) -> None:
    assert (
        command("--prompt-len", "11", "--gen-len", "5", "--gpu-batch-size", "3", "--num-gpu-batches", "2", "--json")
        == 0
    )
    lines = json.loads(capsys.readouterr().out)["completions"]
    assert [(line["num_input_tokens"], line["num_generated_tokens"], line["finish_reason"]) for line in lines] == [
        (11, 5, "length")
    ] * 6
    assert len({tuple(line["prompt"]) for line in lines}) == 6


def test_max_tokens_zero_scores_the_prompts(command, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command("--prompts", prompt_file(tmp_path), "--max-tokens", "0", "--prompt-logprobs", "0", "--json") == 0
    for line in json.loads(capsys.readouterr().out)["completions"]:
        assert line["prompt_logprobs"][0] is None and len(line["prompt_logprobs"]) == line["num_input_tokens"]
        assert all(entry[0]["logprob"] < 0 for entry in line["prompt_logprobs"][1:])


def test_dry_run_prints_the_plan_and_loads_nothing(command, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    offload, out = tmp_path / "offload", tmp_path / "out.jsonl"
    words = ("--percent", "0", "0", "100", "0", "100", "0", "--offload-dir", str(offload), "--output", str(out))
    assert command("--prompts", prompt_file(tmp_path), "--dry-run", *words) == 0
    assert "weights" in capsys.readouterr().out
    assert not offload.exists() and not out.exists()
    assert command("--prompts", prompt_file(tmp_path), "--dry-run", "--json", *words) == 0
    assert json.loads(capsys.readouterr().out)["realized_percent"]["weights"]["disk"] == pytest.approx(100)


def test_dry_run_without_prompts_plans_a_long_job_and_says_which(capsys: pytest.CaptureFixture) -> None:
    """Not the bundled prompts; what is given of its lengths holds."""
    words = [
        "--device",
        "cpu",
        "--hardware",
        "cpu",
        "--gpu-memory",
        "2GiB",
        "--cpu-memory",
        "1GiB",
        "--dry-run",
        "--json",
    ]
    for given, sequences, prompt, answer in (
        ([], 4096, 512, 128),
        (["--num-prompts", "101", "--prompt-len", "70", "--max-tokens", "9"], 101, 70, 9),
    ):
        assert run.main([*words, "--gpu-batch-size", "32", "--num-gpu-batches", "1", *given]) == 0
        data = json.loads(capsys.readouterr().out)
        assert (data["sequences"], data["assumed_prompt_tokens"], data["assumed_answer_tokens"]) == (
            sequences,
            prompt,
            answer,
        )
        assert data["waves"] == -(-sequences // 32) and "no prompts were given" in data["planned_for"]


def test_dummy_weights_of_a_public_shape_plan_without_a_download(capsys: pytest.CaptureFixture) -> None:
    words = [
        "--model",
        "facebook/opt-125m",
        "--dummy-weights",
        "--prompt-len",
        "20",
        "--gen-len",
        "4",
        "--device",
        "cpu",
        "--gpu-memory",
        "2GiB",
    ]
    assert (
        run.main([*words, "--dry-run", "--json", "--compress-weight", "--compress-cache", "--cpu-cache-compute"]) == 0
    )
    policy = json.loads(capsys.readouterr().out)["policy"]
    assert (policy["weight_bits"], policy["cache_bits"], policy["cpu_attention"]) == (4, 4, 1.0)


def test_path_names_the_folder_as_in_flexgen(model_folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--device", "cpu", "--gpu-memory", "64MiB", "--prompt-len", "4", "--dry-run", "--json"]
    words += ["--num-prompts", "3", "--gpu-batch-size", "3", "--num-gpu-batches", "1"]  # so that little is searched
    for model, path in (("org/tiny", model_folder.parent), ("whatever", model_folder)):
        assert run.main(["--model", model, "--path", str(path), *words]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == str(model_folder)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--percent", "60", "60", "0", "0", "0", "0"], 2, r"weights on gpu (60) and cpu (60)"),
        (["--prompts", "EMPTY"], 2, "holds no prompts"),
        (["--prompts", "LONG"], 2, "prompt 1: has 200 tokens; the model's context of 96 allows 95"),
        (["--prompts", "nowhere.jsonl"], 2, "--prompts nowhere.jsonl does not exist"),
        (["--prompts", "LONG", "--prompt-len", "3"], 2, "leave one out"),
        (["--prompt-len", "0"], 2, "--prompt-len 0 must be at least 1"),
        (["--prompt-len", "96"], 2, "prompt 0: has 96 tokens"),
        (["--top-p", "0"], 2, "top_p=0.0 must be in (0, 1]"),
        (["--compress-weight", "--weight-bits", "8"], 2, "--compress-weight means --weight-bits 4, but 8 was given"),
        (["--model", "opt-9b", "--dummy-weights"], 2, "no public shape 'opt-9b'"),
        (["--model", "/nowhere/at/all"], 2, "/nowhere/at/all"),
        (["--trace", "/nowhere/trace.json"], 2, "its folder does not exist"),
        (["--output", "/nowhere/out.jsonl"], 2, "cannot be written"),
        (
            ["--percent", "0", "0", "100", "0", "100", "0", "--prompt-len", "5", "--offload-dir", "EMPTY"],
            2,
            "empty.txt",
        ),
        (
            ["--percent", "0", "0", "100", "0", "100", "0", "--prompt-len", "5", "--offload-dir", "/proc/offload"],
            2,
            "--offload-dir /proc/offload: nothing can be made in /proc",
        ),
        (["--prompt-len", "5", "--gpu-memory", "20KiB", "--percent", "100", "0", "100", "0", "100", "0"], 4, "gpu"),
    ],
)
def test_what_goes_wrong_says_so_and_exits_with_its_code(
    command, words: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    named = {"EMPTY": str(tmp_path / "empty.txt"), "LONG": prompt_file(tmp_path, ["ok", "x" * 200])}
    assert command(*(named.get(word, word) for word in words)) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_another_process_draws_the_same_tokens(command, model_folder: Path, tmp_path: Path) -> None:
    """Random streams and penalties after a restart: another placement, another block, other hashes."""
    words = [
        "--prompts",
        prompt_file(tmp_path),
        "--temperature",
        "1",
        "--n",
        "2",
        "--frequency-penalty",
        "0.5",
        "--repetition-penalty",
        "1.2",
        "--seed",
        "5",
    ]
    assert (
        command(*words, "--output", str(tmp_path / "first.jsonl"), "--percent", "100", "0", "100", "0", "100", "0") == 0
    )
    again = [
        "--model",
        str(model_folder),
        "--device",
        "cpu",
        "--hardware",
        "cpu",
        "--max-tokens",
        "6",
        *words,
    ]
    again += [
        "--percent",
        "30",
        "30",
        "50",
        "25",
        "50",
        "50",
        "--gpu-batch-size",
        "2",
        "--num-gpu-batches",
        "2",
        "--offload-dir",
        str(tmp_path / "offload"),
    ]
    process = Forked("flexbatch.run", [*again, "--output", str(tmp_path / "second.jsonl")])
    _, err = process.communicate()
    assert process.returncode == 0, err
    first = (tmp_path / "first.jsonl").read_text()
    assert first == (tmp_path / "second.jsonl").read_text()
    assert command(*words[:-1], "6", "--output", str(tmp_path / "other.jsonl")) == 0
    assert first != (tmp_path / "other.jsonl").read_text()


def test_help_answers_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flexbatch.run", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--gpu-memory" in done.stdout
    assert "import" in done.stderr and " torch\n" not in done.stderr and " transformers\n" not in done.stderr


def test_made_up_prompts_go_on_after_eos_and_real_ones_do_not(model_folder: Path, tmp_path: Path) -> None:
    engine = EngineConfig(model=str(model_folder))
    assert run_work.make_work(
        engine, run_settings.RunConfig(prompt_len=5), run_settings.SamplingConfig()
    ).params.ignore_eos
    assert not run_work.make_work(
        engine, run_settings.RunConfig(prompts=prompt_file(tmp_path)), run_settings.SamplingConfig()
    ).params.ignore_eos


def test_each_phase_says_what_it_does(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("--prompts", prompt_file(tmp_path), "--num-prompts", "3") == 0
    said = capsys.readouterr().err
    order = ["loading ", "loaded ", "running 3 completions", "3 of 3 completions in"]
    assert [said.index(words) for words in order] == sorted(said.index(words) for words in order)
    assert "read at" in said and "prompt tokens read, 18 written" in said
