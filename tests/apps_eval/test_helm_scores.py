"""The scores that `flexbatch helm` prints, from HELM's files; HELM itself is not needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flexbatch.apps.helm_scores import read_scores, scores_table, stats_files


def stat(name: str, mean: float | None, split: str = "test", **more: Any) -> dict[str, Any]:
    return {"name": {"name": name, "split": split, **more}, "count": 1, "mean": mean}


def write(suite: Path, run: str, stats: list[dict[str, Any]], written: float) -> Path:
    path = suite / run / "stats.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(stats))
    os.utime(path, (written, written))
    return path


MMLU = [
    stat("num_instances", 100),
    stat("exact_match", 0.25),
    stat("quasi_exact_match", 0.26, perturbation={"name": "typos"}),
    stat("quasi_exact_match", 0.31),
    stat("exact_match", None, "valid"),
    stat("inference_runtime", 3.2),
    stat("num_prompt_tokens", 512),
    stat("logprob", -3.0),
    stat("ece_10_bin", 0.1),
]


def test_scores_are_those_of_the_task_and_not_how_the_run_went(tmp_path: Path) -> None:
    path = write(tmp_path, "mmlu:subject=anatomy,model=flexbatch_demo", MMLU, 10)
    scores = read_scores(path)
    assert [(score.name, score.mean, score.instances) for score in scores] == [
        ("exact_match", 0.25, 100),
        ("quasi_exact_match", 0.31, 100),
    ]
    lines = scores_table(scores).splitlines()
    assert lines[0].split() == ["run", "split", "score", "mean", "instances"]
    assert lines[2].split() == ["mmlu:subject=anatomy,model=flexbatch_demo", "test", "exact_match", "0.25", "100"]
    assert lines[3].split() == ["test", "quasi_exact_match", "0.31", "100"]


def test_a_run_without_scores_tells_what_was_measured(tmp_path: Path) -> None:
    path = write(tmp_path, "the_pile", [stat("num_instances", 7), stat("perplexity", 12.5)], 10)
    assert {score.name for score in read_scores(path)} == {"num_instances", "perplexity"}


def test_runs_are_those_of_now_or_all_where_finished_ones_were_left_alone(tmp_path: Path) -> None:
    old, new = write(tmp_path, "a", MMLU, 10), write(tmp_path, "b", MMLU, 100)
    assert stats_files(tmp_path, since=50) == [new]
    assert stats_files(tmp_path, since=500) == [old, new]
    assert stats_files(tmp_path / "nothing", since=0) == []
