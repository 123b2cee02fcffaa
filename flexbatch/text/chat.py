"""Chat messages as a chat template wants them: content as text or in parts, calls of tools, and messages without
text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

PROBES = ("qzfirstqz", "qzsecondqz")
OTHER = "qzotherqz"
"""Words that no template writes by itself, in lower case, as some write all in capitals."""
BETWEEN_PARTS = "\n"
"""Joins the parts of a content where the template wants one text, as in vLLM."""


class ChatError(ValueError):
    """Messages that are not in order; the message says which."""


class ChatTemplate:
    """Renders messages by a tokenizer's chat template.

    A template may write a content as text, walk over a list of parts, or both; what it does is seen from what it
    makes of a probe, once for every role. Raises ChatError for messages that no template can write, and what the
    template raises.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template: Any = None
        self._forms: dict[str, tuple[bool, bool]] = {}

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as text; the template writes the BOS token itself. A last text of the assistant is
        continued."""
        checked = [_checked(index, message) for index, message in enumerate(messages)]
        ready = [{**message, "content": self._content(message["role"], message["content"])} for message in checked]
        continued = checked[-1]["role"] == "assistant" and bool(checked[-1]["content"])
        options = {"add_generation_prompt": not continued, "continue_final_message": continued}
        text = self._apply(ready, **options)
        if any(message["content"] is None for message in checked):
            # Some templates tell calls of tools by a content that is null or left out, others would write "None".
            absent = [
                {**message, "content": None} if given["content"] is None else message
                for message, given in zip(ready, checked, strict=True)
            ]
            try:
                bare = self._apply(absent, **options)
            except Exception:  # a template that needs a text
                return text
            return text if bare.count("None") > text.count("None") else bare
        return text

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _content(self, role: str, content: str | list[dict[str, Any]] | None) -> Any:
        """In a form that the template writes."""
        takes_text, takes_parts = self._taken(role)
        if isinstance(content, list):
            return content if takes_parts else BETWEEN_PARTS.join(part["text"] for part in content)
        if takes_parts and not takes_text:
            return [{"type": "text", "text": content}] if content else []
        return content or ""

    def _taken(self, role: str) -> tuple[bool, bool]:
        """Whether the template writes a content that is a text, and one that is a list of parts, of messages of this
        role."""
        if (template := getattr(self._tokenizer, "chat_template", None)) != self._template:
            self._template, self._forms = template, {}
        if role not in self._forms:
            self._forms[role] = self._probe(role)
        return self._forms[role]

    def _probe(self, role: str) -> tuple[bool, bool]:
        as_text, as_parts = PROBES[0], [{"type": "text", "text": probe} for probe in PROBES]
        earlier = [] if role in ("user", "system", "developer") else ["user"]
        later = ["user"] if role in ("system", "developer") else []
        if role == "tool":
            earlier.append("assistant")

        def written(content: Any) -> str:
            # The others say something else: what they show tells nothing about this role.
            for other in (OTHER, [{"type": "text", "text": OTHER}]):
                contents = [*([other] * len(earlier)), content, *([other] * len(later))]
                messages = [
                    {"role": who, "content": said} for who, said in zip((*earlier, role, *later), contents, strict=True)
                ]
                try:
                    return self._apply(messages, add_generation_prompt=False).lower()
                except Exception:  # templates raise what they like, e.g. for a role they do not know
                    continue
            return ""

        text, parts = written(as_text), written(as_parts)
        if not text and not parts:
            return True, False
        # a list that is printed shows its keys
        printed = any(parts.count(mark) > text.count(mark) for mark in ("'text'", '"text"', "'type'", '"type"'))
        return PROBES[0] in text, all(probe in parts for probe in PROBES) and not printed


def _checked(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without fields that are null; its content is a text, a list of text parts, or None. Arguments of
    calls become objects."""
    if not isinstance(message.get("role"), str):
        raise ChatError(f'message {index} needs "role" (text) and "content", it has {sorted(map(str, message))}')
    calls = message.get("tool_calls")
    if message.get("content") is None and not (message["role"] == "assistant" and calls):
        raise ChatError(
            f'message {index} needs "role" (text) and "content", it has '
            f"{sorted(str(key) for key, value in message.items() if value is not None)}"
        )
    kept = {str(key): value for key, value in message.items() if value is not None}
    if calls:
        kept["tool_calls"] = [_call(index, call) for call in _listed(index, calls)]
    return {**kept, "content": _checked_content(index, message.get("content"))}


def _checked_content(index: int, content: Any) -> str | list[dict[str, Any]] | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Mapping | bytes) or not isinstance(content, Sequence):
        raise ChatError(
            f"the content of message {index} is a {type(content).__name__}; it may be text or a list of text parts"
        )
    parts = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        if not isinstance(part, Mapping):
            raise ChatError(
                f"part {number} of message {index} is a {type(part).__name__}; "
                'a part is {"type": "text", "text": ...}'
            )
        kind = part.get("type")
        if kind != "text":
            raise ChatError(
                f"part {number} of message {index} is of type {kind!r}; "
                "the model reads text, so only parts of type 'text' can be given"
            )
        if not isinstance(part.get("text"), str):
            raise ChatError(f'part {number} of message {index} has no "text"')
        parts.append({str(key): value for key, value in part.items() if value is not None})
    return parts


def _listed(index: int, calls: Any) -> Sequence[Any]:
    if (
        isinstance(calls, str | bytes | Mapping)
        or not isinstance(calls, Sequence)
        or not all(isinstance(call, Mapping) for call in calls)
    ):
        raise ChatError(f"the tool_calls of message {index} are a {type(calls).__name__}; they are a list of objects")
    return calls


def _call(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a tool, with arguments as the object that templates write; OpenAI's form has them as JSON text."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise ChatError(f"the arguments of a tool call in message {index} are not JSON: {error}") from None
    return {**call, "function": {**function, "arguments": arguments}}
