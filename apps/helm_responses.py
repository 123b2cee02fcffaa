"""Converts completions to HELM's results: what its cache keeps of one, and what HELM gets of it or of an error.

Behavior follows ``helm.clients.huggingface_client`` of crfm-helm 0.5.16.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from helm.common.request import ErrorFlags, GeneratedOutput, Request, RequestResult, Token

from flexbatch.request import Completion


def failure(error: str, *, fatal: bool = False) -> RequestResult:
    """Returns a failed result with both flags set: HELM retries for 150 s when ``is_retriable`` is unset, and drops
    the run when ``is_fatal`` is unset."""
    flags = ErrorFlags(is_retriable=False, is_fatal=fatal)
    return RequestResult(success=False, cached=False, completions=[], embedding=[], error=error, error_flags=flags)


def sample_of(
    tokenizer: Any, sample: Completion, request: Request, end_ids: Collection[int], zero_logprobs: bool
) -> dict[str, Any]:
    """Returns one completion as the cache keeps it: text, token texts, log-probabilities and the finish reason.

    ``end_ids`` are the tokens that end a text and are no part of it. With ``zero_logprobs`` every token has
    log-probability 0.
    """
    ids, reason = list(sample.token_ids), "length"
    if sample.finish_reason == "stop":
        reason = "endoftext" if sample.stop_reason is None else "stop"
    if ids and ids[-1] in end_ids:
        ids = ids[:-1]
    text = tokenizer.decode(ids)
    kept = len(ids)
    cuts = [text.index(stop) for stop in request.stop_sequences if stop and stop in text]
    if cuts:
        text = text[: min(cuts)]
        kept = next(count for count in range(len(ids) + 1) if len(tokenizer.decode(ids[:count])) >= len(text))
    rows = sample.logprobs or []
    logprobs = [0.0 if zero_logprobs else rows[index][token].logprob for index, token in enumerate(ids[:kept])]
    return {
        "text": text,
        "tokens": [tokenizer.decode([i]) for i in ids[:kept]],
        "logprobs": logprobs,
        "finish_reason": reason,
    }


def result_of(response: dict[str, Any], *, cached: bool) -> RequestResult:
    """Returns HELM's result for a response that the cache keeps."""
    completions = [
        GeneratedOutput(
            text=answer["text"],
            logprob=sum(answer["logprobs"]),
            tokens=[
                Token(text=text, logprob=logprob)
                for text, logprob in zip(answer["tokens"], answer["logprobs"], strict=True)
            ],
            finish_reason={"reason": answer["finish_reason"]},
        )
        for answer in response["completions"]
    ]
    timing = {name: response[name] for name in ("request_time", "request_datetime", "batch_size", "batch_request_time")}
    return RequestResult(success=True, cached=cached, completions=completions, embedding=[], **timing)
