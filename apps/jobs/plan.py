"""Makes of settings a job that can run: source, reader, parts, output and fingerprint. Everything that can be wrong
is found here, before a model loads."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.columns import ROW_ERROR, parse_types
from flexbatch.apps.jobs.csv_source import CsvSource
from flexbatch.apps.jobs.files import list_files, partition_values
from flexbatch.apps.jobs.json_lines import JsonLinesSource
from flexbatch.apps.jobs.layout import Part, default_part_rows, first_rows, plan_parts
from flexbatch.apps.jobs.locations import check_folders, is_dataset_name
from flexbatch.apps.jobs.manifest import FORMAT, fingerprint_digest
from flexbatch.apps.jobs.openai_reader import OpenAIReader, names_here
from flexbatch.apps.jobs.openai_responses import OpenAIOutput
from flexbatch.apps.jobs.openai_source import OpenAISource
from flexbatch.apps.jobs.prompts import Template, check_length, row_error
from flexbatch.apps.jobs.results import Output, ParquetOutput, RowRecord, runs_again
from flexbatch.apps.jobs.rows import Encode, RequestReader, RowReader, RowRequest
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.apps.jobs.sources import DatasetSource, ParquetSource, RowSource
from flexbatch.apps.jobs.text_source import MAX_LINE
from flexbatch.cli.loras import for_all_rows
from flexbatch.config import EngineConfig
from flexbatch.models.generation_config import generation_of
from flexbatch.models.lora.request import parse_loras
from flexbatch.request import SAMPLING_RULES, SamplingParams
from flexbatch.validation.errors import ConfigurationError
from flexbatch.validation.secrets import redacted_word

logger = logging.getLogger("flexbatch")


@dataclass(frozen=True)
class BatchJob:
    """A job, the same on every machine. ``reader`` makes requests of the rows of ``source``, ``output`` makes files
    of their completions; ``fingerprint`` names everything that changes the output."""

    config: JobConfig
    engine: EngineConfig
    folder: str
    source: RowSource
    reader: RequestReader
    output: Output
    parts: Sequence[Part]
    fingerprint: dict[str, Any]

    def runs_again(self, record: RowRecord) -> bool:
        """Returns whether a row that is finished is to be run once more."""
        return runs_again(record, self.output, self.config.retry_failed, self.config.retry_truncated)


def open_source(location: str, config: JobConfig, max_request: int = MAX_LINE) -> RowSource:
    """Opens the source behind an input. ``max_request``: bytes that a line of an OpenAI batch file may have. Raises
    ConfigurationError."""
    types = parse_types(config.column_types)
    source = _open_source(location, config, types, max_request)
    if types and source.identity["format"] not in ("csv", "jsonl"):
        form = source.identity["format"]
        raise ConfigurationError(f"column_types is for CSV and JSON lines; {form} input brings types of its own")
    return source


def _mixed_kinds(location: str, kinds: Collection[str | None], first: str) -> str:
    """The error of files that cannot be read together, or of which nobody knows how."""
    if len(kinds) == 1:
        lines = first.lower().endswith(".txt")
        remedy = "flexbatch run --prompts reads lines of text" if lines else "--input-format says what it holds"
        return f"input {redacted_word(location)} is no Parquet, CSV or JSON lines by its name; {remedy}"
    return (
        f"input {redacted_word(location)} holds files of several kinds ({first}, ...): choose one with a glob, or "
        "--input-format"
    )


def _open_source(location: str, config: JobConfig, types: dict[str, pa.DataType], max_request: int) -> RowSource:
    kind, path = config.input_format, Path(location).expanduser()
    if "://" not in location:
        saved = path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
        if kind == "dataset" or (kind == "auto" and (saved or is_dataset_name(location, config))):
            return DatasetSource(str(path) if path.is_dir() else location, config.dataset_config, config.split)
    filesystem, files = list_files(location)
    if kind in ("auto", "dataset"):
        kinds = {file.format for file in files}
        if len(kinds) > 1 or None in kinds:
            raise ConfigurationError(_mixed_kinds(location, kinds, files[0].name))
        kind = str(kinds.pop())
    if kind == "openai":
        return OpenAISource(filesystem, files, max_request)
    if kind in ("csv", "jsonl"):
        return (CsvSource if kind == "csv" else JsonLinesSource)(filesystem, files, types)
    return ParquetSource(filesystem, files)


def choose_prompt(config: JobConfig, names: Sequence[str]) -> JobConfig:
    """Returns the settings with a source of prompts: where none is given, the column "prompt" or "messages". Raises
    ConfigurationError where there is neither."""
    if config.prompt_column or config.messages_column or config.prompt_template is not None:
        return config
    if "prompt" in names:
        return dataclasses.replace(config, prompt_column="prompt")
    if "messages" in names:
        return dataclasses.replace(config, messages_column="messages")
    raise ConfigurationError(
        "which column holds the prompts? Give --prompt-column, --messages-column or --prompt-template; columns "
        f"are: {', '.join(names)}"
    )


def warn_of_equal_prompts(config: JobConfig, names: Sequence[str]) -> None:
    """Says so where a template takes nothing from its row."""
    if config.prompt_template is not None and not Template(config.prompt_template).columns:
        logger.warning(
            "--prompt-template %r has no field, so that every row has the same prompt; write {%s}, say (the columns "
            "are: %s)",
            config.prompt_template,
            names[0] if names else "text",
            ", ".join(names),
        )


def without_errors(schema: pa.Schema) -> pa.Schema:
    """Returns the columns of the input, without the column in which its source reports errors."""
    index = schema.get_field_index(ROW_ERROR)
    return schema if index < 0 else schema.remove(index)


def settings_for_manifest(params: SamplingParams) -> dict[str, Any]:
    """Returns sampling parameters as JSON values: those that differ from the defaults, and a few that are always
    shown."""
    neutral, shown = dataclasses.asdict(SamplingParams()), ("max_tokens", "temperature", "top_p", "top_k", "stop")
    values = {
        name: value for name, value in dataclasses.asdict(params).items() if name in shown or value != neutral[name]
    }
    return json.loads(json.dumps(values))


def with_adapters(engine: EngineConfig, config: JobConfig) -> EngineConfig:
    """The settings where rows are those of a table, which choose adapters by a column. Raises ConfigurationError."""
    if config.lora_column is None:
        return for_all_rows(engine, "--lora-column COLUMN, or --lora-default NAME for all")
    if not engine.lora:
        raise ConfigurationError(
            f"--lora-column {config.lora_column} names adapters, and none is given: add --lora NAME=FOLDER for each"
        )
    return engine


def plan_job(
    location: str,
    folder: str,
    config: JobConfig,
    engine: EngineConfig,
    model_identity: Callable[[EngineConfig], dict[str, Any]],
    models: Collection[str] | None = None,
    urls: Collection[str] | None = None,
    max_request: int = MAX_LINE,
) -> BatchJob:
    """Plans a job; reads schemas and footers of the input, nothing else of Parquet. ``models`` and ``urls``: those that
    requests of an OpenAI batch file may name; None: `names_here`, and any that are known. ``max_request``: bytes that
    one may have. Raises ConfigurationError."""
    check_folders(location, folder)
    source = open_source(location, config, max_request)
    engine = engine if isinstance(source, OpenAISource) else with_adapters(engine, config)
    partitions = sorted({name for group in source.row_groups for name in partition_values(group.folder)})
    schema = without_errors(source.schema)
    if not isinstance(source, OpenAISource):
        config = choose_prompt(config, [*schema.names, *partitions])
    chosen = config.api_params if isinstance(source, OpenAISource) else config.params
    params = chosen(generation_of(engine))
    part_rows = config.part_rows or default_part_rows(source.row_groups)
    # Before the files of the model are read, a prompt column that is not there is told.
    reader: RequestReader
    if isinstance(source, OpenAISource):
        if config.prompt_logprobs is not None:
            raise ConfigurationError(
                "--prompt-logprobs is for columns of prompts; requests of the OpenAI API ask by echo and logprobs"
            )
        names = [request.name for request in parse_loras(engine.lora)]
        models = names_here(engine.model, names) if models is None else models
        reader = OpenAIReader(params, engine.seed, config.max_tokens, source.repeated, names, models, urls)
    else:
        warn_of_equal_prompts(config, [*schema.names, *partitions])
        reader = RowReader(config, schema, partitions, params, engine.seed)
    identity = config.identity()
    identity["output"]["part_rows"] = part_rows
    identity["seed"] = engine.seed
    generation = settings_for_manifest(params)
    identity["generation"] |= {
        name: value for name, value in generation.items() if name not in ("logprobs", "prompt_logprobs")
    }
    precision = {name: getattr(engine, name) for name in ("dtype", "weight_bits", "cache_bits", "dummy_weights")}
    fingerprint = {"input": source.identity, "model": {**precision, **model_identity(engine)}, **identity}
    fingerprint["versions"] = {"sampling": SAMPLING_RULES, "output folder": FORMAT}
    output: Output
    if isinstance(source, OpenAISource):
        # Chat requests without a limit of their own have this one, or none.
        fingerprint["generation"]["chat_max_tokens"] = config.max_tokens
        output = OpenAIOutput(fingerprint_digest(fingerprint).hex()[:12])
    else:
        output = ParquetOutput(config, schema, partitions)
        output.log_columns()
    parts = first_rows(plan_parts(source.row_groups, part_rows), config.limit)
    return BatchJob(config, engine, folder, source, reader, output, parts, fingerprint)


def make_encode(llm: Any, truncate: str | None, tokens: int | None = None) -> Encode:
    """Returns the function that makes rows ready for the engine, which may generate ``tokens`` at least. It works on a
    copy of the tokenizer: the engine decodes with its own in another thread meanwhile."""
    from flexbatch.text.prompts import PromptEncoder

    tokenizer, context = copy.deepcopy(llm.tokenizer), llm.arch.context
    encoder = PromptEncoder(tokenizer, max_context=context, vocab_size=llm.arch.vocab_size, truncate=truncate)

    def encode(row: RowRequest) -> RowRequest:
        try:
            params = row.params
            if tokens is not None and params.max_tokens is not None:
                params = dataclasses.replace(params, max_tokens=max(params.max_tokens, tokens))
            encoder.check_params(row.index, params)
            if truncate is None and params.truncate_prompt_tokens is None:
                check_length(row.prompt, context)
            found = encoder.read(row.index, row.prompt, params.max_tokens, params.truncate_prompt_tokens)
            params = encoder.with_tokens(row.index, params).within(context - len(found.token_ids))
            # Of a prompt that was cut, what an answer may repeat is what is left of it.
            prompt = found.token_ids if found.cut else row.prompt
            return dataclasses.replace(row, prompt=prompt, token_ids=found.token_ids, params=params)
        except Exception as error:
            raise row_error(error) from error

    return encode
