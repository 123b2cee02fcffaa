"""A deterministic engine in the place of `LLM`: tokens are a hash of the prompt, sequences finish out of order,
generated tokens are counted."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from flexbatch.request import Completion, SamplingParams, TokenLogprob

BOS, FIRST_BYTE = 1, 3


class FakeTokenizer:
    """Bytes as tokens behind a BOS token."""

    bos_token_id = BOS
    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [BOS] * add_special_tokens + [byte + FIRST_BYTE for byte in text.encode()]}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token - FIRST_BYTE for token in ids if token >= FIRST_BYTE).decode(errors="replace")

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def fake_tokens(prompt: list[int], params: SamplingParams) -> list[int]:
    """Between a half and all of max_tokens, lower-case letters; of prompt and seed alone."""
    digest = hashlib.sha256(repr((list(prompt), params.seed, float(params.temperature))).encode()).digest()
    length = params.max_tokens - digest[0] % (params.max_tokens // 2 + 1)
    return [FIRST_BYTE + 97 + digest[i % 32] % 26 for i in range(length)]


@dataclass
class FakeLLM:
    """``block`` sequences at one time, one token each per step of ``step_s`` seconds; fails with RuntimeError after
    ``fail_after`` steps."""

    block: int = 16
    step_s: float = 0.0
    max_positions: int = 512
    count_file: str | None = None
    fail_after: int | None = None
    load_s: float = 0.0
    prompts_seen: int = 0

    def __post_init__(self) -> None:
        time.sleep(self.load_s)
        self.tokenizer = FakeTokenizer()
        self.arch = SimpleNamespace(context=self.max_positions, vocab_size=FIRST_BYTE + 256)
        self._count = os.open(self.count_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if self.count_file else -1

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._count >= 0:
            os.close(self._count)

    def drain(self) -> int:
        """Nothing waits here: items are drawn when a sequence can begin."""
        return self.block

    def stream(self, items: Iterable[tuple[Any, ...]], on_tokens: Any = None) -> Iterator[tuple[Any, Completion]]:
        source, flying, steps = iter(items), {}, 0
        more = True
        while more or flying:
            while more and len(flying) < self.block:
                item = next(source, None)
                if item is None:
                    more = False
                    break
                key, prompt, params, *_ = item
                self.prompts_seen += 1
                flying[key] = [prompt, params, fake_tokens(prompt, params), 0]
            time.sleep(self.step_s)
            steps += 1
            if self.fail_after is not None and steps > self.fail_after:
                raise RuntimeError("the fake device is lost")
            if self._count >= 0:
                os.write(self._count, b"." * len(flying))
            for key in sorted(flying, key=lambda key: (key * 7) % 13):
                prompt, params, tokens, done = flying[key]
                flying[key][3] = done + 1
                if done + 1 >= len(tokens):
                    del flying[key]
                    yield key, self._completion(prompt, params, tokens)

    def _completion(self, prompt: list[int], params: SamplingParams, tokens: list[int]) -> Completion:
        reason = "length" if len(tokens) == params.max_tokens else "stop"
        logprobs = None
        if params.logprobs is not None:
            logprobs = [
                {token: TokenLogprob(token, -0.5, 1), **({2: TokenLogprob(2, -1.5, 2)} if params.logprobs else {})}
                for token in tokens
            ]
        return Completion(list(prompt), list(tokens), self.tokenizer.decode(tokens), reason, logprobs=logprobs)
