"""`flexbatch plan`: machines and models by name, by file and by folder; what is wrong is told before torch is
imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flexbatch.cli.plan import main
from flexbatch.policy.shapes import SHAPES, public_shape

ROOT = Path(__file__).parents[2]
FIXED = ["--percent", "100", "0", "100", "0", "100", "0", "--gpu-batch-size", "8", "--num-gpu-batches", "1"]
FIXED += ["--cpu-attention", "0", "--prefill-chunk", "64", "--prefill-budget", "64", "--cache-bits", "4"]
"""Leaves nothing to search for."""
JOB = ["--num-prompts", "20", "--prompt-len", "64", "--max-tokens", "16"]


def planned(capsys: pytest.CaptureFixture, *words: str) -> dict:
    assert main([*words, *FIXED, *JOB, "--json"]) == 0
    streams = capsys.readouterr()
    assert streams.err == ""
    return json.loads(streams.out)


def test_words_then_tables_each_once(capsys: pytest.CaptureFixture) -> None:
    assert main(["facebook/opt-1.3b", "--gpu", "RTX 4090", *JOB, *FIXED]) == 0
    streams = capsys.readouterr()
    text = streams.out
    assert streams.err == "" and text.startswith("opt-1.3b on NVIDIA GeForce RTX 4090")
    order = [
        "It fits: 20 prompts",
        "speed",
        "this job",
        "first answer",
        "  disk   ",
        "limited by",
        "1 GiB more",
        "policy:",
    ]
    placements = [
        text.index(words) for words in [*order, "\n  % of", "\n  budget", "average pass", "bound of this policy"]
    ]
    assert placements == sorted(placements)
    assert text.count("\n  budget") == 1 and "peak memory" not in text


@pytest.mark.parametrize("form", ["file", "folder", "renamed"])
def test_a_config_is_enough(form: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No weights and no tokenizer lie beside it."""
    file = tmp_path / ("llama.json" if form == "renamed" else "config.json")
    file.write_text(json.dumps(SHAPES["llama-3.2-1b"] | {"torch_dtype": "bfloat16"}))
    name = str(tmp_path if form == "folder" else file)
    report = planned(capsys, name, "--gpu", "l4")
    assert report["model"] == name and report["hardware"].startswith("NVIDIA L4")
    weights = sum(row["num_bytes"] for row in report["memory"] if row["what"] == "weights")
    assert weights == pytest.approx(2 * public_shape("llama-3.2-1b").total_elements, rel=1e-3)


def test_a_config_that_says_quantized_is_planned_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SHAPES["llama-3-8b"] | {"dtype": "float16", "quantization_config": quantization}))
    report = planned(capsys, str(file), "--gpu", "rtx-3090")
    weights = sum(row["num_bytes"] for row in report["memory"] if row["what"] == "weights")
    assert 5.2e9 < weights < 6.2e9  # the checkpoint of Llama-3-8B-AWQ has 5.7 GB


def test_a_model_folder_without_its_weights_and_tokenizer_plans_as_with_them(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copy(model_folder / "config.json", tmp_path)
    whole, bare = (planned(capsys, str(folder), "--gpu", "cpu") for folder in (model_folder, tmp_path))
    assert whole["memory"] == bare["memory"] and whole["job_seconds"] == bare["job_seconds"]


def test_the_plan_of_a_machine_is_that_of_a_dry_run_for_it(model_folder: Path, capsys: pytest.CaptureFixture) -> None:
    from flexbatch import run

    report = planned(capsys, str(model_folder), "--gpu", "t4", "--cpu-memory", "2GiB")
    words = ["--hardware", "t4", "--cpu-memory", "2GiB", *FIXED, "--num-prompts", "20", "--prompt-len", "64"]
    code = run.main(["--model", str(model_folder), *words, "--max-tokens", "16", "--dry-run", "--json"])
    dry = json.loads(capsys.readouterr().out)
    assert code == 0
    for name in ("memory", "percent", "job_seconds", "predicted_tokens_per_second", "budgets"):
        assert report[name] == dry[name], name


def test_budgets_of_the_command_line_are_those_of_the_plan(capsys: pytest.CaptureFixture) -> None:
    report = planned(
        capsys, "opt-125m", "--gpu", "H100", "--cpu-memory", "64GiB", "--gpu-memory", "10GB", "--disk", "1TB"
    )
    assert report["budgets"] == {"gpu": 10**10, "cpu": 64 * 2**30, "disk": 10**12}


def test_a_search_says_what_more_memory_and_a_smaller_cache_would_buy(capsys: pytest.CaptureFixture) -> None:
    words = ["opt-125m", "--gpu", "cpu", "--gpu-memory", "400MiB", "--cpu-memory", "400MiB", "--dtype", "float16"]
    assert main([*words, *JOB, "--num-gpu-batches", "1", "--gpu-batch-size", "4"]) == 0
    text = capsys.readouterr().out
    assert "1 GiB more" in text and "not known" not in text and "8-bit cache" in text


def test_sweep_grows_with_memory_and_both_plots_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    words = ["opt-1.3b", "--gpu", "t4", "--gpu-batch-size", "8", "--num-gpu-batches", "1", "--cpu-attention", "0", *JOB]
    plots = tmp_path / "sweep.png", tmp_path / "plan.png"
    assert main([*words, "--sweep", "gpu_memory=1GiB:3GiB:2", "--json", "--plot", str(plots[0])]) == 0
    rows = json.loads(capsys.readouterr().out)
    rates = [row["plan"]["predicted_tokens_per_second"] if row["plan"] else 0 for row in rows]
    assert len(rates) == 2 and rates == sorted(rates) and rates[-1] > rates[0]
    assert main(["opt-125m", "--gpu", "t4", *FIXED, *JOB, "--plot", str(plots[1])]) == 0
    assert all(plot.stat().st_size > 20_000 for plot in plots)


def test_nothing_of_a_plot_is_cut_and_no_labels_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from flexbatch.policy import whatif
    from flexbatch.policy.hardware import load_hardware
    from flexbatch.policy.plan import price
    from flexbatch.policy.policy import Policy, Split
    from flexbatch.policy.workload import Workload

    drawn = []
    monkeypatch.setattr(whatif, "finished", lambda plt, figure, path: drawn.append(figure))
    one = Split(1, 0)
    policies = [Policy(Split(0.2, 0.8), Split(0, 1), one, 48, 3, cpu_attention=0.5), Policy(one, one, one, 1, 1)]
    monkeypatch.setattr(whatif, "duration_text", lambda seconds: "2 min 24 s")  # among the longest
    for machine, policy in zip(("rtx-4090", "cpu"), policies, strict=True):
        plan = price(public_shape("opt-30b"), load_hardware(machine), Workload.uniform(512, 32, 300), policy)
        whatif.plot_plan(plan, tmp_path / "unused.png")
    for figure in drawn:
        figure.canvas.draw()
        assert "opt-30b on" in figure.get_suptitle() and "300 prompts" in figure.get_suptitle()
        bounds = figure.get_tightbbox()
        for axes in figure.axes:
            texts = [
                text for text in (*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()) if text.get_text()
            ]
            boxes = [text.get_window_extent() for text in texts]
            meeting = [
                (a.get_text(), b.get_text())
                for i, a in enumerate(texts)
                for j, b in enumerate(texts[:i])
                if boxes[i].overlaps(boxes[j])
            ]
            assert not meeting
            frame = axes.get_window_extent()
            for text in axes.texts:  # beside the frame, or within it
                box = text.get_window_extent()
                assert box.x0 >= frame.x1 or box.x1 <= frame.x1, text.get_text()
            assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 * max(1, bounds.x1) for box in boxes)
        legends = [{text.get_text() for text in axes.get_legend().get_texts()} for axes in figure.axes]
        assert "what limits" in legends[0] and {"weights", "cache", "budget"} <= legends[1]


WRONG = [
    (["opt-9000b", "--gpu", "t4"], "opt-30b"),
    (["opt-30b", "--gpu", "RTX 4090 Ti"], "did you mean rtx-4090?"),
    (["opt-30b", "--gpu", "abacus"], "h100"),
    (["./nowhere/config.json"], "no public shape, file or folder"),
    (["opt-30b", "--prompt-len", "4096"], "context of 2048"),
    (["opt-30b", "--num-prompts", "0"], "at least 1"),
    (["opt-30b", "--max-tokens", "0"], "at least 1"),
    (["opt-30b", "--gpu", "t4", "--cpu-memory", "much"], "not a size"),
    (["opt-30b", "--disk", "1TB"], "--gpu"),
    (["opt-30b", "--gpu", "t4", "--sweep", "gpu=1:2:3"], "gpu_memory=8GiB"),
    (["opt-30b", "--gpu", "t4", "--plot", "/no/such/folder/p.png"], "folder does not exist"),
]


def test_what_is_wrong_is_told_before_torch_is_imported() -> None:
    code = (
        "import json, sys\nfrom flexbatch.cli.plan import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    code = main(words)\n    print(code, 'torch' in sys.modules)\n    print('----', file=sys.stderr)"
    )
    words = json.dumps([words for words, _ in WRONG])
    done = subprocess.run([sys.executable, "-c", code, words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2 False"] * len(WRONG), done
    for (command, said), told in zip(WRONG, done.stderr.split("----\n"), strict=False):
        assert said in told, (command, told)


def test_what_does_not_fit_has_its_exit_code(capsys: pytest.CaptureFixture) -> None:
    assert main(["opt-30b", "--gpu", "t4", "--gpu-memory", "100MiB", *FIXED, *JOB]) == 4
    streams = capsys.readouterr()
    assert "does not fit" in streams.err.lower() or "do not fit" in streams.err.lower()
    assert not streams.out
