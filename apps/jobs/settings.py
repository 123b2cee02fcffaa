"""Settings of a batch job. The command line, the environment and the YAML file are derived from the fields of
JobConfig."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from flexbatch.apps.jobs.template import pieces_of
from flexbatch.cli.run_settings import InputConfig, SamplingConfig
from flexbatch.config import option
from flexbatch.validation.errors import ConfigurationError

FORMATS = ("auto", "parquet", "csv", "jsonl", "openai", "dataset")
NO_COLUMNS = (
    "--parse-json is for columns; the answers to an OpenAI batch file are lines of the API, whose texts are JSON"
)
SETTING_COLUMNS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "lora", "json_schema")


@dataclass(frozen=True)
class JobConfig(InputConfig, SamplingConfig):
    """The settings of a job: what to read, how to make prompts of it, how to generate, and what to write. Raises
    ConfigurationError that names the setting."""

    prompts: str | None = option(None, "the same as INPUT", metavar="INPUT")
    output: str | None = option(None, "the same as OUTPUT", metavar="OUTPUT")
    limit: int | None = option(None, "only the first N rows")
    dry_run: bool = option(False, "print the plan, its price and the memory it needs, load nothing, write nothing")
    input_format: str = option("auto", "form of the input; auto looks at file names", choices=FORMATS)
    dataset_config: str | None = option(None, "configuration of a data set of the datasets library")
    split: str | None = option(None, "split of a data set of the datasets library")
    column_types: tuple[str, ...] = option(
        (),
        "types of columns of CSV (default: text) or JSON lines (default: what holds all values), e.g. id=int64",
        nargs="+",
        metavar="COLUMN=TYPE",
    )
    prompt_column: str | None = option(
        None, 'column that holds the prompts (default: "prompt", else "messages", where there is one)'
    )
    messages_column: str | None = option(
        None, "column that holds chat messages, as a list of {role, content} or as JSON"
    )
    prompt_template: str | None = option(None, "prompt made of columns, e.g. 'Summarize: {text}'; {{ and }} are braces")
    max_tokens_column: str | None = option(None, "column with max_tokens per row; null means --max-tokens")
    temperature_column: str | None = option(None, "column with temperature per row")
    top_p_column: str | None = option(None, "column with top_p per row")
    top_k_column: str | None = option(None, "column with top_k per row")
    seed_column: str | None = option(
        None, "column with the seed per row; null means one derived from --seed and the row's index"
    )
    stop_column: str | None = option(None, "column with stop texts per row")
    lora_column: str | None = option(
        None, "column with the name of an adapter of --lora per row; null means --lora-default, or none"
    )
    json_schema_column: str | None = option(
        None, "column with a JSON schema per row, as text or object; null means --json-schema, or any text"
    )
    parse_json: bool = option(
        False, "with a JSON schema, write the answers parsed too, as a column parsed_json of the schema's type"
    )
    generated_tokens: bool = option(False, "write the generated token ids too")
    output_prefix: str = option("", "put this before the names of the result columns (default: nothing)")
    part_rows: int | None = option(
        None, "rows of one output part at most (default: about 64 parts of 100 to 10,000 rows)"
    )
    window_rows: int = option(1024, "rows that are ordered among each other, for balance and shared prefixes")
    retry_failed: bool = option(False, "run the rows that ended in an error again")
    retry_truncated: int | None = option(
        None, "run the rows whose answers were cut at fewer than N tokens again, and all that are left, with N at least"
    )
    max_errors: str | None = option(
        None, "stop when more rows than this fail: a number, or a share of the rows such as 1%", metavar="N|P%"
    )
    overwrite: bool = option(False, "discard what an earlier job wrote to the output")
    metrics_file: str | None = option(None, "Prometheus text file, replaced every ten seconds")
    shard: str | None = option(
        None, "do only shard K, from 0 to N-1, of N; any machine can do any shard", metavar="K/N"
    )
    ray: bool = option(False, "run on a Ray cluster, one engine per actor")
    ray_actors: int | None = option(None, "engines on the Ray cluster (default: one per GPU, or one on CPUs)")
    ray_address: str | None = option(None, "Ray cluster to join (default: RAY_ADDRESS, or one started here)")
    ray_cpus: float = option(1.0, "CPUs that one actor reserves")

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.prompt_column, self.messages_column, self.prompt_template)) > 1:
            raise ConfigurationError("give only one of --prompt-column, --messages-column and --prompt-template")
        if self.prompt_template is not None:
            pieces_of(self.prompt_template)
        for name in ("part_rows", "window_rows", "ray_actors", "retry_truncated"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name}={value} must be at least 1")
        if self.ray and self.shard:
            raise ConfigurationError("--shard and --ray exclude each other: Ray hands the parts to its actors itself")
        if self.overwrite and self.shard:
            raise ConfigurationError(
                "--overwrite with --shard would discard the other shards' parts: remove the output folder, then "
                "start the shards"
            )
        if self.overwrite and self.retry_truncated is not None:
            raise ConfigurationError("--overwrite discards what --retry-truncated would keep: give one of them")
        if self.overwrite and self.retry_failed:
            raise ConfigurationError("--overwrite discards what --retry-failed would keep: give one of them")
        if self.parse_json and self.json_schema is None and self.json_schema_column is None:
            raise ConfigurationError("--parse-json needs a schema: give --json-schema or --json-schema-column")
        if self.parse_json and self.input_format == "openai":
            raise ConfigurationError(NO_COLUMNS)
        self.error_limit(1)
        self.shard_of()
        self.check_limit()
        self.check_sampling()

    def setting_columns(self) -> dict[str, str]:
        """Maps a setting to the column that holds it per row."""
        pairs = ((name, getattr(self, f"{name}_column")) for name in SETTING_COLUMNS)
        return {name: column for name, column in pairs if column is not None}

    def error_limit(self, rows: int) -> int | None:
        """Returns how many of ``rows`` rows may fail; None for any number."""
        if self.max_errors is None:
            return None
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", self.max_errors.strip())
        if match is None or (match[2] and float(match[2]) > 100):
            raise ConfigurationError(f"max_errors={self.max_errors!r} must be a number of rows, or a share such as 1%")
        return int(match[1]) if match[1] else int(rows * float(match[2]) / 100)

    def shard_of(self) -> tuple[int, int] | None:
        """Returns (K, N) of ``--shard K/N``."""
        if self.shard is None:
            return None
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigurationError(
                f"shard={self.shard!r} must be K/N with K from 0 to N-1, e.g. 0/4, 1/4, 2/4 and 3/4"
            )
        return int(match[1]), int(match[2])

    def identity(self) -> dict[str, Any]:
        """Returns the settings that change what is in the output, without the sampling parameters: those depend on
        the model, too."""
        prompt = {
            name: getattr(self, name)
            for name in ("prompt_column", "messages_column", "prompt_template", "truncate", "limit")
        }
        prompt["column_types"] = sorted(self.column_types)
        output = {
            name: getattr(self, name)
            for name in ("output_prefix", "generated_tokens", "logprobs", "prompt_logprobs", "parse_json")
        }
        generation = {"columns": self.setting_columns(), "disable_any_whitespace": self.disable_any_whitespace}
        return {"generation": generation, "prompt": prompt, "output": output}
