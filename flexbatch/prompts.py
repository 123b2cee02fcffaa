"""Prompts to token ids: text, token ids or chat messages, through the tokenizer that lies beside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexbatch.config import ConfigurationError
from flexbatch.request import SamplingParams

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids (taken as they are; an array will do), or chat messages with "role" and "content"."""


class PromptError(ConfigurationError):
    """A prompt cannot be run; the message names its index, counted from 0."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"prompt {index}: {problem}")
        self.index = index


class PromptEncoder:
    """Prompts to token ids, with the checks that need the model's sizes.

    `max_context`: tokens of prompt and output that the model can attend to. `vocab_size`: of the model, not of the tokenizer.
    """

    def __init__(self, tokenizer: Any, *, max_context: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context
        self._vocab_size = vocab_size

    def encode(self, index: int, prompt: Prompt, max_tokens: int | None = 1) -> tuple[int, ...]:
        """Token ids of prompt number `index`. With max_tokens=0 (scoring) it may be one token longer than the context, as its last token is
        predicted and never read; else it must leave room for one token.

        Raises PromptError: a type that is no prompt, an empty prompt, ids outside the vocabulary, a failing chat template, too many tokens.
        """
        if hasattr(prompt, "tolist"):
            prompt = prompt.tolist()
        if isinstance(prompt, str):
            token_ids = self._tokenize(index, prompt, special=True)
        elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise PromptError(index, f"is a {type(prompt).__name__}; a prompt is text, a list of token ids, or a list of chat messages")
        elif prompt and all(isinstance(message, Mapping) for message in prompt):
            token_ids = self._tokenize(index, self._render(index, prompt), special=False)
        else:
            token_ids = self._checked_ids(index, prompt)
        if not token_ids:
            raise PromptError(index, "is empty: it has no token, and the tokenizer adds none")
        self._check_ids(index, token_ids)
        longest = self._max_context + (1 if max_tokens == 0 else -1)
        if len(token_ids) > longest:
            raise PromptError(index, f"has {len(token_ids)} tokens; the model's context of {self._max_context} allows {longest}. Shorten it")
        return token_ids

    def room(self, token_ids: Sequence[int]) -> int:
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
        if params.stop and self._tokenizer is None:
            raise PromptError(index, "has stop strings, but the model has no tokenizer; use stop_token_ids")

    def _tokenize(self, index: int, text: str, *, special: bool) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise PromptError(index, "is text, but the model has no tokenizer; give token ids")
        # A long prompt gets its own error here, so the tokenizer's warning about its configured length would only be noise.
        return tuple(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _render(self, index: int, messages: Sequence[Any]) -> str:
        """Chat messages as text by the tokenizer's own template, which writes the BOS token itself. A last message of the assistant is continued."""
        for place, message in enumerate(messages):
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise PromptError(index, f'message {place} needs "role" (text) and "content", it has {sorted(map(str, message))}')
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise PromptError(index, "is a list of chat messages, but the tokenizer has no chat template; give text")
        continued = messages[-1]["role"] == "assistant"
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
            )
        except Exception as error:  # templates raise what they like, e.g. for a role they do not know
            raise PromptError(index, f"the chat template failed: {error}") from error

    def _checked_ids(self, index: int, prompt: Sequence[Any]) -> tuple[int, ...]:
        token_ids = []
        for place, token in enumerate(prompt):
            if isinstance(token, bool) or not hasattr(token, "__index__"):
                raise PromptError(index, f"element {place} is {token!r}; a list is either of token ids or of chat messages")
            token_ids.append(token.__index__())
        return tuple(token_ids)

    def _check_ids(self, index: int, token_ids: Sequence[int]) -> None:
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            wrong = min(token_ids) if min(token_ids) < 0 else max(token_ids)
            raise PromptError(index, f"token id {wrong} is outside the model's vocabulary of {self._vocab_size}")
