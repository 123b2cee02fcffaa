"""Prompts to token ids: text, token ids or chat messages, through the tokenizer that lies beside the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from typing import Any

from flexbatch.request import SamplingParams
from flexbatch.text.chat import ChatError, ChatOptions, ChatPrompt, ChatTemplate
from flexbatch.text.files import lone_surrogate
from flexbatch.text.grammars import Grammars
from flexbatch.validation.errors import ConfigurationError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any] | ChatPrompt
"""Text, token ids (taken as they are; an array will do), or chat messages with "role" and "content" (one alone will
do), with options as a `ChatPrompt`. Or vLLM's objects: ``{"prompt": text}``, ``{"prompt_token_ids": ids}``."""
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


@dataclass(frozen=True)
class Encoded:
    """A prompt as it is run. ``text``: where it is known; of chat messages, what the template makes of them. ``cut``:
    whether tokens of it were left out."""

    token_ids: list[int]
    text: str | None = None
    cut: bool = False


def cut(token_ids: list[int], limit: int, side: str, bos: int | None = None) -> list[int]:
    """At most ``limit`` tokens: those at the end where the left side is cut, behind ``bos`` if that stood first."""
    if len(token_ids) <= limit:
        return token_ids
    if side == "right":
        return token_ids[:limit]
    start = token_ids[:1] if token_ids[0] == bos and limit > 1 else []
    return start + token_ids[len(token_ids) - limit + len(start) :]


def as_list(value: Any) -> Any:
    """Arrays and tensors as lists; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def plain_prompt(index: int, prompt: Any) -> PlainPrompt:
    """Takes a prompt out of vLLM's objects, and one bare chat message into a list. Raises PromptError for an object
    that is neither."""
    prompt = as_list(prompt)
    if isinstance(prompt, str):
        return PlainPrompt(prompt, prompt)
    if isinstance(prompt, ChatPrompt):
        return PlainPrompt(prompt)
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
    if isinstance(prompts, str | Mapping | ChatPrompt):
        return [prompts]
    if isinstance(prompts, bytes | bytearray | set | frozenset) or not isinstance(prompts, Iterable):
        raise ConfigurationError(
            f"prompts is a {type(prompts).__name__}; {WANTED}, and prompts is one of these or a list of them"
        )
    parts = list(prompts)
    return [parts] if _is_one(parts) else parts


def with_chat_options(prompts: list[Any], options: ChatOptions) -> list[Any]:
    """Prompts of chat messages with options for their template; what has options keeps those. Raises PromptError for a
    prompt that no template writes."""
    chats = []
    for index, prompt in enumerate(prompts):
        content = prompt if isinstance(prompt, ChatPrompt) else plain_prompt(index, prompt).content
        if not isinstance(content, ChatPrompt) and not _is_chat(content):
            raise PromptError(index, f"is no list of chat messages, to which {', '.join(options.given())} could apply")
        chats.append(content if isinstance(content, ChatPrompt) else ChatPrompt(content, options))
    return chats


def _is_chat(content: Any) -> bool:
    return (
        isinstance(content, Sequence)
        and not isinstance(content, str | bytes | bytearray)
        and bool(content)
        and all(isinstance(message, Mapping) for message in content)
    )


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
    tokenizer. `truncate`: the side, left or right, at which a prompt that is too long is cut; None: it is an error.
    """

    def __init__(self, tokenizer: Any, *, max_context: int, vocab_size: int, truncate: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._max_context = max_context
        self._vocab_size = vocab_size
        self._truncate = truncate
        self._chat = ChatTemplate(tokenizer)
        self._spelled = lru_cache(1024)(self._spellings)
        self.grammars = Grammars(tokenizer, vocab_size)

    def encode(self, index: int, prompt: Prompt, max_tokens: int | None = 1) -> list[int]:
        """Token ids of prompt number `index`; see `read`."""
        return self.read(index, prompt, max_tokens).token_ids

    def read(self, index: int, prompt: Prompt, max_tokens: int | None = 1, last_tokens: int | None = None) -> Encoded:
        """Prompt number `index` as tokens. With max_tokens=0 (scoring) it may be one token longer than the context,
        as its last token is predicted and never read; else it must leave one position for a token. `last_tokens`: as
        `SamplingParams.truncate_prompt_tokens`.

        Raises PromptError: a type that is no prompt, an empty prompt, ids outside the vocabulary, a failing chat
        template, too many tokens.
        """
        found = self._encoded(index, prompt)
        token_ids, bos = found.token_ids, getattr(self.tokenizer, "bos_token_id", None)
        if not token_ids:
            raise PromptError(index, "is empty: it has no token, and the tokenizer adds none")
        self._check_ids(index, token_ids)
        # Without a limit of its own an answer gets one position, as behind a prompt that just fits.
        limit = max(self._max_context - (1 if max_tokens is None else max_tokens), 1)
        if last_tokens is not None:
            own = bos if found.text is not None else None
            token_ids = cut(token_ids, limit if last_tokens < 0 else last_tokens, "left", own)
        longest = self._max_context + (1 if max_tokens == 0 else -1)
        if self._truncate:
            token_ids = cut(token_ids, limit, self._truncate, bos)
        if len(token_ids) > longest:
            raise PromptError(
                index,
                f"has {len(token_ids)} tokens; the model's context of {self._max_context} allows {longest}. Shorten it",
            )
        return Encoded(token_ids, found.text, len(token_ids) < len(found.token_ids))

    def _encoded(self, index: int, prompt: Prompt) -> Encoded:
        plain = plain_prompt(index, prompt)
        content, options = plain.content, None
        if isinstance(content, ChatPrompt):
            content, options = as_list(content.messages), content.options
            if not _is_chat(content):
                raise PromptError(index, "has chat options, but is no list of chat messages")
        if isinstance(content, str):
            return Encoded(self._tokenize(index, content, special=True), plain.text)
        if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
            raise PromptError(index, f"is a {type(content).__name__}; {WANTED}")
        if _is_chat(content):
            text = self._render(index, content, options)
            return Encoded(self._tokenize(index, text, special=False), text)
        return Encoded(self._checked_ids(index, content), plain.text)

    def context_left(self, token_ids: Sequence[int]) -> int:
        """Tokens that the context holds behind these."""
        return max(0, self._max_context - len(token_ids))

    def check_params(self, index: int, params: SamplingParams) -> None:
        """Raises PromptError where prompt number `index` asks for what this model does not have: tokens to bias or bar,
        or text to look for stop strings and bad words in; or where the form of its answer does not compile."""
        for name, token in params.named_tokens():
            if not 0 <= token < self._vocab_size:
                raise PromptError(
                    index, f"{name} names token id {token}, outside the model's vocabulary of {self._vocab_size}"
                )
        if params.stop and self.tokenizer is None:
            raise PromptError(index, "has stop strings, but the model has no tokenizer; use stop_token_ids")
        if params.bad_words and self.tokenizer is None:
            raise PromptError(index, "has bad words, but the model has no tokenizer; use bad_words_ids")
        if params.structured_outputs is not None:
            try:
                self.grammars.compile(params.structured_outputs)
            except ConfigurationError as error:
                raise PromptError(index, str(error)) from None

    def with_tokens(self, index: int, params: SamplingParams) -> SamplingParams:
        """The parameters with the bad words among their `bad_words_ids`. Raises PromptError."""
        if not params.bad_words:
            return params
        return replace(
            params, bad_words_ids=(*params.bad_words_ids, *self._spelled(index, tuple(params.bad_words))), bad_words=()
        )

    def _spellings(self, index: int, words: tuple[str, ...]) -> list[tuple[int, ...]]:
        """Every bad word as it is written at the beginning of a text and after a space, as in vLLM."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            tokens = [tuple(self._tokenize(index, start + word.lstrip(), special=False)) for start in ("", " ")]
            if not word.strip() or not tokens[0]:
                raise PromptError(index, f"the bad word {word!r} has no token of its own; use bad_words_ids")
            found |= dict.fromkeys(tokens)
        return list(found)

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

    def _render(self, index: int, messages: Sequence[Any], options: ChatOptions | None) -> str:
        """Chat messages as text by the tokenizer's own template, or the one that the options name."""
        own = getattr(self.tokenizer, "chat_template", None) is not None
        if self.tokenizer is None or not (own or (options and options.chat_template)):
            raise PromptError(
                index,
                "is a list of chat messages, but the tokenizer has no chat template; give text, or a chat_template",
            )
        try:
            return self._chat.render(messages, options)
        except ChatError as error:
            raise PromptError(index, str(error)) from None
        except Exception as error:  # templates raise what they like, e.g. for a role they do not know
            raise PromptError(index, f"the chat template failed: {error}") from error

    def _checked_ids(self, index: int, prompt: Sequence[Any]) -> list[int]:
        if set(map(type, prompt)) == {int}:
            return list(prompt)  # at once: one by one, those of 1,000 short prompts take as long as two passes
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
