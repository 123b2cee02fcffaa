"""The command line of the main job: prompts in, completions out, through a model spread over GPU, CPU and disk.

    python -m flexbatch.run
    python -m flexbatch.run --model MODEL --prompts prompts.jsonl --output out.jsonl --percent 20 80 0 100 0 100
    python -m flexbatch.run --model opt-30b --dummy-weights --prompt-len 512 --gen-len 32 --gpu-memory 16GiB

Completions go to stdout, or to --output as JSON lines; tables and progress go to stderr. With --json, stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flexbatch import tables, workload
from flexbatch.cli import DONE, ROW_ERRORS, add_arguments, add_engine_arguments, read_settings, run_command, set_up_logging
from flexbatch.config import ConfigurationError, EngineConfig, option
from flexbatch.progress import Progress
from flexbatch.request import Completion, SamplingParams

if TYPE_CHECKING:
    from flexbatch.engine import LLM
    from flexbatch.planning import Job

logger = logging.getLogger("flexbatch")
SYNTHETIC_PROMPT_LEN = 512
SYNTHETIC_PROMPTS = 16


@dataclass(frozen=True)
class RunConfig:
    """What to run; the engine's settings are in EngineConfig."""

    prompts: str | None = option(
        None, "prompts: .txt (one a line), .json (a list), .jsonl or .parquet (field prompt) (default: bundled Python code)", metavar="FILE"
    )
    output: str | None = option(None, "write completions as JSON lines, in the order of the prompts, instead of printing them", metavar="FILE")
    num_prompts: int | None = option(None, "run only the first N prompts; of made-up prompts, make N (default: one block)")
    prompt_len: int | None = option(None, f"make up prompts of N random tokens; with --dummy-weights and no --prompts, {SYNTHETIC_PROMPT_LEN}")
    json: bool = option(False, "print completions and report as one JSON document")
    trace: str | None = option(None, "write a timeline of every link and processor for Chrome or Perfetto", metavar="FILE")
    dry_run: bool = option(False, "print the plan, its price and the memory it needs, load nothing, run nothing")
    plot: str | None = option(None, "with --dry-run, draw time per resource and memory per tier", metavar="PNG")
    path: str | None = option(None, "folder of the model, or the folder that holds it under the model's name", metavar="FOLDER")
    compress_weight: bool = option(False, "the same as --weight-bits 4")
    compress_cache: bool = option(False, "the same as --cache-bits 4")
    cpu_cache_compute: bool = option(False, "the same as --cpu-attention 1")
    pin_weight: bool = option(True, "accepted for FlexGen's sake: on a GPU machine, host weights are always pinned")


@dataclass(frozen=True)
class SamplingConfig:
    """SamplingParams of all prompts; greedy unless asked otherwise, so that a run can be repeated."""

    max_tokens: int = option(64, "tokens to generate for every prompt; 0 scores the prompts", aliases=("--gen-len",))
    temperature: float = option(0.0, "0 takes the most likely token (default: 0)")
    top_p: float = option(1.0, "draw from the most likely tokens that together have this probability")
    top_k: int = option(0, "draw from the N most likely tokens; 0 keeps all (default: 0)")
    min_p: float = option(0.0, "drop tokens less likely than this share of the most likely one (default: 0)")
    repetition_penalty: float = option(1.0, "divide the logits of tokens in prompt or output by this")
    presence_penalty: float = option(0.0, "subtract this from the logits of tokens in the output (default: 0)")
    frequency_penalty: float = option(0.0, "subtract this once for every occurrence in the output (default: 0)")
    stop: tuple[str, ...] = option((), "end at any of these texts, which are cut off", nargs="+", metavar="TEXT")
    stop_token_ids: tuple[int, ...] = option((), "end at any of these tokens", nargs="+", metavar="ID")
    ignore_eos: bool = option(False, "go on after the end-of-sequence token; made-up prompts always do")
    n: int = option(1, "completions of every prompt")
    logprobs: int | None = option(None, "return log-probabilities of the N most likely tokens at every generated place")
    prompt_logprobs: int | None = option(None, "return log-probabilities of the N most likely tokens at every place of the prompt")


@dataclass(frozen=True)
class Work:
    """The prompts as given, their token ids, and how to complete them."""

    prompts: list[Any]
    token_ids: list[list[int]]
    params: SamplingParams
    max_context: int

    def job(self) -> Job:
        """What the planner needs to know of it."""
        from flexbatch.planning import Job

        return Job.of([(len(ids), self.params.max_tokens) for ids in self.token_ids] * self.params.n, self.max_context)


def make_parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m flexbatch.run", description=description, epilog=rest, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, RunConfig, "job")
    add_arguments(parser, SamplingConfig, "sampling")
    add_engine_arguments(parser)
    return parser


def with_flexgen_flags(engine: EngineConfig, run: RunConfig) -> EngineConfig:
    """FlexGen's names for settings that have names of their own. Raises ConfigurationError where both are given and differ."""
    changes: dict[str, Any] = {}
    names = {"compress_weight": ("weight_bits", 4, 16), "compress_cache": ("cache_bits", 4, 16), "cpu_cache_compute": ("cpu_attention", 1.0, None)}
    for name, (setting, value, unset) in names.items():
        if getattr(run, name):
            given = getattr(engine, setting)
            if given not in (unset, value):
                raise ConfigurationError(f"--{name.replace('_', '-')} means --{setting.replace('_', '-')} {value:g}, but {given:g} was given; leave one out")
            changes[setting] = value
    if not run.pin_weight:
        logger.warning("--pin-weight false has no effect: on a GPU machine, host weights are always pinned")
    if run.path is not None:
        folder = Path(run.path).expanduser()
        below = folder / engine.model.rsplit("/", 1)[-1]
        changes["model"] = str(below if (below / "config.json").is_file() else folder)
    return dataclasses.replace(engine, **changes)


def make_work(engine: EngineConfig, run: RunConfig, sampling: SamplingConfig) -> Work:
    """Read or make up the prompts and encode them: everything that can be wrong with them is found before any weight is loaded."""
    for name in ("num_prompts", "prompt_len"):
        if getattr(run, name) is not None and getattr(run, name) < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(run, name)} must be at least 1")
    if run.prompts is not None and run.prompt_len is not None:
        raise ConfigurationError("--prompts reads prompts and --prompt-len makes them up; leave one out")
    synthetic = run.prompts is None and (run.prompt_len is not None or engine.dummy_weights)
    prompts = [] if synthetic else workload.read_prompts(run.prompts or workload.BUNDLED_PROMPTS)[: run.num_prompts]
    values = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(sampling)}
    try:
        params = SamplingParams(**{**values, "ignore_eos": sampling.ignore_eos or synthetic})
    except ValueError as error:
        raise ConfigurationError(str(error)) from error

    from flexbatch.models import resolve, shapes
    from flexbatch.models.checkpoint import read_arch
    from flexbatch.prompts import PromptEncoder

    if engine.dummy_weights:
        arch, tokenizer = shapes.shape(engine.model), None
    else:
        folder = resolve.resolve(engine.model)
        arch, tokenizer = read_arch(folder), None if synthetic else resolve.load_tokenizer(folder)
    if synthetic:
        count = run.num_prompts or (engine.gpu_batch_size or SYNTHETIC_PROMPTS) * (engine.num_gpu_batches or 1)
        prompts = workload.synthetic_prompts(count, run.prompt_len or SYNTHETIC_PROMPT_LEN, arch.vocab_size, engine.seed)
    encoder = PromptEncoder(tokenizer, max_context=arch.max_positions, vocab_size=arch.vocab_size)
    encoder.check_params(0, params)
    token_ids = [encoder.encode(index, prompt, params.max_tokens) for index, prompt in enumerate(prompts)]
    return Work(prompts, token_ids, params, arch.max_positions)


def print_plan(engine: EngineConfig, work: Work, as_json: bool, plot: str | None) -> int:
    """--dry-run: what would be where, what it should cost, and why. Raises DoesNotFitError as a run would."""
    from flexbatch.engine import LLM
    from flexbatch.policy.explain import explain, summary
    from flexbatch.policy.whatif import plot_plan

    report = LLM.plan(engine, work.job())
    plan = report.pop("plan")
    if as_json:
        print(json.dumps({**report, **summary(plan)}, indent=2, default=str))
    else:
        print(f"{explain(plan)}\n\n{tables.placement(report)}")
    if plot is not None:
        try:
            plot_plan(plan, plot)
        except ImportError as error:
            raise ConfigurationError(f"--plot {plot}: {error}") from error
    return DONE


def complete(llm: LLM, work: Work) -> list[Completion]:
    total = len(work.prompts) * work.params.n
    with Progress(total) as progress:
        return llm.generate(work.token_ids, work.params, on_finished=progress.finished)


def print_results(run: RunConfig, work: Work, completions: list[Completion], report: Mapping[str, Any]) -> None:
    """Data to stdout, tables to stderr."""
    lines = [] if run.output else [workload.output_line(prompt, completion) for prompt, completion in zip(work.prompts, completions, strict=True)]
    if run.json:
        print(json.dumps({"completions": lines, "report": report}, ensure_ascii=False, default=str))
    else:
        for index, (prompt, completion) in enumerate(zip(work.prompts, completions, strict=True) if lines else ()):
            for sample in completion.samples or [completion]:
                print_completion(index, prompt, sample)
    for text in (tables.placement(report), tables.throughput(report), tables.prediction(report), tables.speculation(report), tables.resources(report)):
        if text:
            print(f"\n{text}", file=sys.stderr)


def print_completion(index: int, prompt: Any, completion: Completion) -> None:
    """The prompt and its continuation, as text where the model has a tokenizer."""
    ending = f"prompt {index}: {len(completion.token_ids)} tokens, {completion.finish_reason}"
    print(f"----- {ending} -----")
    if isinstance(prompt, str):
        print(prompt + completion.text)
    else:
        print(completion.text or " ".join(map(str, completion.token_ids)))


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Everything after parsing; returns the exit code."""
    engine, config, sampling = read_settings([EngineConfig, RunConfig, SamplingConfig], args, environ, args.config)
    engine = with_flexgen_flags(engine, config)
    with contextlib.ExitStack() as stack:
        output: IO[str] | None = stack.enter_context(workload.whole_file(config.output)) if config.output and not config.dry_run else None
        if config.plot and not config.dry_run:
            raise ConfigurationError("--plot draws the plan of a --dry-run; add --dry-run")
        if config.trace and not Path(config.trace).absolute().parent.is_dir():
            raise ConfigurationError(f"--trace {config.trace}: its folder does not exist")
        work = make_work(engine, config, sampling)
        if config.dry_run:
            return print_plan(engine, work, config.json, config.plot)
        from flexbatch.engine import LLM

        llm = stack.enter_context(LLM.from_config(engine, trace=config.trace is not None, job=work.job()))
        completions = complete(llm, work)
        if output is not None:
            workload.write_lines(output, work.prompts, completions)
        if config.trace:
            llm.tracer.write(config.trace)
        report = llm.report()
    print_results(config, work, completions, report)
    if config.output:
        logger.info("wrote %d completions to %s", len(completions), config.output)
    return ROW_ERRORS if any(completion.finish_reason == "error" for completion in completions) else DONE


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = make_parser().parse_args(argv)
    set_up_logging()
    return run_command(lambda: run(args, os.environ))


if __name__ == "__main__":
    sys.exit(main())
