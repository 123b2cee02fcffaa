"""A run as its user sees it: completions as they finish, how far it is, Ctrl-C, and the tables at its end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO

from flexbatch.cli.answers import prompt_lines, token_lines
from flexbatch.cli.colors import with_title
from flexbatch.cli.interrupt import Interrupts, drained
from flexbatch.cli.progress import JobMeter, Progress
from flexbatch.cli.run_work import Work
from flexbatch.engine import LLM
from flexbatch.planner.report import Report
from flexbatch.request import Completion

logger = logging.getLogger("flexbatch")


class Printed:
    """Completions on stdout, in the order of the prompts and as they finish."""

    def __init__(self, work: Work, data: TextIO) -> None:
        self._work, self._data = work, data
        self._waiting: dict[int, Completion] = {}
        self._next = 0

    def add(self, index: int, completion: Completion) -> None:
        self._waiting[index] = completion
        while self._next in self._waiting:
            completion = self._waiting.pop(self._next)
            samples = completion.samples or [completion]
            for number, sample in enumerate(samples, 1):
                name = f"prompt {self._next}" + (f", answer {number} of {len(samples)}" if len(samples) > 1 else "")
                print_completion(name, self._work.rows[self._next].prompt, sample, self._data)
            self._next += 1
        self._data.flush()


def complete(
    llm: LLM, work: Work, first: int, on_prompt: Callable[[int, Completion], None], resume: str | None
) -> bool:
    """Completes all prompts from number ``first`` on; returns whether all are done. After the first Ctrl-C it is those
    of which a sequence was in flight; the second raises KeyboardInterrupt."""
    lengths = work.lengths(first)
    meter = JobMeter(len(lengths), lengths)
    meter.watch(llm)
    read, wrote = sum(prompt for prompt, _ in lengths), sum(most for _, most in lengths)
    logger.info(
        "running %s completions of %s prompt tokens, %s new tokens at most",
        f"{len(lengths):,}",
        f"{read:,}",
        f"{wrote:,}",
    )
    interrupts = Interrupts()
    interrupts.on_drain = lambda: drained(llm, meter, resume)
    with interrupts.installed(), Progress(len(lengths), meter) as progress:
        try:
            llm.generate(
                work.token_ids[first:],
                work.params,
                on_finished=progress.finished,
                on_prompt=on_prompt,
                first_index=first,
            )
        except KeyboardInterrupt:
            if interrupts.stopping or not interrupts.draining.is_set():
                raise
            return False
    return True


def print_report(report: Report) -> None:
    """Its tables, on stderr."""
    for text in str(report).split("\n\n"):
        print(f"\n{with_title(text, sys.stderr)}", file=sys.stderr)


def print_completion(name: str, prompt: Any, completion: Completion, data: TextIO) -> None:
    """The prompt and its continuation, as text where the model has a tokenizer, and log-probabilities where they were
    asked for. Of one that failed, the log says why."""
    print(f"----- {name}: {len(completion.token_ids)} tokens, {completion.finish_reason} -----", file=data)
    if isinstance(prompt, str):
        print(prompt + completion.text, file=data)
    else:
        print(completion.text or " ".join(map(str, completion.token_ids)), file=data)
    for table in (prompt_lines(completion), token_lines(completion)):
        if table:
            print(table.lstrip("\n"), file=data)
