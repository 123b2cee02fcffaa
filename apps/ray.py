"""FlexBatch on clusters: a stateful class for Ray Data and Spark, and the runner of ``flexbatch batch --ray``.

Ray Data, with an actor pool. Repartition first: small files otherwise collapse into one block, which one actor gets
whole. Take batches of several engine blocks: the engine drains at the end of each. ``preserve_order`` keeps the rows in
order::

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = ray.data.read_parquet("in").repartition(64)
    rows = rows.map_batches(
        GenerateText, fn_constructor_kwargs={"prompt_column": "text", "max_tokens": 64, "model": "demo"},
        batch_format="pyarrow", batch_size=4096, compute=ray.data.ActorPoolStrategy(size=3), num_cpus=0.5,
    )
    rows.write_parquet("out")

Spark, where the engine lives as long as the partition and does not drain between record batches::

    def generate(batches):
        with GenerateText(prompt_column="text", max_tokens=64, model="demo") as engine:
            yield from engine.stream(batches)

    df.mapInArrow(generate, schema="text string, " + GenerateText.SPARK_COLUMNS).write.parquet("out")

Neither commits parts nor resumes; ``flexbatch batch --ray`` does, with the files of a job on one machine.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from flexbatch.apps.batch import open_llm
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.plan import choose_prompt, make_encode
from flexbatch.apps.jobs.prompts import RowError
from flexbatch.apps.jobs.results import ParquetOutput, RowRecord
from flexbatch.apps.jobs.rows import RowReader, RowRequest
from flexbatch.apps.jobs.runner import OpenEngine
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.cli.loras import for_all_rows
from flexbatch.cli.settings import refuse_measurements
from flexbatch.config import EngineConfig
from flexbatch.models.generation_config import generation_of
from flexbatch.request import SamplingParams
from flexbatch.validation.errors import ConfigurationError


class GenerateText:
    """Adds the result columns of a batch job to Arrow tables; loads its engine once.

    Keywords are the fields of `JobConfig` and `EngineConfig` that speak of prompts, generation, result columns and
    the engine. Without a seed column, rows with equal prompts draw equal texts: a batch does not know where in
    the data set it lies. Raises ConfigurationError for wrong keywords.
    """

    SPARK_COLUMNS = (
        "generated_text string, finish_reason string, num_input_tokens int, num_generated_tokens int, error string"
    )

    def __init__(self, *, open_engine: OpenEngine = open_llm, **settings: Any) -> None:
        names = {field.name for field in dataclasses.fields(JobConfig)}
        known = names | {field.name for field in dataclasses.fields(EngineConfig)}
        if unknown := sorted(settings.keys() - known):
            raise ConfigurationError(f"unknown settings: {', '.join(unknown)}")
        self._config = JobConfig(**{name: value for name, value in settings.items() if name in names})
        engine = EngineConfig(**{name: value for name, value in settings.items() if name not in names})
        refuse_measurements(engine)
        engine = engine if self._config.lora_column else for_all_rows(engine)
        self._params = self._config.params(generation_of(engine))
        self._seed, self._llm = engine.seed, open_engine(engine, None)
        self._encode = make_encode(self._llm, self._config.truncate)
        self._form: tuple[RowReader, ParquetOutput] | None = None

    def __enter__(self) -> GenerateText:
        return self

    def __exit__(self, *exc: object) -> None:
        self._llm.__exit__(None, None, None)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Processes one batch of Ray Data (``batch_format="pyarrow"``)."""
        batches = self.stream(table.combine_chunks().to_batches())
        return pa.Table.from_batches(batches, schema=self._form_for(table.schema)[1].schema)

    def stream(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yields the batches with the result columns, in order; the engine is refilled across batch boundaries."""
        waiting: deque[tuple[pa.RecordBatch, list[RowRecord]]] = deque()
        in_flight: dict[int, tuple[list[RowRecord], RowRequest]] = {}
        for key, completion in self._llm.stream(self._items(batches, waiting, in_flight)):
            records, row = in_flight.pop(key)
            assert self._form is not None
            records[row.offset] = self._form[1].record(row, [completion])
            yield from self._whole(waiting)
        yield from self._whole(waiting)

    def _whole(self, waiting: deque[tuple[pa.RecordBatch, list[RowRecord]]]) -> Iterator[pa.RecordBatch]:
        while waiting and None not in waiting[0][1]:
            batch, records = waiting.popleft()
            table = self._form_for(batch.schema)[1].table(pa.Table.from_batches([batch]), records)
            yield from table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]

    def _items(
        self,
        batches: Iterable[pa.RecordBatch],
        waiting: deque[tuple[pa.RecordBatch, list[RowRecord]]],
        in_flight: dict[int, tuple[list[RowRecord], RowRequest]],
    ) -> Iterator[tuple[int, Sequence[int], SamplingParams, None, str | None]]:
        key = 0
        for batch in batches:
            (reader, output), records = self._form_for(batch.schema), [None] * len(batch)
            waiting.append((batch, records))
            part = Part(0, "", 0, len(batch))
            for row in reader.rows(pa.Table.from_batches([batch]), part, lambda offset: False):
                try:
                    if row.error:
                        raise RowError(row.error)
                    row = self._encode(row)
                except RowError as error:
                    records[row.offset] = output.failure(row, str(error))
                    continue
                in_flight[key] = (records, row)
                yield key, row.token_ids, row.params, None, row.lora
                key += 1

    def _form_for(self, schema: pa.Schema) -> tuple[RowReader, ParquetOutput]:
        if self._form is None:
            config = choose_prompt(self._config, schema.names)
            reader = RowReader(config, schema, (), self._params, self._seed, seed_by_prompt=True)
            self._form = reader, ParquetOutput(config, schema, ())
        return self._form
