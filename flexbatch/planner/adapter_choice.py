"""Which adapter a request gets, by what its caller gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flexbatch.models.lora.request import as_lora_request
from flexbatch.planner.adapters import with_request
from flexbatch.planner.planner import Planner
from flexbatch.validation.errors import ConfigurationError


class AdapterChoice:
    """The adapters of an engine, to which requests add. may_load: whether nothing runs, so that tensors may come."""

    def __init__(self, planner: Planner, may_load: Callable[[], bool]) -> None:
        self.planner, self.may_load = planner, may_load

    def number(self, value: Any, what: str = "lora_request") -> int:
        """Of the adapter that a LoRARequest, a name or None asks for; 0 for none. Raises ConfigurationError,
        CheckpointError."""
        request, deployment = as_lora_request(value, what), self.planner.deployment
        number, adapters = with_request(deployment.adapters, request, deployment.model, self.may_load())
        if adapters is not deployment.adapters:
            if (engines := self.planner.config.data_parallel_size) > 1:
                raise ConfigurationError(
                    f"{what}: with data_parallel_size={engines} adapters have to be known when the engines are made: "
                    "name them with lora="
                )
            self.planner.adopt(adapters)
        return number

    def numbers(self, value: Any, count: int) -> list[int]:
        """Of each of so many prompts: one value for all, or a list of them."""
        if isinstance(value, str) or not isinstance(value, Sequence):
            return [self.number(value)] * count
        if len(value) != count:
            raise ConfigurationError(f"{len(value)} lora_request for {count} prompts; give one, or one each")
        return [self.number(each, f"lora_request[{i}]") for i, each in enumerate(value)]
