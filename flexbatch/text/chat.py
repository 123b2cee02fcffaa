"""Chat messages as a chat template wants them: content as text or in parts, calls of tools, and messages without
text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexbatch.validation.checks import Check, Unfit, check_keywords, checked, optional, several, text, truth
from flexbatch.validation.errors import ConfigurationError

PROBES = ("qzfirstqz", "qzsecondqz")
OTHER = "qzotherqz"
"""Words that no template writes by itself, in lower case, as some write all in capitals."""
BETWEEN_PARTS = "\n"
"""Joins the parts of a content where the template wants one text, as in vLLM."""


LONGEST_TEMPLATE, MOST_TOOLS = 2**20, 1024
OWN = (
    *("conversation", "messages", "chat_template", "tools", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "processor_kwargs"),
)
"""Names that `apply_chat_template` of transformers takes for itself, or that have a field of `ChatOptions`."""


def _tool(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Unfit('a list of tools, each an object such as {"type": "function", "function": {...}}')
    return dict(value)


def _template_values(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise Unfit("an object from names in the template to values")
    if taken := [name for name in value if name in OWN]:
        raise Unfit(f"of names that only the template knows: {taken[0]!r} is set beside it, or not at all")
    return dict(value)


CHAT_CHECKS: dict[str, Check] = {
    "chat_template": optional(text(LONGEST_TEMPLATE)),
    "add_generation_prompt": optional(truth),
    "continue_final_message": optional(truth),
    "tools": several(_tool, MOST_TOOLS, "tools"),
    "chat_template_kwargs": lambda value: _template_values({} if value is None else value),
}


@dataclass(frozen=True)
class ChatOptions:
    """How chat messages become text; names and meaning as in vLLM.

    ``chat_template``: Jinja text that stands in for the tokenizer's. ``tools``: JSON schemas that the template shows to
    the model. ``chat_template_kwargs``: further values for the template, e.g. ``{"enable_thinking": False}``. Where
    neither ``add_generation_prompt`` nor ``continue_final_message`` is given, a last text of the assistant is continued
    and after any other message an answer begins. Raises ConfigurationError that names the field.
    """

    chat_template: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __new__(cls, *args: Any, **keywords: Any) -> ChatOptions:
        check_keywords("a chat", keywords, CHAT_CHECKS)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, check in CHAT_CHECKS.items():
            object.__setattr__(self, name, checked("chat option", name, getattr(self, name), check))
        if self.add_generation_prompt and self.continue_final_message:
            raise ConfigurationError(
                "add_generation_prompt begins an answer and continue_final_message goes on with the last message; "
                "set only one of them"
            )

    def given(self) -> list[str]:
        """Names of the options that say something."""
        return [name for name in CHAT_CHECKS if getattr(self, name) not in (None, (), {})]

    def ending(self, last: Mapping[str, Any]) -> dict[str, bool]:
        """What `apply_chat_template` is told about the end of a conversation whose last message this is."""
        begun, continued = self.add_generation_prompt, self.continue_final_message
        if begun is None and continued is None:
            continued = last["role"] == "assistant" and bool(last["content"])
        if continued is None:
            continued = False
        return {"add_generation_prompt": not continued if begun is None else begun, "continue_final_message": continued}


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation, a prompt wherever one may be given, with how its template is to write it."""

    messages: Any
    options: ChatOptions = ChatOptions()


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
        self._forms: dict[tuple[str, str | None], tuple[bool, bool]] = {}

    def render(self, messages: Sequence[Mapping[str, Any]], chat: ChatOptions | None = None) -> str:
        """The conversation as text; the template writes the BOS token itself."""
        chat = chat or ChatOptions()
        checked = [_checked(index, message) for index, message in enumerate(messages)]
        template = chat.chat_template
        ready = [
            {**message, "content": self._content(message["role"], message["content"], template)} for message in checked
        ]
        options: dict[str, Any] = {**chat.chat_template_kwargs, **chat.ending(checked[-1]), "chat_template": template}
        if options["continue_final_message"] and not checked[-1]["content"]:
            raise ChatError(f"message {len(checked) - 1} has no text that continue_final_message could go on with")
        if chat.tools:
            options["tools"] = list(chat.tools)
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

    def _content(self, role: str, content: str | list[dict[str, Any]] | None, template: str | None) -> Any:
        """In a form that the template writes."""
        takes_text, takes_parts = self._taken(role, template)
        if isinstance(content, list):
            return content if takes_parts else BETWEEN_PARTS.join(part["text"] for part in content)
        if takes_parts and not takes_text:
            return [{"type": "text", "text": content}] if content else []
        return content or ""

    def _taken(self, role: str, template: str | None) -> tuple[bool, bool]:
        """Whether the template, None for the tokenizer's, writes a content that is a text, and one that is a list of
        parts, of messages of this role."""
        if (own := getattr(self._tokenizer, "chat_template", None)) != self._template:
            self._template, self._forms = own, {}
        if (role, template) not in self._forms:
            self._forms[role, template] = self._probe(role, template)
        return self._forms[role, template]

    def _probe(self, role: str, template: str | None) -> tuple[bool, bool]:
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
                    return self._apply(messages, add_generation_prompt=False, chat_template=template).lower()
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
