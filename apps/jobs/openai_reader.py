"""The rows of OpenAI batch files as requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.columns import ROW_ERROR
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.openai_requests import Call, RequestError, parse_request
from flexbatch.apps.jobs.openai_source import LINE
from flexbatch.apps.jobs.rows import RowRequest, row_seed
from flexbatch.request import SamplingParams
from flexbatch.validation.checks import short

MOST_NAMED = 20
"""Names that an error tells."""


class OpenAIReader:
    """Makes requests of the lines of a batch file. ``chat_limit`` is as in `parse_request`; ``repeated`` maps a row
    whose ``custom_id`` an earlier row has to that row. A request whose ``model`` is one of ``adapters``
    gets it. ``models`` and ``urls``: what a request may name; None: any, and those that are known."""

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        chat_limit: int | None = None,
        repeated: Mapping[int, int] | None = None,
        adapters: Collection[str] = (),
        models: Collection[str] | None = None,
        urls: Collection[str] | None = None,
    ) -> None:
        self._models, self._urls = models, urls
        self._params, self._seed, self._adapters = params, seed, frozenset(adapters)
        self._chat_limit, self._repeated = chat_limit, dict(repeated or {})

    def rows(self, table: pa.Table, part: Part, skip: Callable[[int], bool]) -> Iterator[RowRequest]:
        problems = table[ROW_ERROR].to_pylist() if ROW_ERROR in table.schema.names else [None] * len(table)
        for offset, (line, problem) in enumerate(zip(table[LINE].to_pylist(), problems, strict=True)):
            if not skip(offset):
                index = part.first_row + offset
                try:
                    if problem is not None:
                        raise RequestError("invalid_json_line", problem)
                    yield self._row(part.number, offset, index, line)
                except RequestError as error:
                    yield RowRequest(part.number, offset, index, error=str(error), extra=error.call)

    def _row(self, part: int, offset: int, index: int, line: bytes) -> RowRequest:
        call, prompts, params = parse_request(line, self._params, self._chat_limit)
        if self._urls is not None and call.url not in self._urls:
            raise RequestError("invalid_url", f"url is {call.url}, and the batch is for {', '.join(self._urls)}", call)
        check_model(call, self._models)
        if index in self._repeated:
            told = f"custom_id {short(call.custom_id)} is that of row {self._repeated[index]} already"
            raise RequestError("duplicate_custom_id", told, call)

        def seed(number: int) -> int:
            return row_seed(self._seed, f"{index}.{number}" if number else index)

        located = RowRequest(part, offset, index, extra=call, lora=call.model if call.model in self._adapters else None)
        return with_prompts(located, prompts, params, seed)


def check_model(call: Call, models: Collection[str] | None) -> None:
    """Raises RequestError for a request that names a model which is not one of these; None: any will do."""
    if models is not None and call.model and call.model not in models:
        known = ", ".join(map(repr, list(models)[:MOST_NAMED])) + (", ..." if len(models) > MOST_NAMED else "")
        raise RequestError(
            "model_not_found", f"the model {short(call.model)} does not exist here; known: {known}", call
        )


def names_here(model: str, adapters: Sequence[str]) -> tuple[str, ...] | None:
    """What a request of a batch file may call the model or one of its adapters. Files are written for other servers, so
    that any name will do where there is nothing to choose (None); where there are adapters, one that is misspelled
    would be answered by the model without it.
    """
    if not adapters:
        return None
    path = Path(model).expanduser()
    own = (path.resolve().name, path.stem if path.is_file() else "") if path.exists() else ()
    return tuple(dict.fromkeys(name for name in (*adapters, model, *own) if name))


def with_prompts(
    row: RowRequest, prompts: Sequence[Any], params: SamplingParams, seed: Callable[[int], int]
) -> RowRequest:
    """A row with the prompts of its request. ``seed``: of the random stream of each, where the request has none."""
    requests = []
    for number, prompt in enumerate(prompts):
        own = params
        if params.seed is None and params.temperature > 0:
            own = dataclasses.replace(params, seed=seed(number))
        requests.append(dataclasses.replace(row, prompt=prompt, params=own, number=number, prompts=len(prompts)))
    return dataclasses.replace(requests[0], others=requests[1:])
