"""Makes prompts of the values of a row: a text, chat messages, or a template filled with columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexbatch.apps.jobs.columns import UnfitValue, check_text
from flexbatch.apps.jobs.template import pieces_of
from flexbatch.text.files import json_text, parse_json, with_doubles
from flexbatch.validation.checks import short

LONGEST_TOKEN, LEAST_LIMIT = 128, 2**20
"""Characters. The longest tokens of public vocabularies are runs of 128 spaces; shorter texts are tokenized to see."""


class RowError(ValueError):
    """This row cannot be run; the job goes on without it."""


class Template:
    """A template such as ``Summarize: {text}``: fields are columns, or ``column.field`` of nested ones; ``{{`` and
    ``}}`` are braces. Raises ConfigurationError for anything else."""

    def __init__(self, text: str) -> None:
        self._pieces = pieces_of(text)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path[0] for _, path in self._pieces if path))

    def render(self, row: Mapping[str, Any]) -> str:
        """Returns the prompt of one row. Raises RowError that names a missing or undecodable field."""
        out = []
        for literal, path in self._pieces:
            out.append(literal)
            if path:
                value: Any = row
                for name in path:
                    value = value.get(name) if isinstance(value, Mapping) else None
                out.append(_text(value, ".".join(path)))
        return "".join(out)


def _text(value: Any, name: str) -> str:
    if value is None:
        raise RowError(f"template field {name!r} is missing or null")
    if isinstance(value, bytes):
        return _decode(value, name)
    return unicode_text(json_text(value) if isinstance(value, list | dict) else str(value), name)


def _decode(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(name, error) from None


def not_utf8(name: str, error: UnicodeDecodeError) -> RowError:
    return RowError(f"{name!r} is not UTF-8: {error.reason} at byte {error.start}")


def row_error(error: Exception) -> RowError:
    """Returns whatever went wrong with one row as the reason that its error column gives."""
    if isinstance(error, RowError):
        return error
    known = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
    return RowError(str(error) if known and str(error) else f"{type(error).__name__}: {error}")


def text_prompt(value: Any, name: str) -> str:
    """Returns a text, or bytes that are UTF-8, as text. Raises RowError."""
    if value is None:
        raise RowError(f"{name!r} is null")
    if isinstance(value, bytes):
        return _decode(value, name)
    if not isinstance(value, str):
        raise RowError(f"{name!r} is {short(value)}, not text")
    return unicode_text(value, name)


def unicode_text(value: Any, name: str) -> Any:
    """Returns the value. Raises RowError where a text in it holds half of a surrogate pair."""
    try:
        check_text(value, name)
    except UnfitValue as error:
        raise RowError(str(error)) from None
    return value


def check_length(prompt: Any, context: int) -> None:
    """Raises RowError for a text that no tokenizer could bring into a context, before one tries: 40 MB of one letter
    take gigabytes."""
    messages = getattr(prompt, "messages", prompt)
    texts = (
        [each.get("content") for each in messages if isinstance(each, Mapping)] if isinstance(messages, list) else []
    )
    length = len(prompt) if isinstance(prompt, str) else sum(len(text) for text in texts if isinstance(text, str))
    most = max(LEAST_LIMIT, context * LONGEST_TOKEN)
    if length > most:
        raise RowError(
            f"has {length:,} characters; the model's context of {context} tokens holds {most:,} at most. Shorten it"
        )


def messages_prompt(value: Any, name: str) -> list[dict[str, Any]]:
    """Returns chat messages of a list of {role, content}, or of the JSON text of one. Raises RowError that names the
    message."""
    if value is None:
        raise RowError(f"{name!r} is null")
    if isinstance(value, str | bytes):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RowError(f"{name!r} holds what is {error}") from None
    if not isinstance(value, list) or not value:
        raise RowError(f"{name!r} holds no list of messages")
    messages = []
    for index, message in enumerate(value):
        # an assistant that calls tools may say nothing
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or (message.get("content") is None and not message.get("tool_calls"))
        ):
            raise RowError(f'{name!r}: message {index} needs "role" and "content"')
        messages.append({key: with_doubles(item) for key, item in message.items() if item is not None})
    return unicode_text(messages, name)
