"""Batch jobs: a data set of prompts in, the same data set with generated text out, exactly once whatever happens.

    python -m flexbatch.apps.batch INPUT OUTPUT --model M --prompt-column text --max-tokens 64

INPUT is a Parquet file, folder, glob or hive-partitioned data set, an ``s3://`` or ``gs://`` URI, CSV, JSON lines,
an OpenAI batch file (``--input-format openai``), or a data set of the `datasets` library. Starting the same command
again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from flexbatch.apps.jobs.locations import check_folders, check_input, check_output
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.cli.command import exit_code, resume_command, run_command, set_up_logging
from flexbatch.cli.early_checks import check_engine, check_folder_to_write, check_sampling
from flexbatch.cli.help import CommandParser
from flexbatch.cli.loras import lora_identity
from flexbatch.cli.ranks import ALONE, Elsewhere, run_on_ranks
from flexbatch.cli.settings import (
    add_arguments,
    add_engine_arguments,
    read_settings,
    refuse_measurements,
)
from flexbatch.config import EngineConfig
from flexbatch.policy.stdout import run_process
from flexbatch.validation.errors import ConfigurationError, told

if TYPE_CHECKING:
    from flexbatch.apps.jobs.plan import BatchJob
    from flexbatch.apps.jobs.preview import Preview
    from flexbatch.apps.jobs.runner import OpenEngine


logger = logging.getLogger("flexbatch")


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "flexbatch batch",
        description="Complete every row of a data set, exactly once whatever happens: Parquet parts with the input's "
        "columns and the answers. The same command goes on where it stopped.",
        first="prompt_column prompt_template model max_tokens temperature gpu_memory cpu_memory weight_bits "
        "retry_failed config",
        examples="""
            flexbatch batch articles/ out/ --prompt-template 'Summarize: {text}'
            flexbatch batch requests.jsonl out/ --input-format openai
            """,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="INPUT OUTPUT",
        help="Parquet, CSV, JSON lines (file, folder, glob, URI); and the folder for part-00000.parquet, ...",
    )
    add_arguments(parser, JobConfig, "job")
    add_engine_arguments(parser)
    return parser


def model_identity(config: EngineConfig) -> dict[str, Any]:
    """Returns what the answers depend on besides the requests: a digest of every file that is read of the model (or the
    shape's name and the seed of random weights), and the settings that change tokens, with the values that they have on
    this machine.

    Digests of files are recorded in the offload folder, so that a resumed job need not read the checkpoint once more.
    Raises ConfigurationError.
    """
    from flexbatch.models.fingerprint import RECORDS, model_files_digest, tokenizer_files_digest
    from flexbatch.models.opened import open_configured
    from flexbatch.models.resolve import resolve, tokenizer_folder
    from flexbatch.planner.budgets import offload_dir, resolve_device, resolve_dtype

    records = offload_dir(config) / RECORDS

    def identity(name: str) -> dict[str, Any]:
        if config.dummy_weights:
            return {"name": name, "weights": f"random, seed {config.seed}"}
        return {"files": model_files_digest(resolve(name), records)}

    try:
        found = identity(config.model)
        arch = open_configured(config).arch
        dtype = resolve_dtype(config.dtype, arch, resolve_device(config.device))
        found |= {"dtype": str(dtype).removeprefix("torch."), "allow_bits": sorted(config.allow_bits or ())}
        found |= lora_identity(config, records)
        if config.tokenizer is not None:
            found["tokenizer"] = tokenizer_files_digest(tokenizer_folder(config.tokenizer))
        if config.max_model_len is not None:
            found["max_model_len"] = config.max_model_len
        if config.draft and config.draft_sampling != "matched":
            # Else a draft changes how fast tokens come, and no token.
            drafts = {name: identity(name) for name in config.draft if name != "ngram"}
            found |= {"drafts": drafts, "draft_sampling": config.draft_sampling, "tree": config.tree}
        return found
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigurationError(str(error)) from error


def open_llm(config: EngineConfig, seen: Preview | None = None, others: Elsewhere = ALONE) -> Any:
    """Opens the engine, planned for sequences like those of the preview. others: ranks and engines that torchrun has
    started."""
    from flexbatch.apps.jobs.preview import planner_job
    from flexbatch.engine import LLM
    from flexbatch.planner.meshes import with_chosen_mesh
    from flexbatch.planner.planner import Planner

    job = planner_job(config, seen) if seen is not None else None
    config = with_chosen_mesh(config, job)
    return LLM.from_planner(Planner(config, job, channel=others.channel, group=others.group))


def locations(words: Sequence[str], config: JobConfig) -> tuple[str, str]:
    """INPUT and OUTPUT, each as a word or by its flag. Raises ConfigurationError for one that is missing, or is there
    twice."""
    found, left = {}, list(words)
    for name, flag, given in (("INPUT", "--prompts", config.prompts), ("OUTPUT", "--output", config.output)):
        found[name] = given if given is not None else left.pop(0) if left else None
        if found[name] is None:
            raise ConfigurationError(f"missing {name}; see flexbatch batch --help, or give it by {flag}")
    if left:
        raise ConfigurationError(
            "INPUT and OUTPUT are given both as words and by --prompts and --output: leave one out"
        )
    return str(found["INPUT"]), str(found["OUTPUT"])


def print_job_plan(job: BatchJob, data: TextIO) -> int:
    """--dry-run: what the job would read and write, and the plan for rows like its own."""
    from flexbatch.apps.jobs.preview import planner_job, preview
    from flexbatch.run import print_plan

    rows = sum(part.rows for part in job.parts)
    logger.info("%s rows in %s parts; nothing is written to %s", f"{rows:,}", f"{len(job.parts):,}", job.folder)
    words = "planned for rows like the first ones of the job; every answer as long as it may get"
    return print_plan(job.engine, planner_job(job.engine, preview(job, job.parts)), None, words, False, None, data)


def run(
    words: Sequence[str],
    config: JobConfig,
    engine: EngineConfig,
    environ: Mapping[str, str],
    resume: str,
    open_engine: OpenEngine,
    identity: Any,
    data: TextIO,
) -> int:
    refuse_measurements(engine)
    if engine.parallel and "WORLD_SIZE" in environ:
        raise ConfigurationError(
            "--parallel auto shares out the GPUs of one host, whose processes it starts itself: with torchrun give the "
            "sizes; flexbatch plan --gpus N --parallel auto says which"
        )
    if engine.mesh_shape.size == 1:
        # Processes of torchrun divide the rows among them.
        return run_rows(words, config, engine, environ, resume, open_engine, identity, data)
    if config.ray:
        raise ConfigurationError(
            f"{engine.mesh_shape.sizes} and --ray: actors have one GPU each, and share the rows among them; leave one "
            "out"
        )

    def lead(others: Elsewhere) -> int:
        open_ranks: Any = open_engine
        opened = open_engine if others == ALONE else functools.partial(open_ranks, others=others)
        return run_rows(words, config, engine, {}, resume, opened, identity, data)

    return run_on_ranks(environ, engine.mesh_shape, lead, config.dry_run)


def run_rows(
    words: Sequence[str],
    config: JobConfig,
    engine: EngineConfig,
    environ: Mapping[str, str],
    resume: str,
    open_engine: OpenEngine,
    identity: Any,
    data: TextIO,
) -> int:
    """The job, or the part of it that ``environ`` names."""
    source, output = locations(words, config)
    check_folders(source, output)
    check_input(source, config)
    check_output(output)
    check_folder_to_write("output", output)
    check_sampling(config)
    check_engine(engine)
    from flexbatch.apps.jobs.plan import plan_job
    from flexbatch.apps.jobs.runner import run_shard
    from flexbatch.apps.jobs.shard_assignment import divide_host, find_assignment

    assignment = find_assignment(config.shard_of(), environ)
    if assignment.shards > 1 and config.overwrite:
        raise ConfigurationError(
            "--overwrite with several processes would discard the others' parts: remove the output folder, then "
            "start them"
        )
    source, output = locations(words, config)
    if config.dry_run:
        # Nothing is written that a later start would have to fit.
        return print_job_plan(plan_job(source, output, config, engine, lambda engine: {}), data)
    job = plan_job(source, output, config, engine, identity)
    if config.ray:
        from flexbatch.apps.jobs.cluster import run_on_ray

        return run_on_ray(job, open_engine, resume)
    if assignment.local_size > 1:
        import torch

        from flexbatch.memory.host_memory import host_memory_bytes
        from flexbatch.planner.budgets import default_offload_dir

        gpus = 0 if engine.device == "cpu" else torch.cuda.device_count()
        engine = divide_host(engine, assignment, gpus, default_offload_dir(), host_memory_bytes())
        job = dataclasses.replace(job, engine=engine)
    return run_shard(job, assignment, open_engine, resume)


def main(
    argv: Sequence[str] | None = None, *, open_engine: OpenEngine = open_llm, identity: Any = model_identity
) -> int:
    """Runs the command; returns its exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if len(args.words) > 2:
        parser.error(f"unrecognized arguments: {' '.join(args.words[2:])}")
    set_up_logging(words=argv)
    try:
        config, engine = read_settings([JobConfig, EngineConfig], args, os.environ, getattr(args, "config", None))
    except (ConfigurationError, OSError) as error:
        logger.error("%s", told(error))
        return exit_code(error)
    # A settings file or a variable may say it, too, and would say it again to who goes on.
    resume = resume_command(sys.orig_argv) + " --no-overwrite" * config.overwrite
    return run_command(
        lambda data: run(args.words, config, engine, os.environ, resume, open_engine, identity, data), resume
    )


if __name__ == "__main__":
    sys.exit(run_process(main))
