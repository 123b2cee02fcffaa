"""Prompts to token ids: text, token ids or chat messages, through the tokenizer that lies beside the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from flexbatch.request import SamplingParams
from flexbatch.text.chat import ChatError, ChatTemplate
from flexbatch.text.files import lone_surrogate
from flexbatch.validation.errors import ConfigurationError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""Text, token ids (taken as they are; an array will do), or chat messages with "role" and "content" (one alone will
do). Or vLLM's objects: ``{"prompt": text}``, ``{"prompt_token_ids": ids}``."""
WANTED = 'a prompt is text, a list of token ids, chat messages, {"prompt": text} or {"prompt_token_ids": ids}'


class PromptError(ConfigurationError):
    """A prompt cannot be run; the message names its index, counted from 0."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"prompt {index}: {problem}")
        self.index = index


@dataclass(frozen=True)
class PlainPrompt:
    """A prompt out of its object: ``content`` is what is run, text, token ids or messages; ``text`` is the prompt's
    text where it is known."""

    content: Any
    text: str | None = None


def as_list(value: Any) -> Any:
    """Arrays and tensors as lists; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def plain_prompt(index: int, prompt: Any) -> PlainPrompt:
    """Takes a prompt out of vLLM's objects, and one bare chat message into a list. Raises PromptError for an object
    that is neither."""
    prompt = as_list(prompt)
    if isinstance(prompt, str):
        return PlainPrompt(prompt, prompt)
    if not isinstance(prompt, Mapping):
        return PlainPrompt(prompt)
    # vLLM's optional entries may be null, or empty objects
    given = {
        name: value
        for name, value in prompt.items()
        if value is not None and not (isinstance(value, Mapping) and not value)
    }
    kind = next((name for name in ("prompt_token_ids", "prompt", "role") if name in given), None)
    if kind is None:
        raise PromptError(index, f"is an object with {', '.join(map(repr, prompt)) or 'nothing'}; {WANTED}")
    if kind == "role":
        return PlainPrompt([prompt])
    beside = [name for name in given if name not in ("prompt", "prompt_token_ids")]
    if beside:
        raise PromptError(
            index, f"has {', '.join(map(repr, beside))} beside its {kind!r}, which FlexBatch does not have"
        )
    content, text = as_list(given[kind]), given.get("prompt")
    if kind == "prompt_token_ids" and (isinstance(content, str | bytes | Mapping) or not isinstance(content, Sequence)):
        raise PromptError(index, f"prompt_token_ids is a {type(content).__name__}; it is a list of token ids")
    if text is not None and not isinstance(text, str) and kind == "prompt_token_ids":
        raise PromptError(index, f"prompt is a {type(text).__name__} beside prompt_token_ids; it is their text")
    if isinstance(content, Mapping):
        raise PromptError(
            index,
            f"prompt is an object with {', '.join(map(repr, content))}; it is text, a list of token ids or chat "
            "messages",
        )
    return PlainPrompt(content, text if isinstance(text, str) else None)


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or several, as a list of prompts. Raises ConfigurationError for what is neither."""
    prompts = as_list(prompts)
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes | bytearray | set | frozenset) or not isinstance(prompts, Iterable):
        raise ConfigurationError(
            f"prompts is a {type(prompts).__name__}; {WANTED}, and prompts is one of these or a list of them"
        )
    parts = list(prompts)
    return [parts] if _is_one(parts) else parts


def _is_one(parts: list[Any]) -> bool:
    """Whether a list is one prompt: token ids, or chat messages, of which one may lack its role, but none is a
    prompt of its own."""
    if not parts:
        return False
    if all(isinstance(part, Mapping) for part in parts):
        return any("role" in part for part in parts) and not any(
            "prompt" in part or "prompt_token_ids" in part for part in parts
        )
    return all(isinstance(as_list(part), Integral) for part in parts)


class PromptEncoder:
    """Prompts to token ids, with the checks that need the model's sizes.

    `max_context`: tokens of prompt and output that the model can attend to. `vocab_size`: of the model, not of the
    tokenizer.
    """

    def __init__(self, tokenizer: Any, *, max_context: int, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self._max_context = max_context
        self._vocab_size = vocab_size
        self._chat = ChatTemplate(tokenizer)

    def encode(self, index: int, prompt: Prompt, max_tokens: int | None = 1) -> list[int]:
        """Token ids of prompt number `index`. With max_tokens=0 (scoring) it may be one token longer than the context,
        as its last token is predicted and never read; else it must leave room for one token.

        Raises PromptError: a type that is no prompt, an empty prompt, ids outside the vocabulary, a failing chat
        template, too many tokens.
        """
        content = plain_prompt(index, prompt).content
        if isinstance(content, str):
            token_ids = self._tokenize(index, content, special=True)
        elif not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
            raise PromptError(index, f"is a {type(content).__name__}; {WANTED}")
        elif content and all(isinstance(message, Mapping) for message in content):
            token_ids = self._tokenize(index, self._render(index, content), special=False)
        else:
            token_ids = self._checked_ids(index, content)
        if not token_ids:
            raise PromptError(index, "is empty: it has no token, and the tokenizer adds none")
        self._check_ids(index, token_ids)
        longest = self._max_context + (1 if max_tokens == 0 else -1)
        if len(token_ids) > longest:
            raise PromptError(
                index,
                f"has {len(token_ids)} tokens; the model's context of {self._max_context} allows {longest}. Shorten it",
            )
        return token_ids

    def context_left(self, token_ids: Sequence[int]) -> int:
        """Tokens that the context holds behind these."""
        return max(0, self._max_context - len(token_ids))

    def check_params(self, index: int, params: SamplingParams) -> None:
        """Raises PromptError where prompt number `index` asks for what this model does not have: tokens to bias or bar,
        or text to look for stop strings in."""
        for name, token in params.named_tokens():
            if not 0 <= token < self._vocab_size:
                raise PromptError(
                    index, f"{name} names token id {token}, outside the model's vocabulary of {self._vocab_size}"
                )
        if params.stop and self.tokenizer is None:
            raise PromptError(index, "has stop strings, but the model has no tokenizer; use stop_token_ids")

    def _tokenize(self, index: int, text: str, *, special: bool) -> list[int]:
        if self.tokenizer is None:
            raise PromptError(index, "is text, but the model has no tokenizer; give token ids")
        position = lone_surrogate(text)
        if position >= 0:
            half = text[position].encode("unicode_escape").decode()
            raise PromptError(
                index, f"holds half of a surrogate pair, {half}, at character {position}: no Unicode text"
            )
        # A long prompt gets its own error here, so the tokenizer's warning about its configured length would only be
        # noise.
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _render(self, index: int, messages: Sequence[Any]) -> str:
        """Chat messages as text by the tokenizer's own template."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise PromptError(index, "is a list of chat messages, but the tokenizer has no chat template; give text")
        try:
            return self._chat.render(messages)
        except ChatError as error:
            raise PromptError(index, str(error)) from None
        except Exception as error:  # templates raise what they like, e.g. for a role they do not know
            raise PromptError(index, f"the chat template failed: {error}") from error

    def _checked_ids(self, index: int, prompt: Sequence[Any]) -> list[int]:
        token_ids = []
        for position, token in enumerate(prompt):
            token = as_list(token)
            if isinstance(token, bool) or not hasattr(token, "__index__"):
                raise PromptError(
                    index, f"element {position} is {token!r}; a list is either of token ids or of chat messages"
                )
            token_ids.append(token.__index__())
        return token_ids

    def _check_ids(self, index: int, token_ids: Sequence[int]) -> None:
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            wrong = min(token_ids) if min(token_ids) < 0 else max(token_ids)
            raise PromptError(index, f"token id {wrong} is outside the model's vocabulary of {self._vocab_size}")
