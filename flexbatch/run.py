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
from flexbatch.cli.early_checks import check_engine, check_files, check_plot, check_sampling
from flexbatch.cli.help import Parser
from flexbatch.cli.run_settings import RunConfig, SamplingConfig
from flexbatch.cli.settings import add_arguments, add_engine_arguments, read_settings
from flexbatch.config import EngineConfig
from flexbatch.policy.stdout import run_process
from flexbatch.validation.errors import DONE, ROW_ERRORS, ConfigurationError

if TYPE_CHECKING:  # --help waits for nothing that only a run needs
    from flexbatch.cli.result_file import ResultFile, ResultStream
    from flexbatch.cli.run_work import Work
    from flexbatch.engine import LLM
    from flexbatch.request import Completion

logger = logging.getLogger("flexbatch")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
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


def print_plan(engine: EngineConfig, run: RunConfig, sampling: SamplingConfig, data: TextIO) -> int:
    """--dry-run: what would be where, what it should cost, and why. Raises DoesNotFitError as a run would."""
    from flexbatch.cli import tables
    from flexbatch.cli.run_work import make_work
    from flexbatch.planner.planner import Planner
    from flexbatch.policy.explain import explain, summary
    from flexbatch.policy.whatif import plot_plan

    work = make_work(engine, run, sampling)
    job, words = work.planned_job(run, sampling)
    report = Planner(engine, job, dry=True, model=work.model).describe(job)
    plan = report.pop("plan")
    if run.json:
        print(json.dumps({**report, **summary(plan), "planned_for": words}, indent=2, default=str), file=data)
    else:
        print(words, explain(plan, f"{tables.shares(report)}\n{tables.memory(report)}"), sep="\n", file=data)
    if run.plot is not None:
        try:
            plot_plan(plan, run.plot)
        except ImportError as error:
            raise ConfigurationError(f"--plot {run.plot}: {error}") from error
    return DONE


class Printed:
    """Completions on stdout, in the order of the prompts and as they finish."""

    def __init__(self, work: Work, data: TextIO) -> None:
        self._work, self._data = work, data
        self._waiting: dict[int, Completion] = {}
        self._next = 0

    def add(self, index: int, completion: Completion) -> None:
        self._waiting[index] = completion
        while self._next in self._waiting:
            completion = self._waiting.pop(self._next)
            for sample in completion.samples or [completion]:
                print_completion(self._next, self._work.rows[self._next].prompt, sample, self._data)
            self._next += 1
        self._data.flush()


def complete(llm: LLM, work: Work, first: int, on_prompt: Callable[[int, Completion], None]) -> list[Completion]:
    """The completions of all prompts from number ``first`` on."""
    from flexbatch.cli.progress import Progress

    with Progress((len(work.rows) - first) * work.params.n) as progress:
        return llm.generate(
            work.token_ids[first:], work.params, on_finished=progress.finished, on_prompt=on_prompt, first_index=first
        )


def print_tables(report: Mapping[str, Any]) -> None:
    from flexbatch.cli import tables

    for text in (
        tables.placement(report),
        tables.throughput(report),
        tables.job(report),
        tables.prediction(report),
        tables.speculation(report),
        tables.resources(report),
    ):
        if text:
            print(f"\n{text}", file=sys.stderr)


def print_completion(index: int, prompt: Any, completion: Completion, data: TextIO) -> None:
    """The prompt and its continuation, as text where the model has a tokenizer. Of one that failed, the log says
    why."""
    ending = f"prompt {index}: {len(completion.token_ids)} tokens, {completion.finish_reason}"
    print(f"----- {ending} -----", file=data)
    if isinstance(prompt, str):
        print(prompt + completion.text, file=data)
    else:
        print(completion.text or " ".join(map(str, completion.token_ids)), file=data)


def run(args: argparse.Namespace, environ: Mapping[str, str], data: TextIO) -> int:
    """Everything after parsing; returns the exit code."""
    engine, config, sampling = read_settings([EngineConfig, RunConfig, SamplingConfig], args, environ, args.config)
    engine = with_flexgen_flags(engine, config)
    if config.plot and not config.dry_run:
        raise ConfigurationError("--plot draws the plan of a --dry-run; add --dry-run")
    if config.trace and not Path(config.trace).absolute().parent.is_dir():
        raise ConfigurationError(f"--trace {config.trace}: its folder does not exist")
    check_plot("--plot", config.plot)
    check_sampling(sampling)
    check_files({"--prompts": config.prompts} if "://" not in (config.prompts or "") else {})
    if config.output is not None:
        refuse_inputs(config.output, {"--prompts": config.prompts, "--config": args.config})
    check_engine(engine)
    from flexbatch.cli.result_file import results
    from flexbatch.cli.run_work import make_work

    if config.dry_run:
        return print_plan(engine, config, sampling, data)
    if config.output is None:
        work = make_work(engine, config, sampling)
        return run_work(engine, config, work, 0, None if config.json else Printed(work, data).add, data)
    with results(config.output, data) as out:
        work = make_work(engine, config, sampling)
        return run_into(out, engine, config, work, data)


def refuse_inputs(output: str, inputs: Mapping[str, str | None]) -> None:
    """Raises ConfigurationError where rows would be written over a file that is read, by whatever name or link."""
    for flag, path in inputs.items():
        if path is not None and os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output):
            raise ConfigurationError(
                f"--output {output} is the file of {flag}, which it would replace: name another one"
            )


def run_into(out: ResultFile | ResultStream, engine: EngineConfig, config: RunConfig, work: Work, data: TextIO) -> int:
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
        code = max(code, run_work(engine, config, work, first, add, data))
    except BaseException:
        if out.written:
            logger.error(
                "%d of %d rows are in %s; the same command goes on after them",
                out.written,
                len(work.rows),
                config.output,
            )
        raise
    out.check()
    logger.info("wrote %d completions to %s", len(work.rows) - first, config.output)
    return code


def run_work(
    engine: EngineConfig,
    config: RunConfig,
    work: Work,
    first: int,
    on_prompt: Callable[[int, Completion], None] | None,
    data: TextIO,
) -> int:
    """Loads the model and runs the prompts from number ``first`` on; returns the exit code."""
    from flexbatch.cli import result_rows
    from flexbatch.engine import LLM
    from flexbatch.planner.planner import Planner
    from flexbatch.text.files import json_text

    planner = Planner(engine, work.job(first), model=work.model)
    with LLM.from_planner(planner, trace=config.trace is not None) as llm:
        completions = complete(llm, work, first, on_prompt or (lambda index, completion: None))
        if config.trace:
            llm.tracer.write(config.trace)
        report = llm.report()
    if config.json:
        lines = (
            []
            if config.output
            else [
                result_rows.output_line(row, completion) for row, completion in zip(work.rows, completions, strict=True)
            ]
        )
        report_text = json.dumps(report, ensure_ascii=False, default=str)
        print(f'{{"completions": {json_text(lines)}, "report": {report_text}}}', file=data)
    print_tables(report)
    return ROW_ERRORS if any(completion.finish_reason == "error" for completion in completions) else DONE


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = make_parser().parse_args(argv)
    set_up_logging(words=argv)
    writes = hasattr(args, "output")
    return run_command(lambda data: run(args, os.environ, data), resume_command(sys.orig_argv) if writes else None)


if __name__ == "__main__":
    sys.exit(run_process(main))
