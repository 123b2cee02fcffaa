"""A wrangling run: build the prompts of all trials, answer them in one block, score them, write predictions and
scores."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flexbatch.apps.wrangle.datasets import YES_NO, DataSet
from flexbatch.apps.wrangle.examples import Example, Wording, read_examples
from flexbatch.apps.wrangle.scores import Scores, is_right, score
from flexbatch.apps.wrangle.shots import cluster_shots, join_shots, manual_shots, prompt, random_shots, read_manual
from flexbatch.apps.wrangle.tables import TableError
from flexbatch.request import SamplingParams, StructuredOutputsParams


@dataclass(frozen=True)
class WrangleConfig:
    """The settings of one run; the command's flags."""

    folder: Path
    split: str = "validation"
    select: str = "random"
    shots: int = 10
    trials: int = 1
    limit: int | None = None
    balanced: bool = False
    instruction: bool = False
    manual: Path | None = None
    separator: str = "."
    missing: str = "nan"
    max_tokens: int | None = None
    seed: int = 1234
    free_answers: bool = False

    def choice(self, data: DataSet) -> tuple[str, ...]:
        """Returns what an answer may be, as it is written after a space and without one; () for any text."""
        return ("Yes", "No", " Yes", " No") if data.task in YES_NO and not self.free_answers else ()


@dataclass(frozen=True)
class Trial:
    """Prompts and examples of one trial, with the answers once they are there; an answer is None where the engine
    refused the prompt."""

    examples: list[Example]
    prompts: list[str]
    answers: list[str | None]
    errors: list[str]

    def scores(self, task: str) -> Scores:
        """Returns the scores of the answered prompts."""
        pairs = [
            (answer, example.label)
            for answer, example in zip(self.answers, self.examples, strict=True)
            if answer is not None
        ]
        return score([answer for answer, _ in pairs], [label for _, label in pairs], task)


def ask(
    llm: Any, prompts: Sequence[str], max_tokens: int, choice: Sequence[str] = ()
) -> tuple[list[str | None], list[str]]:
    """Returns greedy answers up to the end of the line, one of ``choice`` where there is any, and the error of each
    prompt that could not be run. Equal prompts are asked once."""
    indices: dict[str, list[int]] = {}
    for index, text in enumerate(prompts):
        indices.setdefault(text, []).append(index)
    answers: list[str | None] = [None] * len(prompts)
    errors = [""] * len(prompts)
    form = StructuredOutputsParams(choice=choice) if choice else None
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop="\n", structured_outputs=form)
    with tqdm(total=len(indices), desc="FlexBatch", unit="prompt", disable=None) as progress:
        for text, completion in llm.stream((text, text, params) for text in indices):
            progress.update()
            for index in indices[text]:
                if completion.finish_reason == "error":
                    errors[index] = completion.error
                else:
                    answers[index] = completion.text.strip()
    return answers, errors


TrialPrompts = list[tuple[list[str], list[Example]]]
"""Prompts and examples of every trial."""


def run(config: WrangleConfig, data: DataSet, llm: Any, plans: TrialPrompts | None = None) -> list[Trial]:
    """Runs all trials, as they are planned or as `plan` makes them. Raises TableError for data that is absent or
    wrong, and when every prompt fails."""
    trials = []
    for prompts, examples in plan(config, data, llm) if plans is None else plans:
        answers, errors = ask(llm, prompts, config.max_tokens or data.max_tokens, config.choice(data))
        if examples and all(errors):
            raise TableError(f"none of the {len(prompts)} prompts could be run; the first: {errors[0]}")
        trials.append(Trial(examples, prompts, answers, errors))
    return trials


def plan(config: WrangleConfig, data: DataSet, llm: Any = None) -> TrialPrompts:
    """Returns prompts and examples of every trial. With clusters the model first answers the validation split, whose
    mistakes are the shots; otherwise it is not needed."""
    wording = Wording(config.separator, config.missing)
    instruction = data.instruction if config.instruction else ""
    examples = read_examples(config.folder, data, config.split, wording)[: config.limit]
    if config.select == "manual":
        path = config.manual or next(
            (config.folder / name for name in ("manual.json", "manual.txt") if (config.folder / name).is_file()), None
        )
        if path is None:
            raise TableError(
                f"hand-written shots: put manual.json or manual.txt into {config.folder}, or give --manual FILE"
            )
        manual = read_manual(path, data.name)
        return [
            ([prompt(manual_shots(manual, example), example, instruction) for example in examples], examples)
        ] * config.trials
    train = read_examples(config.folder, data, "train", wording) if config.shots else []
    balanced = config.balanced and data.task in YES_NO
    plans = []
    for trial in range(config.trials):
        seed = config.seed + trial
        shots = random_shots(train, config.shots, seed, balanced=balanced)
        if config.select == "clusters":
            validation = read_examples(config.folder, data, "validation", wording)
            answers, _ = ask(
                llm,
                [prompt(join_shots(shots), example, instruction) for example in validation],
                config.max_tokens or data.max_tokens,
                config.choice(data),
            )
            wrong = [
                answer is None or not is_right(answer, example.label, data.task)
                for answer, example in zip(answers, validation, strict=True)
            ]
            shots = cluster_shots(validation, wrong, config.shots, seed)
        text = join_shots(shots)
        plans.append(([prompt(text, example, instruction) for example in examples], examples))
    return plans


def summary(config: WrangleConfig, data: DataSet, trials: Sequence[Trial]) -> dict[str, Any]:
    """Returns the scores of every trial, their mean and population standard deviation, and how many prompts failed."""
    scores = [trial.scores(data.task) for trial in trials]
    names = ("accuracy", "precision", "recall", "f1") if data.task in YES_NO else ("accuracy",)
    return {
        "data_set": data.name,
        "task": data.task,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
        "mean": {name: statistics.fmean(getattr(each, name) for each in scores) for name in names},
        "deviation": {name: statistics.pstdev(getattr(each, name) for each in scores) for name in names},
        "trials": [asdict(each) for each in scores],
        "failed_prompts": sum(bool(error) for trial in trials for error in trial.errors),
    }


def write(output: Path, results: dict[str, Any], data: DataSet, trials: Sequence[Trial]) -> None:
    """Writes ``scores.json``, and ``predictions.parquet`` with prompt, label, answer, right and error of every row
    and trial."""
    import pyarrow
    import pyarrow.parquet

    output.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "trial": number,
            "row": row,
            "prompt": text,
            "label": example.label.strip(),
            "answer": answer,
            "right": None if answer is None else is_right(answer, example.label, data.task),
            "error": error or None,
        }
        for number, trial in enumerate(trials)
        for row, (text, example, answer, error) in enumerate(
            zip(trial.prompts, trial.examples, trial.answers, trial.errors, strict=True)
        )
    ]
    text_columns = ("prompt", "label", "answer", "error")
    types = {
        "trial": pyarrow.int32(),
        "row": pyarrow.int64(),
        "right": pyarrow.bool_(),
        **{name: pyarrow.string() for name in text_columns},
    }
    schema = pyarrow.schema(
        [(name, types[name]) for name in ("trial", "row", "prompt", "label", "answer", "right", "error")]
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), output / "predictions.parquet")
    (output / "scores.json").write_text(json.dumps(results, indent=2) + "\n")
