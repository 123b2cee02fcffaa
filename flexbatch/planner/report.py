"""What the runs of an engine measured, and how completions are put together from what the batcher hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flexbatch.execution.batcher import Batcher, Retired
from flexbatch.request import Completion


@dataclass
class Statistics:
    """Sums over the runs of an engine."""

    seconds: float = 0.0
    passes: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    requests: int = 0
    moved_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def generated_tokens_per_second(self) -> float:
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def total_tokens_per_second(self) -> float:
        return (self.prompt_tokens + self.generated_tokens) / self.seconds if self.seconds else 0.0

    def count(self, retired: Retired) -> None:
        self.requests += 1
        self.prompt_tokens += len(retired.state.request.prompt_token_ids)
        self.generated_tokens += len(retired.output.token_ids)

    def describe(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "passes": self.passes,
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "prefilled_tokens": self.prefilled_tokens,
            "generated_tokens": self.generated_tokens,
            "generated_tokens_per_second": self.generated_tokens_per_second,
            "total_tokens_per_second": self.total_tokens_per_second,
            "moved_bytes": self.moved_bytes,
        }


def against_baseline(fast: Statistics, plain: Statistics) -> dict[str, Any]:
    """Speculation against the plain runs of the same jobs in the same engine (--compare-plain); empty where there
    was none."""
    if not plain.generated_tokens:
        return {}
    return {
        "plain_seconds": plain.seconds,
        "plain_tokens_per_second": plain.generated_tokens_per_second,
        "plain_tokens": plain.generated_tokens,
        "plain_passes": plain.passes,
        "speed_up": fast.generated_tokens_per_second / plain.generated_tokens_per_second,
    }


def completion_of(retired: Retired) -> Completion:
    """Of a sequence that ended, or of a request that failed."""
    request, output, sequence = retired.state.request, retired.output, retired.sequence
    sample = f", sample {request.sample}" if request.params.n > 1 else ""
    error = f"prompt {request.index}{sample}: {retired.error}" if retired.error else ""
    completion = Completion(
        list(request.prompt_token_ids), prompt=request.prompt, index=request.index, error=error, finish_reason="error"
    )
    if sequence is None or output.finish is None or retired.error:
        return completion
    completion.token_ids, completion.text = list(output.token_ids), output.text
    completion.finish_reason, completion.stop_reason = output.finish.reason, output.finish.stop_reason
    if request.params.logprobs is not None:
        completion.logprobs = sequence.logprobs
    if request.params.prompt_logprobs is not None:
        unscored = min(request.params.prompt_logprobs_start, len(request.prompt_token_ids))
        completion.prompt_logprobs = [*[None] * unscored, *sequence.prompt_logprobs]
    return completion


def with_samples(completions: dict[int, Completion]) -> Completion:
    """The first of the n completions of a prompt, with all of them as its samples when there are several; they end in
    any order. One that failed comes before
    the first, so that nobody takes the rest for the whole."""
    first = next((completions[sample] for sample in sorted(completions) if completions[sample].error), completions[0])
    if len(completions) > 1:
        first.samples = [completions[sample] for sample in sorted(completions)]
    return first


def report_text(batcher: Batcher, on_tokens: Callable[[int, str], None]) -> None:
    """Hand on the new text of every prompt's first sample."""
    running = [(sequence.state.request, sequence.output) for batch in batcher.micro_batches for sequence in batch]
    for request, output in [*running, *((retired.state.request, retired.output) for retired in batcher.retired)]:
        if request.sample == 0 and (text := output.take()):
            on_tokens(request.index, text)
