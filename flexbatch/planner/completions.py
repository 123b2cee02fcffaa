"""What a sequence that ended gives its caller."""

from __future__ import annotations

from collections.abc import Mapping

from flexbatch.execution import sequence as execution
from flexbatch.planner.report import described_failure
from flexbatch.request import Completion, TokenLogprob
from flexbatch.text.decoder import TextDecoder


def completion_of(sequence: execution.Sequence, decoder: TextDecoder | None = None) -> Completion:
    """The completion of a sequence that ended, or of a request that failed. ``decoder`` names the tokens that have
    log-probabilities."""
    request, output = sequence.request, sequence.output
    completion = Completion(
        list(request.prompt_token_ids),
        prompt=request.prompt,
        index=request.index,
        error=described_failure(sequence),
        finish_reason="error",
    )
    if output.finish is None or sequence.error:
        return completion
    completion.token_ids, completion.text = output.token_ids, output.text
    completion.finish_reason, completion.stop_reason = output.finish.reason, output.finish.stop_reason
    if request.params.logprobs is not None:
        completion.logprobs = [_named(entries, decoder) for entries in sequence.logprobs]
    if request.params.prompt_logprobs is not None:
        unscored = min(request.params.prompt_logprobs_start, len(request.prompt_token_ids))
        scored = (entries and _named(entries, decoder) for entries in sequence.prompt_logprobs)
        completion.prompt_logprobs = [*[None] * unscored, *scored]
    return completion


def _named(entries: dict[int, TokenLogprob], decoder: TextDecoder | None) -> dict[int, TokenLogprob]:
    if decoder is None:
        return entries
    return {
        token_id: TokenLogprob(token_id, entry.logprob, entry.rank, decoder.alone(token_id))
        for token_id, entry in entries.items()
    }


def with_samples(completions: Mapping[int, Completion]) -> Completion:
    """The first of the n completions of a prompt, with all of them as its samples when there are several; they end in
    any order. One that failed comes before the first, so that nobody takes the rest for the whole."""
    first = next((completions[sample] for sample in sorted(completions) if completions[sample].error), completions[0])
    if len(completions) > 1:
        first.samples = [completions[sample] for sample in sorted(completions)]
    return first
