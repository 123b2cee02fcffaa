"""How the flags of the commands are shown: by group, and which of them come first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from flexbatch.policy import command_line
from flexbatch.validation.secrets import redacted

INPUT, SAMPLING, MODEL, PLACEMENT = "what goes in", "sampling", "model", "placement"
MEMORY, SPECULATION, OUTPUT, JOB, CLUSTER = "memory", "speculation", "output", "the job", "several GPUs and machines"
GROUPS = (INPUT, OUTPUT, SAMPLING, JOB, MODEL, MEMORY, PLACEMENT, SPECULATION, CLUSTER)
"""Titles, in the order of the help."""
NAMES = {
    INPUT: "prompts limit prompt_len input_format dataset_config split column_types prompt_column "
    "messages_column prompt_template truncate chat system",
    OUTPUT: "output flexflow_output json trace dry_run plot parse_json generated_tokens output_prefix "
    "part_rows metrics_file",
    SAMPLING: "max_tokens temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty stop "
    "stop_token_ids include_stop_str_in_output skip_special_tokens min_tokens bad_words allowed_token_ids ignore_eos n "
    "logprobs prompt_logprobs json_schema disable_any_whitespace choice regex seed generation_config "
    "max_tokens_column temperature_column top_p_column top_k_column seed_column stop_column json_schema_column",
    MODEL: "model lora lora_default lora_column tokenizer max_model_len path dtype device dummy_weights",
    PLACEMENT: "percent gpu_batch_size num_gpu_batches cpu_attention cpu_cache_compute cpu_experts prefill_chunk "
    "prefill_budget overlap async_scheduling piece_tokens hardware recalibrate",
    MEMORY: "gpu_memory cpu_memory offload_dir weight_bits cache_bits allow_bits reserve compress_weight "
    "compress_cache pin_weight",
    SPECULATION: "draft tree draft_sampling simulate_acceptance compare_plain",
    CLUSTER: "parallel gpus data_parallel_size pipeline_parallel_size tensor_parallel_size shard ray ray_actors "
    "ray_address ray_cpus",
}
GROUP_OF = {name: title for title, names in NAMES.items() for name in names.split()}
"""Title by setting; a setting that is not here stands in its command's own group."""

SHORT = {
    "prompts": "file of prompts: .txt, .json, .jsonl, .csv, .parquet; - for stdin",
    "prompt_column": 'column with the prompts (default: "prompt")',
    "prompt_template": "prompt made of columns: 'Summarize: {text}'",
    "output": "where results go; the same command goes on",
    "model": "demo, smollm2, a folder, a GGUF file, a Hub id",
    "max_tokens": "tokens to generate per prompt, at most",
    "temperature": "0 takes the most likely token",
    "chat": "talk, by way of the model's chat template",
    "json": "results as JSON on stdout",
    "gpu_memory": "GPU memory to use (default: what is free)",
    "cpu_memory": "host memory to use (default: what is free)",
    "weight_bits": "16, 8 or 4: fewer need less memory",
    "draft": "small model, or ngram, for speculation",
    "dry_run": "show plan and memory; load nothing, run nothing",
    "retry_failed": "run rows again whose error may be gone now",
    "config": "YAML file with any of these settings",
}
"""Of settings that most people need first: a text of one line for the first help."""


LETTERS = {
    "-m": "--model",
    "-p": "--prompts",
    "-i": "--prompts",
    "-o": "--output",
    "-n": "--n",
    "-t": "--temperature",
    "-c": "--config",
    "--output-file": "--output",
    "--input-file": "--prompts",
    "--input": "--prompts",
}
"""What other programs call a flag."""


class CommandParser(command_line.Parser):
    """The parser of a command over an engine. Its usage errors quote words of the command, which may be URIs with
    credentials."""

    def __init__(
        self, command: str, *, description: str, first: str, examples: str = "", texts: Mapping[str, str] | None = None
    ) -> None:
        """first: the settings, ten at most, that the first help shows; ``texts``: those of settings that `SHORT`
        lacks, or that mean something else here."""
        short = {**SHORT, **(texts or {})}
        super().__init__(
            command,
            description=description,
            first={f"--{name.replace('_', '-')}": short[name] for name in first.split()},
            groups=GROUPS,
            examples=examples,
        )

    def group_of(self, name: str, title: str) -> Any:
        """The group that shows a setting; ``title`` where it belongs to none of `GROUPS`."""
        found = GROUP_OF.get(name, title)
        if found not in self.groups:
            self.groups[found] = self.add_argument_group(found)
        return self.groups[found]

    def meant(self, flag: str) -> str | None:
        if flag in LETTERS:
            return LETTERS[flag]
        from flexbatch.request import OTHER_NAMES  # an import that help need not wait for

        other = OTHER_NAMES.get(flag.removeprefix("--").replace("-", "_"))
        return None if other is None else f"--{other.replace('_', '-')}"

    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))
