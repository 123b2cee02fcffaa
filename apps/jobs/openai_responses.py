"""The responses to OpenAI batch files: one JSON line each, with ``id``, ``custom_id``, ``response`` and ``error``.

Log-probabilities show for each token its bytes, which join to the text, its name, and its offset in the text.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.openai_requests import CHAT, Call
from flexbatch.apps.jobs.results import RowRecord, failure_text
from flexbatch.apps.jobs.rows import RowRequest
from flexbatch.request import Completion, TokenLogprob
from flexbatch.text.decoder import TextDecoder
from flexbatch.text.files import split_lines
from flexbatch.validation.errors import reason

CONTEXT = 256
"""Number of tokens before a token that can decide how it is written, special ones among them."""


def byte_of_letter() -> dict[str, int]:
    """Returns the letters by which byte-level BPE spells bytes (Radford et al. 2019): printable ones stand for
    themselves, the others for letters above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


@dataclass(frozen=True)
class ShownToken:
    """A token with its log-probability, its name, and its bytes in the text."""

    name: str
    text_bytes: bytes
    entry: TokenLogprob

    @property
    def logprob(self) -> float:
        """The log-probability as JSON can hold it, which has no infinity: -9999 for a token that cannot come, as
        with OpenAI and vLLM."""
        return max(self.entry.logprob, -9999.0)

    def as_dict(self) -> dict[str, Any]:
        return {"token": self.name, "logprob": self.logprob, "bytes": list(self.text_bytes)}


@dataclass(frozen=True)
class Step:
    """One token of an output, or of a prompt: the character of the text where it begins, the token itself, and all
    tokens whose log-probability is known there, itself first."""

    offset: int
    chosen: ShownToken
    known: Sequence[ShownToken]


def chat_logprobs(step: Step, count: int) -> dict[str, Any]:
    """Returns the token and the ``count`` most likely ones (-1: all), whether it is among them or not."""
    ranked = sorted(step.known, key=lambda shown: (-shown.entry.logprob, shown.entry.rank))
    best = ranked if count < 0 else ranked[:count]
    return {**step.chosen.as_dict(), "top_logprobs": [shown.as_dict() for shown in best]}


def legacy_logprobs(steps: Sequence[Step]) -> dict[str, Any]:
    """Returns the form of completions. Nothing is known of the first token of a prompt."""
    return {
        "tokens": [step.chosen.name for step in steps],
        "token_logprobs": [step.chosen.logprob if step.known else None for step in steps],
        "top_logprobs": [{shown.name: shown.logprob for shown in step.known} if step.known else None for step in steps],
        "text_offset": [step.offset for step in steps],
    }


class TokenTexts:
    """Bytes and names of tokens, as their tokenizer gives them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoder = TextDecoder(tokenizer)
        self._byte_level = "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self._letters = byte_of_letter()

    def alternatives(self, before: Sequence[int], token_ids: Sequence[int]) -> list[bytes]:
        """Returns the bytes that each of the tokens would add to a text of the tokens ``before``; none for special
        tokens. They may be a part of a character."""
        spelled = {token_id: self._spelled(token_id) for token_id in token_ids}
        spaces = [token_id for token_id in spelled if self._decoder.byte_pieces.get(token_id) == ord(" ")]
        if spaces and not self._decoder.decode(before[-CONTEXT:]):
            # Decoders with byte fallback strip the space that a text begins with.
            spelled |= dict.fromkeys(spaces)
        open_ids = [token_id for token_id, found in spelled.items() if found is None]
        texts = self._decoder.alternatives(before[-CONTEXT:], open_ids) if open_ids else []
        spelled.update((token_id, text.encode()) for token_id, text in zip(open_ids, texts, strict=True))
        return [spelled[token_id] or b"" for token_id in token_ids]

    def steps(self, sample: Completion) -> list[Step]:
        """Returns the tokens of an output that has log-probabilities, each with its alternatives, as they are shown."""
        known = [*sample.prompt_token_ids, *sample.token_ids]
        return self._steps(known, len(sample.prompt_token_ids), sample.logprobs or [], sample.text)

    def prompt_steps(self, sample: Completion, text: str) -> list[Step]:
        """Returns the same of the prompt, whose text this is."""
        return self._steps(sample.prompt_token_ids, 0, sample.prompt_logprobs or [], text)

    def _steps(
        self, known: Sequence[int], start: int, positions: Sequence[dict[int, TokenLogprob] | None], text: str
    ) -> list[Step]:
        """positions: log-probabilities of the tokens from number ``start`` on, whose text this is."""
        shown, pieces = [], []
        for index, entries in enumerate(positions, start):
            scored = entries or {known[index]: TokenLogprob(known[index], 0.0, 1)}
            token_ids = list(scored)  # the chosen one first
            found = self.alternatives(known[max(0, index - CONTEXT) : index], token_ids)
            names = self.names(token_ids, found)
            tokens = [ShownToken(*each) for each in zip(names, found, scored.values(), strict=True)]
            shown.append((tokens[0], tokens if entries else []))
            pieces.append(found[0])
        return [
            Step(offset, dataclasses.replace(chosen, text_bytes=kept), tokens)
            for (offset, kept), (chosen, tokens) in zip(offsets_in(text, pieces), shown, strict=True)
        ]

    def text_of(self, prompt: Any) -> str:
        """Returns a prompt of text as it is, one of token ids as it is decoded."""
        return prompt if isinstance(prompt, str) else self._decoder.decode(prompt)

    def _spelled(self, token_id: int) -> bytes | None:
        """Returns the bytes of a token that is the same in every context; None for others."""
        if self._decoder.hides(token_id):
            return b""
        if token_id in self._decoder.byte_pieces:
            return bytes([self._decoder.byte_pieces[token_id]])
        if not self._byte_level:
            return None
        letters = self._tokenizer.convert_ids_to_tokens(token_id)
        if any(letter not in self._letters for letter in letters) or self._decoder.is_added(token_id):
            return letters.encode()
        return bytes(self._letters[letter] for letter in letters)

    def names(self, token_ids: Sequence[int], pieces: Sequence[bytes]) -> list[str]:
        """Returns names for tokens with these bytes: their text, ``bytes:\\xe6`` for a part of a character, the
        token's own name where it has no text. No two are equal: ``token_id:7`` where a name is taken."""
        names: list[str] = []
        for token_id, piece in zip(token_ids, pieces, strict=True):
            name = self._name(token_id, piece)
            names.append(f"token_id:{token_id}" if name in names else name)
        return names

    def _name(self, token_id: int, piece: bytes) -> str:
        if not piece and self._decoder.is_special(token_id):
            return str(self._tokenizer.convert_ids_to_tokens(token_id))
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def offsets_in(text: str, pieces: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """Returns, for the bytes of every token, the character of the text where they begin, at most its end, and those of
    them that are in the text.

    A stop string cuts the text, so that tokens before the end of the output may lie past the end of the text, whole
    or in part.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets: list[tuple[int, bytes]] = []
    decoded = 0
    for piece in pieces:
        kept, offset = 0, decoded
        while kept < len(piece) and decoded < len(text):
            decoded += len(decoder.decode(piece[kept : kept + 1]))
            kept += 1
        offsets.append((min(offset, len(text)), piece[:kept]))
    return offsets


class OpenAIOutput:
    """JSON-lines parts of a batch file. ``identity``, a digest of the job, makes the ids of its responses."""

    suffix = ".jsonl"

    def __init__(self, identity: str) -> None:
        self._identity = identity
        self._created = 0
        self._texts: Any = None  # TokenTexts from `start` on

    def start(self, created: int, tokenizer: Any) -> None:
        self._created, self._texts = created, TokenTexts(tokenizer)

    def record(self, row: RowRequest, completions: Sequence[Completion]) -> RowRecord:
        failed = [(number, each) for number, each in enumerate(completions) if each.finish_reason == "error"]
        if failed:
            number, completion = failed[0]
            name = f"prompt {number}: " if row.prompts > 1 else ""
            return self.failure(row, f"{name}{completion.bare_error}")
        call: Call = row.extra
        answers = [
            (request, sample)
            for request, completion in zip(row.requests, completions, strict=True)
            for sample in completion.samples or [completion]
        ]
        used = sum(len(completion.prompt_token_ids) for completion in completions)
        made = sum(len(sample.token_ids) for _, sample in answers)
        chat = call.url == CHAT
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._identity}-{row.index}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self._created,
            "model": call.model,
            "choices": [
                self._choice(index, sample, call, request.prompt) for index, (request, sample) in enumerate(answers)
            ],
            "usage": {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made},
        }
        response = {"status_code": 200, "request_id": f"req-{self._identity}-{row.index}", "body": body}
        return {
            "id": f"batch_req_{self._identity}-{row.index}",
            "custom_id": call.custom_id,
            "response": response,
            "error": None,
        }

    def _choice(self, index: int, sample: Completion, call: Call, prompt: Any) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": sample.finish_reason}
        steps = None if sample.logprobs is None else self._texts.steps(sample)
        if call.url != CHAT:
            before = self._texts.text_of(prompt) if call.echo else ""
            if steps is not None and call.echo:
                moved = [dataclasses.replace(step, offset=step.offset + len(before)) for step in steps]
                steps = [*self._texts.prompt_steps(sample, before), *moved]
            shown = None if steps is None else legacy_logprobs(steps)
            return {**choice, "text": before + sample.text, "logprobs": shown}
        content = None if steps is None else {"content": [chat_logprobs(step, call.logprobs or 0) for step in steps]}
        return {**choice, "message": {"role": "assistant", "content": sample.text}, "logprobs": content}

    def failure(self, row: RowRequest, message: str) -> RowRecord:
        call: Call = row.extra
        return {
            "id": f"batch_req_{self._identity}-{row.index}",
            "custom_id": call.custom_id,
            "response": None,
            "error": {"code": call.error_code, "message": failure_text(message)},
        }

    def error_of(self, record: RowRecord) -> str:
        return record["error"]["message"] if record["error"] else ""

    def is_truncated(self, record: RowRecord, tokens: int) -> bool:
        choices = record["response"]["body"]["choices"] if record["response"] else []
        cut = any(choice["finish_reason"] == "length" for choice in choices)
        return cut and self.tokens_of(record)[1] < tokens * len(choices)

    def tokens_of(self, record: RowRecord) -> tuple[int, int]:
        usage = (
            record["response"]["body"]["usage"] if record["response"] else {"prompt_tokens": 0, "completion_tokens": 0}
        )
        return usage["prompt_tokens"], usage["completion_tokens"]

    def write(self, path: Path, table: pa.Table, records: Sequence[RowRecord]) -> None:
        with path.open("wb") as file:
            for record in records:
                try:
                    line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
                except UnicodeEncodeError:  # half of a surrogate pair, which no text can hold as it is, is escaped
                    line = json.dumps(record, separators=(",", ":")).encode()
                file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def errors(self, path: Path) -> list[str]:
        return [error for record in self._records(path) if (error := self.error_of(record))]

    def _records(self, path: Path) -> list[RowRecord]:
        try:
            return [json.loads(line) for line in split_lines(path.read_bytes().decode())]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {reason(error)}") from error

    def read(self, path: Path, rows: int) -> list[RowRecord]:
        records = self._records(path)
        if len(records) != rows:
            raise ValueError(f"{path} holds {len(records)} lines, this job's part has {rows}")
        return records
