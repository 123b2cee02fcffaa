"""What HELM's runs scored, from the files that it writes: a line for each score of each run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexbatch.planner.tables import table

BOOKKEEPING = re.compile(
    r"^(num_|max_num_|batch_size|finish_reason|inference_|training_|logprob|perplexity|bits_per_byte|log_|max_prob|"
    r"ece_|platt_|selective_|predicted_index|.*_runtime|.*_time$|.*tokens$|.*bytes$|estimated_)"
)
"""Statistics that tell how a run went, or how sure the model was, and not how well it did."""


@dataclass(frozen=True)
class Score:
    """A statistic of a run over the instances of one split, without perturbations."""

    run: str
    split: str
    name: str
    mean: float
    instances: int


def stats_files(suite: Path, since: float) -> list[Path]:
    """The statistics of the runs of a suite that were written since a time; of all of them where none was, as HELM
    was told to leave finished runs as they are."""
    found = sorted(suite.glob("*/stats.json"))
    return [path for path in found if path.stat().st_mtime >= since] or found


def read_scores(path: Path) -> list[Score]:
    """The scores of one run; where HELM has none, everything that it measured."""
    found = []
    instances: dict[str, int] = {}
    for stat in json.loads(path.read_text()):
        name, split = stat["name"]["name"], stat["name"].get("split", "")
        if stat["name"].get("perturbation") or stat["name"].get("sub_split") or stat.get("mean") is None:
            continue
        if name == "num_instances":
            instances[split] = round(stat["mean"])
        found.append((split, name, float(stat["mean"])))
    scores = [each for each in found if not BOOKKEEPING.match(each[1])] or found
    run = path.parent.name
    return [Score(run, split, name, mean, instances.get(split, 0)) for split, name, mean in sorted(set(scores))]


def scores_table(scores: Iterable[Score]) -> str:
    """Aligned columns; a run's name stands once."""
    rows: list[Sequence[str]] = []
    before = None
    for score in scores:
        run, before = "" if score.run == before else score.run, score.run
        count = f"{score.instances:,}" if score.instances else "-"
        rows.append([run, score.split or "-", score.name, f"{score.mean:.4g}", count])
    return table(["run", "split", "score", "mean", "instances"], rows)
