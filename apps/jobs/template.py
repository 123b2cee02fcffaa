"""The pieces of a prompt template, read as soon as it is given: nothing is imported for it."""

from __future__ import annotations

import string

from flexbatch.text.files import MARK
from flexbatch.validation.errors import ConfigurationError


def pieces_of(text: str) -> list[tuple[str, tuple[str, ...] | None]]:
    """Text, and the path of the field behind it, if any. Raises ConfigurationError for what is no template."""
    pieces: list[tuple[str, tuple[str, ...] | None]] = []
    try:
        for literal, name, form, conversion in string.Formatter().parse(text.removeprefix(MARK)):
            if name is not None and (form or conversion or not name or any(mark in name for mark in "[]()")):
                raise ConfigurationError(
                    f"prompt template: {{{name}}} must be the name of a column; write {{{{ and }}}} for braces"
                )
            pieces.append((literal, None if name is None else tuple(name.split("."))))
    except ValueError as error:
        raise ConfigurationError(f"prompt template {text!r}: {error}; write {{{{ and }}}} for braces") from None
    return pieces
