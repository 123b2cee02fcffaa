"""Which adapter a request wants, and adapters by their names. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from flexbatch.validation.checks import short
from flexbatch.validation.errors import ConfigurationError

CONFIG_FILE = "adapter_config.json"
"""What PEFT writes beside the weights of an adapter."""


@dataclass(frozen=True)
class LoRARequest:
    """An adapter, by vLLM's names: its own name, a number that nothing here needs, and the folder that PEFT saved.
    Without a folder it is one that the engine knows by its name."""

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""

    def __post_init__(self) -> None:
        for name in ("lora_name", "lora_path"):
            if not isinstance(getattr(self, name), str):
                raise ConfigurationError(f"LoRARequest: {name}={short(getattr(self, name))} must be text")
        if not self.lora_name:
            raise ConfigurationError("LoRARequest: lora_name must not be empty")

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def path(self) -> str:
        return self.lora_path


LoRA = LoRARequest | str | None
"""What a caller gives for one prompt: an adapter, the name of one that the engine knows, or neither."""


def parse_loras(words: Iterable[str] | None) -> tuple[LoRARequest, ...]:
    """Of ``("sql=adapters/sql", ...)``. Raises ConfigurationError that names the word."""
    found: dict[str, LoRARequest] = {}
    for word in words or ():
        name, separator, path = word.partition("=")
        if not separator or not name or not path:
            raise ConfigurationError(f"lora={word!r} must be NAME=FOLDER, e.g. sql=adapters/sql")
        if name in found:
            raise ConfigurationError(f"lora: the name {name!r} stands there twice")
        found[name] = LoRARequest(name, len(found) + 1, path)
    return tuple(found.values())


def check_default(default: str | None, names: Collection[str]) -> None:
    """Raises ConfigurationError where ``lora_default`` is none of the adapters."""
    if default is not None and default not in names:
        known = ", ".join(names) or "none"
        raise ConfigurationError(f"lora_default={default!r} is none of the adapters that lora names: {known}")


def as_lora_request(value: Any, what: str = "lora_request") -> LoRARequest | None:
    """A LoRARequest, a name or None; other classes with vLLM's fields, too. Raises ConfigurationError."""
    if value is None or isinstance(value, LoRARequest):
        return value
    if isinstance(value, str):
        return LoRARequest(value)
    if hasattr(value, "lora_name") and hasattr(value, "lora_path"):
        return LoRARequest(value.lora_name, getattr(value, "lora_int_id", 0), value.lora_path)
    raise ConfigurationError(
        f"{what} is {short(value)}, of type {type(value).__name__}; give LoRARequest(name, number, folder), the "
        "name of an adapter, or None"
    )
