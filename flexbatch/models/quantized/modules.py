"""Which modules a quantization_config means: names, regular expressions and classes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from flexbatch.validation.errors import CheckpointError


def matches(pattern: str, text: str, key: str) -> bool:
    """`re.match`. Raises CheckpointError for a pattern that is none."""
    try:
        return re.match(pattern, text) is not None
    except re.error as error:
        raise CheckpointError(
            f"config.json: quantization_config.{key}: {pattern!r:.200} is no regular expression: {error}"
        ) from error


def targeted(target: str, names: Collection[str], kind: str, key: str) -> int:
    """How well a target of compressed-tensors fits a module: 3 by its name, 2 by a regular expression ("re:..."), 1 by
    its class, 0 not at all."""
    if target.startswith("re:"):
        return 2 * any(matches(target.removeprefix("re:"), name, key) for name in names)
    return 3 if target in names else int(target == kind)


def left_alone(patterns: Iterable[str], names: Collection[str], key: str) -> bool:
    """Whether a list of modules that are not converted names one, as transformers takes it: the end of a name, or a
    regular expression for its beginning up to the end of a part."""
    return any(
        name.endswith(pattern) or matches(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name, key)
        for pattern in patterns
        for name in names
    )
