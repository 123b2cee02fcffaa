"""HELM on FlexBatch with FlexGen's command line:

    python -m flexbatch.apps.helm_run --description mmlu:model=text,subject=abstract_algebra,data_augmentation=canonical
    \\
        --model facebook/opt-30b --percent 20 80 0 100 0 100 --gpu-batch-size 48 --num-gpu-batches 3 --max-eval-instance
        100

It calls ``helm-run`` with whole-scenario batching; options that it does not know are ``helm-run``'s own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from flexbatch.cli.command import run_command, set_up_logging
from flexbatch.cli.early_checks import check_engine
from flexbatch.cli.help import CommandParser
from flexbatch.cli.loras import for_all_rows
from flexbatch.cli.settings import add_engine_arguments, engine_config, refuse_measurements
from flexbatch.policy.stdout import run_process
from flexbatch.validation.errors import CRASH, ROW_ERRORS, ConfigurationError, reason

RUNNER = "flexbatch.apps.helm.FlexBatchRunner"
ALL_INSTANCES = 10**9


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "flexbatch helm",
        description="Run HELM scenarios on FlexBatch, the requests of a scenario in one block. Options of helm-run "
        "(helm-run --help) are passed on. Needs HELM's environment: docs/evaluation.md. Exit code 3: some requests "
        "failed, see flexbatch_errors.json in the run's folder.",
        first="description max_eval_instances output_path suite model gpu_memory cpu_memory weight_bits config",
        texts={
            "description": "run entry, e.g. mmlu:subject=anatomy",
            "max_eval_instances": "instances of each scenario (default: all)",
            "output_path": "where HELM writes (default: benchmark_output)",
            "suite": "folder below runs/ (default: flexbatch)",
        },
        examples="""
            flexbatch helm --description mmlu:subject=anatomy --max-eval-instances 100
            """,
    )
    add = parser.group_of("description", "evaluation").add_argument
    entry = "run entry, e.g. mmlu:subject=anatomy; a model group in it is replaced"
    add("--description", "-r", "--run-entries", nargs="+", action="extend", required=True, metavar="ENTRY", help=entry)
    add(
        "--max-eval-instances",
        "--max-eval-instance",
        "-m",
        type=int,
        default=ALL_INSTANCES,
        metavar="N",
        help="instances of each scenario (default: all)",
    )
    add(
        "--output-path",
        "-o",
        default="benchmark_output",
        metavar="DIR",
        help="where HELM writes (default: benchmark_output)",
    )
    add("--suite", default="flexbatch", metavar="NAME", help="folder below runs/ (default: flexbatch)")
    add(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="whether prompts go through the tokenizer's chat template (default: if it has one)",
    )
    add(
        "--logprobs",
        choices=("model", "huggingface"),
        default="model",
        help="of greedy tokens: the model's, or 0 as HELM's own client gives",
    )
    add("--pad-to-seq-len", type=int, help=argparse.SUPPRESS)  # in FlexGen's scripts; nothing is padded here
    add_engine_arguments(parser)
    return parser


def helm_arguments(args: argparse.Namespace, rest: Sequence[str], deployment: str) -> list[str]:
    """Returns the command line of ``helm-run``."""
    return [
        *("--run-entries", *args.description),
        *("--models-to-run", deployment),
        *("--max-eval-instances", str(args.max_eval_instances)),
        *("--output-path", args.output_path, "--suite", args.suite),
        *("--runner-class-name", RUNNER, "--plugins", "flexbatch.apps.helm"),
        *rest,
    ]


def command(args: argparse.Namespace, rest: Sequence[str], environ: Mapping[str, str], data: TextIO) -> int:
    config = for_all_rows(engine_config(args, environ))
    refuse_measurements(config)
    check_engine(config)
    try:
        from helm.benchmark.run import build_parser, helm_run
        from helm.benchmark.run_spec import get_run_spec_function
        from helm.benchmark.runner import RunnerError
        from helm.common.hierarchical_logger import setup_default_logging
    except ModuleNotFoundError as problem:
        raise ConfigurationError(
            f"HELM is not installed here ({problem}); set up its environment with apps/helm_env.sh, see "
            "docs/evaluation.md"
        ) from problem
    from flexbatch.apps.helm import ERRORS_FILE, PREFIX, register
    from flexbatch.apps.helm_models import changed_settings

    model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    deployment = f"{PREFIX}/{model}"
    helm_args = build_parser().parse_args(helm_arguments(args, rest, deployment))
    setup_default_logging(helm_args.log_config)
    unknown = [entry for entry in args.description if get_run_spec_function(entry.partition(":")[0]) is None]
    if unknown:
        raise ConfigurationError(f"--description {' '.join(unknown)}: HELM has no run of this name")
    try:
        register(deployment, apply_chat_template=args.chat_template, logprobs=args.logprobs, **changed_settings(config))
    except OSError as problem:
        raise ConfigurationError(f"--model {config.model}: {reason(problem)}") from problem
    began = time.time()
    try:
        helm_run(helm_args)
    except RunnerError as problem:  # HELM goes on with the other runs, and has logged why each of these failed
        print(
            f"{problem}; the reasons are above, and finished runs are in {args.output_path}/runs/{args.suite}",
            file=sys.stderr,
        )
        return CRASH
    errors = [
        path
        for path in Path(args.output_path).glob(f"runs/{args.suite}/**/{ERRORS_FILE}")
        if path.stat().st_mtime >= began - 1
    ]
    for path in errors:
        print(f"some requests failed: {path}", file=sys.stderr)
    print_scores(Path(args.output_path) / "runs" / args.suite, began - 1, data)
    return ROW_ERRORS if errors else 0


def print_scores(suite: Path, since: float, data: TextIO) -> None:
    """The scores of the runs, to stdout; a dry run has none."""
    from flexbatch.apps.helm_scores import read_scores, scores_table, stats_files

    scores = [score for path in stats_files(suite, since) for score in read_scores(path)]
    if scores:
        print(scores_table(scores), file=data)


def main(arguments: Sequence[str] | None = None) -> int:
    args, rest = make_parser().parse_known_args(arguments)
    set_up_logging(words=arguments)
    return run_command(lambda data: command(args, rest, os.environ, data))


if __name__ == "__main__":
    sys.exit(run_process(main))
