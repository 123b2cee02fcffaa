"""What a run does: its prompts read or made up, encoded, with how to complete them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexbatch.cli import prompt_files, random_prompts
from flexbatch.cli.loras import lora_identity
from flexbatch.cli.prompt_files import PromptRow
from flexbatch.cli.run_settings import SYNTHETIC_PROMPT_LEN, SYNTHETIC_PROMPTS, RunConfig, SamplingConfig
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.request import SAMPLING_RULES, SamplingParams
from flexbatch.validation.errors import ConfigurationError

if TYPE_CHECKING:
    from flexbatch.models.opened import OpenModel


LONG_JOB = 4096
"""Prompts that a --dry-run without prompts plans for: several blocks of any size that is chosen."""


@dataclass(frozen=True)
class Work:
    """The rows as given, the token ids of their prompts, and how to complete them."""

    rows: list[PromptRow]
    token_ids: list[list[int]]
    params: SamplingParams
    model: OpenModel

    def job(self, first: int = 0) -> Job:
        """What the planner needs to know of it, from prompt number ``first`` on."""
        return Job.of(self.lengths(first), self.model.arch.context)

    def lengths(self, first: int = 0) -> list[tuple[int, int]]:
        """(prompt tokens, most new tokens) of every sequence, from prompt number ``first`` on, in their order."""
        context = self.model.arch.context
        pairs = [(len(ids), self.params.tokens_within(context - len(ids))) for ids in self.token_ids[first:]]
        return [pair for pair in pairs for _ in range(self.params.n)]

    def planned_job(self, run: RunConfig, sampling: SamplingConfig) -> tuple[Job, str]:
        """What a --dry-run plans for, and words that say so: the prompts given; without any, a long job of typical
        lengths, as far as the settings name no others."""
        if run.prompts is not None:
            return self.job(), "planned for the prompts of --prompts; every answer as long as it may get"
        context, params = self.model.arch.context, self.params
        prompt = min(run.prompt_len or Job.TYPICAL_PROMPT, max(1, context - 1))
        answer = Job.TYPICAL_ANSWER if sampling.max_tokens is None else params.tokens_within(context - prompt)
        count = (run.limit or LONG_JOB) * params.n
        job = Job.alike(count, prompt, answer, context)
        answer = min(answer, context - prompt)
        return job, (
            f"no prompts were given: planned for a job of {count:,} prompts of {prompt:,} tokens, "
            f"answers of {answer:,}. "
            "--prompts FILE plans for yours; --limit, --prompt-len and --max-tokens for others"
        )

    def facts(self, engine: EngineConfig) -> dict[str, Any]:
        """What the completions depend on, by the names of the flags: where tensors lie and in which blocks prompts run
        may change from run to run."""
        settings = (
            *("weight_bits", "cache_bits", "allow_bits", "dtype", "device", "seed", "tokenizer", "max_model_len"),
            *("draft", "draft_sampling", "simulate_acceptance", "dummy_weights"),
        )
        rows = [[row.prompt, row.fields, ids] for row, ids in zip(self.rows, self.token_ids, strict=True)]
        facts = {
            "prompts": f"{len(self.rows)} with digest {digest(rows)}",
            "model": engine.model if self.model.folder is None else digest(model_files(self.model.folder, engine)),
            "sampling_rules": SAMPLING_RULES,
            **lora_identity(engine),
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


def make_work(engine: EngineConfig, run: RunConfig, sampling: SamplingConfig) -> Work:
    """Read or make up the prompts and encode them: everything that can be wrong with them is found before any weight
    is loaded."""
    run.check_limit()
    if run.prompt_len is not None and run.prompt_len < 1:
        raise ConfigurationError(f"--prompt-len {run.prompt_len} must be at least 1")
    if run.prompts is not None and run.prompt_len is not None:
        raise ConfigurationError("--prompts reads prompts and --prompt-len makes them up; leave one out")
    synthetic = run.prompts is None and (run.prompt_len is not None or engine.dummy_weights)
    rows = [] if synthetic else prompt_files.read_prompts(run.prompts or prompt_files.BUNDLED_PROMPTS)[: run.limit]
    from flexbatch.models.generation_config import GenerationDefaults, generation_of
    from flexbatch.models.opened import open_configured
    from flexbatch.text.prompts import PromptEncoder

    sampling.params(GenerationDefaults())  # what is wrong with it comes before what is wrong with the model
    params = sampling.params(generation_of(engine), ignore_eos=sampling.ignore_eos or synthetic)
    model = open_configured(engine)
    context, vocab_size = model.arch.context, model.arch.vocab_size
    if synthetic:
        count = run.limit or (engine.gpu_batch_size or SYNTHETIC_PROMPTS) * (engine.num_gpu_batches or 1)
        made_up = random_prompts.synthetic_prompts(
            count, run.prompt_len or SYNTHETIC_PROMPT_LEN, vocab_size, engine.seed
        )
        rows = [PromptRow(prompt) for prompt in made_up]
    tokenizer = None if synthetic else model.tokenizer
    encoder = PromptEncoder(tokenizer, max_context=context, vocab_size=vocab_size, truncate=run.truncate)
    encoder.check_params(0, params)
    token_ids = [encoder.encode(index, row.prompt, params.max_tokens) for index, row in enumerate(rows)]
    return Work(rows, token_ids, params, model)
