"""What a setting may hold, by the type that its field is declared with: a wrong one is refused by its name, and not
met later as a TypeError."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from flexbatch.validation.checks import Check, Unfit, checked, number, optional, several, text, truth, whole

LONGEST = 4096
"""Characters of a path on Linux, and more than any other setting has."""
LARGEST = 2**31 - 1
SEED = whole(-(2**63), 2**64 - 1)


def memory(value: Any) -> int | str:
    """Bytes, or text that `config.parse_bytes` reads."""
    if isinstance(value, str):
        return value
    try:
        return whole(0, 2**63 - 1)(value)
    except Unfit:
        raise Unfit("a whole number of bytes, or text such as 16GiB") from None


def drafts(value: Any) -> tuple[str, ...]:
    """The letters of a name are no names, nor are the keys of a dict."""
    try:
        return several(text(LONGEST), 1024, "names")(value)
    except Unfit as problem:
        wanted = "a folder, a Hub id, demo-draft or ngram, or a list of them"
        raise Unfit(wanted, problem.part_name, problem.part) from None


FINITE = number(math.isfinite, "finite")
BY_TYPE: Mapping[str, Check] = {
    "str": text(LONGEST),
    "str | None": optional(text(LONGEST)),
    "bool": truth,
    "bool | None": optional(truth),
    "int": whole(),
    "int | None": optional(whole(None, LARGEST)),
    "float | None": optional(FINITE),
    "str | int | None": optional(memory),
    "tuple[float, ...] | None": optional(several(FINITE, 1024, "numbers")),
    "tuple[int, ...] | None": optional(several(whole(), 1024, "whole numbers")),
    "tuple[str, ...] | None": optional(drafts),
}


def adapters(value: Any) -> tuple[str, ...]:
    """NAME=FOLDER texts, or a mapping of names to folders."""
    wanted = "NAME=FOLDER texts, or names with their folders"
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) and isinstance(path, str | os.PathLike) for name, path in value.items()):
            raise Unfit(wanted)
        value = [f"{name}={os.fspath(path)}" for name, path in value.items()]
    return several(text(2 * LONGEST), 2**16, wanted)(value)


BY_NAME: Mapping[str, Check] = {"seed": SEED, "lora": optional(adapters)}
TORCH = ("device", "dtype")


def settings_of(config: Any) -> dict[str, Any]:
    """The values of a dataclass of settings as its fields want them. Raises ConfigurationError that names the field.

    Paths become text, and so do torch's devices and dtypes; one alone of several is a tuple of it.
    """
    values = {}
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if kind.startswith("tuple") and isinstance(value, str | os.PathLike | int | float):
            value = (value,)
        if kind.startswith("tuple") and isinstance(value, list | tuple):
            value = tuple(map(plain, value))
        check = BY_NAME.get(field.name) or BY_TYPE[kind]
        values[field.name] = checked("setting", field.name, plain(value), check)
    return values


def plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "torch" and type(value).__name__ in TORCH:
        return str(value).removeprefix("torch.")
    return value
