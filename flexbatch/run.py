"""The command line of the main job: prompts in, completions out, through a model spread over GPU, CPU and disk.

    python -m flexbatch.run
    python -m flexbatch.run --model MODEL --prompts prompts.jsonl --output out.jsonl --percent 20 80 0 100 0 100
    python -m flexbatch.run --model opt-30b --dummy-weights --prompt-len 512 --gen-len 32 --gpu-memory 16GiB

Completions go to stdout, or to --output as JSON lines, in the order of the prompts and as they finish; tables and
progress go to stderr. The other fields of the input come along. A run with --output that was interrupted goes on
when the same command is given again. With --json, stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from flexbatch.cli.command import resume_command, run_command, set_up_logging
from flexbatch.cli.early_checks import (
    check_files_to_write,
    check_inputs,
    check_plot,
    check_rows_file,
    check_sampling,
    refuse_inputs,
)
from flexbatch.cli.help import CommandParser
from flexbatch.cli.loras import for_all_rows
from flexbatch.cli.ranks import ALONE, Elsewhere, run_on_ranks
from flexbatch.cli.run_settings import RunConfig, SamplingConfig
from flexbatch.cli.settings import add_arguments, add_engine_arguments, read_settings
from flexbatch.config import EngineConfig
from flexbatch.policy.stdout import run_process
from flexbatch.validation.errors import DONE, INTERRUPTED, ROW_ERRORS, ConfigurationError

if TYPE_CHECKING:  # --help waits for nothing that only a run needs
    from flexbatch.cli.result_file import ResultFile, ResultStream
    from flexbatch.cli.run_work import Work
    from flexbatch.execution.job import Job
    from flexbatch.models.opened import OpenModel
    from flexbatch.request import Completion

logger = logging.getLogger("flexbatch")


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "flexbatch run",
        description="Complete the prompts of a file with a model that is spread over GPU, CPU and disk. Completions go "
        "to --output, else to stdout; tables and progress to stderr. Without flags: bundled prompts, a small model.",
        first="prompts output model max_tokens temperature gpu_memory cpu_memory weight_bits dry_run config",
        examples="""
            flexbatch run
            flexbatch run --prompts prompts.jsonl --output out.jsonl --model gpt2
            flexbatch run --model opt-30b --dummy-weights --gpu-memory 16GiB --dry-run
            """,
    )
    add_arguments(parser, RunConfig, "job")
    add_arguments(parser, SamplingConfig, "sampling")
    add_engine_arguments(parser)
    return parser


def with_flexgen_flags(engine: EngineConfig, run: RunConfig) -> EngineConfig:
    """FlexGen's names for settings that have names of their own. Raises ConfigurationError where both are given and
    differ."""
    changes: dict[str, Any] = {}
    names = {
        "compress_weight": ("weight_bits", 4, 16),
        "compress_cache": ("cache_bits", 4, 16),
        "cpu_cache_compute": ("cpu_attention", 1.0, None),
    }
    for name, (setting, value, unset) in names.items():
        if getattr(run, name):
            given = getattr(engine, setting)
            if given not in (unset, value):
                raise ConfigurationError(
                    f"--{name.replace('_', '-')} means --{setting.replace('_', '-')} {value:g}, but {given:g} was "
                    "given; leave one out"
                )
            changes[setting] = value
    if not run.pin_weight:
        logger.warning("--pin-weight false has no effect: on a GPU machine, host weights are always pinned")
    if run.path is not None:
        folder = Path(run.path).expanduser()
        below = folder / engine.model.rsplit("/", 1)[-1]
        changes["model"] = str(below if (below / "config.json").is_file() else folder)
    return dataclasses.replace(engine, **changes)


def print_plan(
    engine: EngineConfig,
    job: Job | None,
    model: OpenModel | None,
    words: str,
    as_json: bool,
    plot: str | None,
    data: TextIO,
) -> int:
    """--dry-run: what would be where, what it should cost, and why. words: say what job it is that is planned for.
    Raises DoesNotFitError as a run would."""
    from flexbatch.execution.job import Job
    from flexbatch.planner import tables
    from flexbatch.planner.meshes import with_chosen_mesh
    from flexbatch.planner.planner import Planner
    from flexbatch.policy.explain import engines_summary, engines_text, explain, summary
    from flexbatch.policy.whatif import plot_plan

    engine = with_chosen_mesh(engine, job, model, measure=False)
    planner = Planner(engine, job, dry=True, model=model)
    report = planner.describe(job or Job.typical(planner.deployment.model.arch.context))
    plan = report.pop("plan")
    if as_json:
        found = {**report, **summary(plan), **engines_summary(plan, engine.data_parallel_size), "planned_for": words}
        print(json.dumps(found, indent=2, default=str), file=data)
    else:
        text = explain(plan, f"{tables.shares(report)}\n{tables.memory(report)}")
        print(words, engines_text(plan, engine.data_parallel_size) + text, sep="\n", file=data)
    if plot is not None:
        try:
            plot_plan(plan, plot)
        except ImportError as error:
            raise ConfigurationError(f"--plot {plot}: {error}") from error
    return DONE


def run(args: argparse.Namespace, environ: Mapping[str, str], data: TextIO, resume: str | None = None) -> int:
    """Everything after parsing; returns the exit code. ``resume`` is the command that goes on after an interruption."""
    engine, config, sampling = read_settings([EngineConfig, RunConfig, SamplingConfig], args, environ, args.config)
    engine = for_all_rows(with_flexgen_flags(engine, config))

    def lead(others: Elsewhere) -> int:
        return run_job(engine, config, sampling, args.config, data, resume, others)

    return run_on_ranks(environ, engine.mesh_shape, lead, config.dry_run)


def run_job(
    engine: EngineConfig,
    config: RunConfig,
    sampling: SamplingConfig,
    settings_file: str | None,
    data: TextIO,
    resume: str | None,
    others: Elsewhere,
) -> int:
    """A run of one process, or of several as its rank 0."""
    if config.plot and not config.dry_run:
        raise ConfigurationError("--plot draws the plan of a --dry-run; add --dry-run")
    check_rows_file(config.output)
    check_files_to_write({"--trace": config.trace})
    check_plot("--plot", config.plot)
    check_sampling(sampling)
    if config.output is not None:
        refuse_inputs(config.output, {"--prompts": config.prompts, "--config": settings_file})
    from flexbatch.cli.result_file import results
    from flexbatch.cli.run_work import make_work

    if config.dry_run:
        check_inputs(engine, config.prompts)
        work = make_work(engine, config, sampling)
        job, words = work.planned_job(config, sampling)
        return print_plan(engine, job, work.model, words, config.json, config.plot, data)
    try:
        if config.output is None:
            resume = None
            check_inputs(engine, config.prompts)
            work = make_work(engine, config, sampling)
            from flexbatch.cli.run_output import Printed  # with torch, which a mistake need not wait for

            add = None if config.json else Printed(work, data).add
            code = run_work(engine, config, work, 0, add, data, others=others)
        else:
            with results(config.output, data) as out:
                resume = resume if out.resumable else None
                check_inputs(engine, config.prompts)
                work = make_work(engine, config, sampling)
                code = run_into(out, engine, config, work, data, resume, others)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        logger.error("interrupted; %s", f"resume with: {resume}" if resume else "nothing is kept without --output FILE")
    return code


def run_into(
    out: ResultFile | ResultStream,
    engine: EngineConfig,
    config: RunConfig,
    work: Work,
    data: TextIO,
    resume: str | None = None,
    others: Elsewhere = ALONE,
) -> int:
    """A run whose rows go to --output, from the first row on that is not there yet."""
    from flexbatch.cli import result_rows

    first = out.begin(work.facts(engine), [row.prompt for row in work.rows])
    code = ROW_ERRORS if any(row.get("finish_reason") == "error" for row in out.done) else DONE
    if first:
        logger.info("%d of %d rows are in %s already", first, len(work.rows), config.output)
    if first == len(work.rows):
        return code

    def add(index: int, completion: Completion) -> None:
        out.add(index, result_rows.output_line(work.rows[index], completion))

    try:
        code = max(code, run_work(engine, config, work, first, add, data, resume, others))
    finally:
        if 0 < out.written < len(work.rows):
            there = out.written, len(work.rows), config.output
            logger.error("%d of %d rows are in %s; the same command goes on after them", *there)
    out.check()
    if code == INTERRUPTED:
        return code
    logger.info("wrote %d completions to %s", len(work.rows) - first, config.output)
    return code


def run_work(
    engine: EngineConfig,
    config: RunConfig,
    work: Work,
    first: int,
    on_prompt: Callable[[int, Completion], None] | None,
    data: TextIO,
    resume: str | None = None,
    others: Elsewhere = ALONE,
) -> int:
    """Loads the model and runs the prompts from number ``first`` on; returns the exit code."""
    from flexbatch.cli import result_rows
    from flexbatch.cli.run_output import complete, print_report
    from flexbatch.engine import LLM
    from flexbatch.planner.meshes import with_chosen_mesh
    from flexbatch.planner.planner import Planner
    from flexbatch.text.files import json_text

    finished: dict[int, Completion] = {}

    def add(index: int, completion: Completion) -> None:
        finished[index] = completion
        if on_prompt is not None:
            on_prompt(index, completion)

    engine = with_chosen_mesh(engine, work.job(first), work.model)
    planner = Planner(engine, work.job(first), model=work.model, channel=others.channel, group=others.group)
    with LLM.from_planner(planner, trace=config.trace is not None) as llm:
        whole = complete(llm, work, first, add, resume)
        if config.trace:
            llm.tracer.write(config.trace)
        report = llm.report()
    if config.json:
        rows = {} if config.output else finished
        lines = [result_rows.output_line(work.rows[index], rows[index]) for index in sorted(rows)]
        report_text = json.dumps(report, ensure_ascii=False, default=str)
        print(f'{{"completions": {json_text(lines)}, "report": {report_text}}}', file=data)
    print_report(report)
    if not whole:
        return INTERRUPTED
    return ROW_ERRORS if any(completion.finish_reason == "error" for completion in finished.values()) else DONE


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = make_parser().parse_args(argv)
    set_up_logging(words=argv)
    return run_command(lambda data: run(args, os.environ, data, resume_command(sys.orig_argv)))


if __name__ == "__main__":
    sys.exit(run_process(main))
