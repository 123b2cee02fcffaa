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
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from flexbatch.cli import prompt_files, random_prompts, tables
from flexbatch.cli.progress import Progress
from flexbatch.cli.prompt_files import PromptRow
from flexbatch.cli.result_file import ResultFile, ResultStream, results
from flexbatch.cli.settings import (
    DONE,
    ROW_ERRORS,
    Parser,
    add_arguments,
    add_engine_arguments,
    read_settings,
    resume_command,
    run_command,
    set_up_logging,
)
from flexbatch.config import EngineConfig, option
from flexbatch.policy.stdout import run_process
from flexbatch.request import SAMPLING_RULES, Completion, SamplingParams
from flexbatch.text.files import json_text
from flexbatch.validation.errors import ConfigurationError

if TYPE_CHECKING:
    from flexbatch.engine import LLM
    from flexbatch.job import Job
    from flexbatch.models.generation_config import GenerationDefaults

logger = logging.getLogger("flexbatch")
SYNTHETIC_PROMPT_LEN = 512
SYNTHETIC_PROMPTS = 16
MAX_TOKENS = 64


@dataclass(frozen=True)
class RunConfig:
    """What to run; the engine's settings are in EngineConfig."""

    prompts: str | None = option(
        None,
        "prompts: .txt (one a line), .json (a list), .jsonl or .parquet (field prompt) (default: bundled Python code)",
        metavar="FILE",
    )
    output: str | None = option(
        None,
        "write completions as JSON lines as they finish, in the order of the prompts; goes on where an interrupted "
        "run stopped",
        metavar="FILE",
    )
    num_prompts: int | None = option(
        None, "run only the first N prompts; of made-up prompts, make N (default: one block)"
    )
    prompt_len: int | None = option(
        None, f"make up prompts of N random tokens; with --dummy-weights and no --prompts, {SYNTHETIC_PROMPT_LEN}"
    )
    json: bool = option(False, "print completions and report as one JSON document")
    trace: str | None = option(
        None, "write a timeline of every link and processor for Chrome or Perfetto", metavar="FILE"
    )
    dry_run: bool = option(False, "print the plan, its price and the memory it needs, load nothing, run nothing")
    plot: str | None = option(None, "with --dry-run, draw time per resource and memory per tier", metavar="PNG")
    path: str | None = option(
        None, "folder of the model, or the folder that holds it under the model's name", metavar="FOLDER"
    )
    compress_weight: bool = option(False, "the same as --weight-bits 4")
    compress_cache: bool = option(False, "the same as --cache-bits 4")
    cpu_cache_compute: bool = option(False, "the same as --cpu-attention 1")
    pin_weight: bool = option(True, "accepted for FlexGen's sake: on a GPU machine, host weights are always pinned")


@dataclass(frozen=True)
class SamplingConfig:
    """SamplingParams of all prompts. What is None or empty the model's generation_config.json says; greedy unless
    either asks for more, so that a run can be
    repeated."""

    max_tokens: int | None = option(
        None,
        "tokens to generate for every prompt; 0 scores the prompts "
        "(default: as the model's generation_config.json says, else 64)",
        aliases=("--gen-len",),
    )
    temperature: float | None = option(
        None, "0 takes the most likely token (default: as generation_config.json says, else 0)"
    )
    top_p: float | None = option(
        None,
        "draw from the most likely tokens that together have this probability "
        "(default: as generation_config.json says, else 1)",
    )
    top_k: int | None = option(
        None, "draw from the N most likely tokens; 0 keeps all (default: as generation_config.json says, else 0)"
    )
    min_p: float | None = option(
        None,
        "drop tokens less likely than this share of the most likely one "
        "(default: as generation_config.json says, else 0)",
    )
    repetition_penalty: float | None = option(
        None,
        "divide the logits of tokens in prompt or output by this (default: as generation_config.json says, else 1)",
    )
    presence_penalty: float = option(0.0, "subtract this from the logits of tokens in the output (default: 0)")
    frequency_penalty: float = option(0.0, "subtract this once for every occurrence in the output (default: 0)")
    stop: tuple[str, ...] = option((), "end at any of these texts, which are cut off", nargs="+", metavar="TEXT")
    stop_token_ids: tuple[int, ...] = option((), "end at any of these tokens", nargs="+", metavar="ID")
    ignore_eos: bool = option(False, "go on after the end-of-sequence token; made-up prompts always do")
    n: int | None = option(None, "completions of every prompt (default: 1)")
    logprobs: int | None = option(None, "return log-probabilities of the N most likely tokens at every generated place")
    prompt_logprobs: int | None = option(
        None, "return log-probabilities of the N most likely tokens at every place of the prompt"
    )

    def given(self) -> dict[str, Any]:
        """What the user has set."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if value is not None and value != ()}

    def params(self, generation: GenerationDefaults, **more: Any) -> SamplingParams:
        """With the model's own settings where the user has none. Raises ConfigurationError."""
        return generation.params({**self.given(), **more}, max_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class Work:
    """The rows as given, the token ids of their prompts, and how to complete them."""

    rows: list[PromptRow]
    token_ids: list[list[int]]
    params: SamplingParams
    max_context: int
    folder: Path | None
    """Of the model; None with random weights."""

    def job(self, first: int = 0) -> Job:
        """What the planner needs to know of it, from prompt number ``first`` on."""
        from flexbatch.job import Job

        rest = self.token_ids[first:]
        lengths = [(len(ids), self.params.tokens_within(self.max_context - len(ids))) for ids in rest]
        return Job.of(lengths * self.params.n, self.max_context)

    def facts(self, engine: EngineConfig) -> dict[str, Any]:
        """What the completions depend on, by the names of the flags: where tensors lie and in which blocks prompts run
        may change from run to run."""
        settings = (
            *("weight_bits", "cache_bits", "allow_bits", "dtype", "device", "seed"),
            *("draft", "draft_sampling", "simulate_acceptance", "dummy_weights"),
        )
        rows = [[row.prompt, row.fields, ids] for row, ids in zip(self.rows, self.token_ids, strict=True)]
        facts = {
            "prompts": f"{len(self.rows)} with digest {digest(rows)}",
            "model": engine.model if self.folder is None else digest(model_files(self.folder, engine)),
            "sampling_rules": SAMPLING_RULES,
            **dataclasses.asdict(self.params),
        }
        return {**facts, **{name: getattr(engine, name) for name in settings}}


def model_files(folder: Path, engine: EngineConfig) -> dict[str, str]:
    """Digests of the files of a model. They are recorded in the offload folder, so that a run that goes on, or the next
    one of the same model, need not read the checkpoint once more."""
    from flexbatch.models.fingerprint import RECORDS, model_files_digest
    from flexbatch.planner.budgets import offload_dir

    return model_files_digest(folder, offload_dir(engine) / RECORDS)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def make_parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="python -m flexbatch.run",
        description=description,
        epilog=rest,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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


def make_work(engine: EngineConfig, run: RunConfig, sampling: SamplingConfig) -> Work:
    """Read or make up the prompts and encode them: everything that can be wrong with them is found before any weight
    is loaded."""
    for name in ("num_prompts", "prompt_len"):
        if getattr(run, name) is not None and getattr(run, name) < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(run, name)} must be at least 1")
    if run.prompts is not None and run.prompt_len is not None:
        raise ConfigurationError("--prompts reads prompts and --prompt-len makes them up; leave one out")
    synthetic = run.prompts is None and (run.prompt_len is not None or engine.dummy_weights)
    rows = (
        [] if synthetic else prompt_files.read_prompts(run.prompts or prompt_files.BUNDLED_PROMPTS)[: run.num_prompts]
    )
    from flexbatch.models.generation_config import GenerationDefaults, generation_of
    from flexbatch.models.opened import open_model
    from flexbatch.text.prompts import PromptEncoder

    sampling.params(GenerationDefaults())  # what is wrong with it comes before what is wrong with the model
    params = sampling.params(generation_of(engine), ignore_eos=sampling.ignore_eos or synthetic)
    model = open_model(engine.model, engine.dummy_weights)
    context, vocab_size = model.arch.max_positions, model.arch.vocab_size
    if synthetic:
        count = run.num_prompts or (engine.gpu_batch_size or SYNTHETIC_PROMPTS) * (engine.num_gpu_batches or 1)
        made_up = random_prompts.synthetic_prompts(
            count, run.prompt_len or SYNTHETIC_PROMPT_LEN, vocab_size, engine.seed
        )
        rows = [PromptRow(prompt) for prompt in made_up]
    tokenizer = None if synthetic else model.tokenizer
    encoder = PromptEncoder(tokenizer, max_context=context, vocab_size=vocab_size)
    encoder.check_params(0, params)
    token_ids = [encoder.encode(index, row.prompt, params.max_tokens) for index, row in enumerate(rows)]
    return Work(rows, token_ids, params, context, model.folder)


def print_plan(engine: EngineConfig, work: Work, as_json: bool, plot: str | None, data: TextIO) -> int:
    """--dry-run: what would be where, what it should cost, and why. Raises DoesNotFitError as a run would."""
    from flexbatch.engine import LLM
    from flexbatch.policy.explain import explain, summary
    from flexbatch.policy.whatif import plot_plan

    report = LLM.plan(engine, work.job())
    plan = report.pop("plan")
    if as_json:
        print(json.dumps({**report, **summary(plan)}, indent=2, default=str), file=data)
    else:
        print(f"{explain(plan)}\n\n{tables.placement(report)}", file=data)
    if plot is not None:
        try:
            plot_plan(plan, plot)
        except ImportError as error:
            raise ConfigurationError(f"--plot {plot}: {error}") from error
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
    with Progress((len(work.rows) - first) * work.params.n) as progress:
        return llm.generate(
            work.token_ids[first:], work.params, on_finished=progress.finished, on_prompt=on_prompt, first_index=first
        )


def print_tables(report: Mapping[str, Any]) -> None:
    for text in (
        tables.placement(report),
        tables.throughput(report),
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
    if config.dry_run:
        return print_plan(engine, make_work(engine, config, sampling), config.json, config.plot, data)
    if config.output is None:
        work = make_work(engine, config, sampling)
        return run_work(engine, config, work, 0, None if config.json else Printed(work, data).add, data)
    refuse_inputs(config.output, {"--prompts": config.prompts, "--config": args.config})
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
    first = out.begin(work.facts(engine), [row.prompt for row in work.rows])
    code = ROW_ERRORS if any(row.get("finish_reason") == "error" for row in out.done) else DONE
    if first:
        logger.info("%d of %d rows are in %s already", first, len(work.rows), config.output)
    if first == len(work.rows):
        return code

    def add(index: int, completion: Completion) -> None:
        out.add(index, random_prompts.output_line(work.rows[index], completion))

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
    from flexbatch.engine import LLM

    with LLM.from_config(engine, trace=config.trace is not None, job=work.job(first)) as llm:
        completions = complete(llm, work, first, on_prompt or (lambda index, completion: None))
        if config.trace:
            llm.tracer.write(config.trace)
        report = llm.report()
    if config.json:
        lines = (
            []
            if config.output
            else [
                random_prompts.output_line(row, completion)
                for row, completion in zip(work.rows, completions, strict=True)
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
