"""Answers and scores a data wrangling task: ``python -m flexbatch.apps.wrangle
data/datasets/entity_matching/structured/Beer --model M``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from flexbatch.apps.wrangle.datasets import TASKS, find_data_set
from flexbatch.apps.wrangle.tables import TableError
from flexbatch.cli.command import run_command, set_up_logging
from flexbatch.cli.early_checks import check_machine, check_models
from flexbatch.cli.help import CommandParser
from flexbatch.cli.loras import for_all_rows
from flexbatch.cli.settings import add_engine_arguments, engine_config, refuse_measurements
from flexbatch.policy.stdout import run_process
from flexbatch.validation.errors import ROW_ERRORS, ConfigurationError


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "flexbatch wrangle",
        description='Entity matching, data imputation, error detection and schema matching, as in "Can Foundation '
        'Models Wrangle Your Data?". Scores go to stdout as JSON. Exit code 3: some prompts could not be run and are '
        "left out of the scores.",
        first="task column shots model output dry_run gpu_memory cpu_memory weight_bits config",
        texts={
            "task": "the task of data of your own",
            "column": "the column that data imputation fills",
            "shots": "examples in the prompt (default: 10)",
            "output": "folder for predictions.parquet and scores.json",
            "dry_run": "print the first prompt; load nothing",
        },
        examples="""
            flexbatch wrangle datasets/entity_matching/structured/Beer
            flexbatch wrangle people/ --task data_imputation --column city
            """,
    )
    add = parser.group_of("task", "the task").add_argument
    add(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="train, valid, test (and table, tableA, tableB)",
    )
    add(
        "--task",
        choices=TASKS,
        metavar="TASK",
        help=f"the task of data of your own: {', '.join(TASKS)} (the twelve data sets of the paper are known by their "
        "folder's name)",
    )
    add("--column", metavar="NAME", help="the column that data imputation fills")
    add(
        "--split",
        choices=("validation", "test", "train"),
        default="validation",
        help="what to answer (default: validation)",
    )
    _add_example_arguments(add)
    add("--trials", type=int, default=1, metavar="N", help="repetitions with other random examples (default: 1)")
    add("--limit", type=int, metavar="N", help="rows to answer (default: all)")
    add("--instruction", action="store_true", help="put the task's instruction before the prompt")
    add("--separator", default=".", help="between the attributes of a row (default: .)")
    add(
        "--missing",
        default="nan",
        help='how a missing value is written (default: nan; the paper\'s entity matching uses "")',
    )
    add("--max-tokens", type=int, metavar="N", help="longest answer (default: as in the paper, 3 to 10)")
    add("--example-seed", type=int, default=1234, metavar="N", help="seed of the random examples (default: 1234)")
    add("--free-answers", action="store_true", help="let the model write anything, not Yes or No alone")
    add("--output", type=Path, metavar="DIR", help="folder for predictions.parquet and scores.json")
    add("--dry-run", action="store_true", help="print the first prompt and stop, without loading a model")
    add_engine_arguments(parser)
    return parser


def _add_example_arguments(add: Callable[..., object]) -> None:
    add(
        "--select",
        choices=("random", "manual", "clusters"),
        default="random",
        help="where the examples in the prompt come from (default: random)",
    )
    add(
        "--shots",
        type=int,
        default=10,
        metavar="N",
        help="examples in the prompt, with random and clusters (default: 10)",
    )
    add(
        "--manual",
        type=Path,
        metavar="FILE",
        help="hand-written examples: .txt, .json, or the authors' constants.py (default: manual.json in FOLDER)",
    )
    add("--balanced", action="store_true", help="as many random examples of Yes as of No")


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    set_up_logging(words=arguments)
    return run_command(lambda data: command(args, data))


def command(args: argparse.Namespace, data_out: TextIO) -> int:
    for name in ("shots", "trials", "limit", "max_tokens"):
        value, least = getattr(args, name), 0 if name == "shots" else 1
        if value is not None and value < least:
            raise ConfigurationError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    engine = for_all_rows(engine_config(args))
    refuse_measurements(engine)
    check_machine(engine)
    if not args.folder.is_dir():
        raise ConfigurationError(f"data set folder {args.folder} does not exist")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise ConfigurationError(f"--output {args.output} is a file; give a folder")
    from flexbatch.apps.wrangle.job import WrangleConfig, plan, run, summary, write

    same = {
        name: getattr(args, name)
        for name in ("folder", "split", "select", "shots", "trials", "limit", "balanced", "instruction", "manual")
    } | {"free_answers": args.free_answers}
    config = WrangleConfig(
        **same, separator=args.separator, missing=args.missing, max_tokens=args.max_tokens, seed=args.example_seed
    )
    try:
        data = find_data_set(args.folder, args.task, args.column)
        if args.dry_run and args.select == "clusters":
            raise ConfigurationError("--dry-run cannot show clusters: the model's mistakes choose them")
        plans = (
            plan(config, data) if args.select != "clusters" else None
        )  # data that is wrong is told before the model loads
        if args.dry_run:
            print(plans[0][0][0] if plans and plans[0][0] else "", file=data_out)
            return 0
        check_models(engine)
        from flexbatch.engine import LLM

        with LLM.from_config(engine) as llm:
            trials = run(config, data, llm, plans)
    except TableError as problem:
        raise ConfigurationError(str(problem)) from problem
    results = summary(config, data, trials)
    if args.output is not None:
        write(args.output, results, data, trials)
    print(json.dumps(results, indent=2), file=data_out)
    return ROW_ERRORS if results["failed_prompts"] else 0


if __name__ == "__main__":
    sys.exit(run_process(main))
