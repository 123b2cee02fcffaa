"""What each pass of a run took, and how it was launched."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from flexbatch.execution.executor import Executor
from flexbatch.execution.graphs import DecodeGraphs
from flexbatch.execution.passes import Passes
from flexbatch.execution.piece_graphs import PieceGraphs

ONE_GRAPH, PIECES, SINGLE = "decode in one graph", "graphs between attentions", "kernel by kernel"
REPLAYS: tuple[tuple[Any, str], ...] = (DecodeGraphs, ONE_GRAPH), (PieceGraphs, PIECES)


@dataclass
class PassTime:
    """``seconds`` of the turn that read its tokens: while a pass runs, the one before has been read."""

    launched: str = SINGLE
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0


class PassTimes:
    """The passes of all engines within a ``with``, in their order."""

    def __init__(self) -> None:
        self.passes: list[PassTime] = []
        self.in_flight: deque[PassTime] = deque()

    def __enter__(self) -> PassTimes:
        begin, turn = Executor.begin_pass, Passes.turn

        def begun(executor: Executor, *args: Any) -> Any:
            self.in_flight.append(PassTime())
            return begin(executor, *args)

        def turned(passes: Passes) -> Any:
            started = time.perf_counter()
            batch = turn(passes)
            if batch is not None:
                done = self.in_flight.popleft()
                done.seconds = time.perf_counter() - started
                done.tokens = batch.num_decoding + sum(query.num_tokens for query in batch.others)
                done.prompt_tokens = batch.num_prompt_tokens
                self.passes.append(done)
            return batch

        timed: list[tuple[Any, str, Any]] = [(Executor, "begin_pass", begun), (Passes, "turn", turned)]
        timed += [(owner, "run", self.noting(owner.run, name)) for owner, name in REPLAYS]
        self.originals = [(owner, name, getattr(owner, name)) for owner, name, _ in timed]
        for function in timed:
            setattr(*function)
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, original in self.originals:
            setattr(owner, name, original)

    def noting(self, run: Any, name: str) -> Any:
        """The same, which says of the newest pass that it was launched so."""

        def noted(*args: Any) -> Any:
            result = run(*args)
            if result is not None:
                self.in_flight[-1].launched = name
            return result

        return noted

    def report(self) -> dict[str, dict[str, float]]:
        """By how they were launched, those with prompts apart."""
        kinds: dict[str, list[PassTime]] = {}
        for each in self.passes:
            kinds.setdefault(each.launched + (", with prompts" if each.prompt_tokens else ""), []).append(each)
        return {
            kind: {
                "passes": len(found),
                "seconds": round(sum(each.seconds for each in found), 3),
                "mean_pass_ms": round(1e3 * sum(each.seconds for each in found) / len(found), 2),
                "mean_tokens": round(sum(each.tokens for each in found) / len(found), 1),
            }
            for kind, found in kinds.items()
        }

    def with_prompts(self, most: int) -> tuple[int, int]:
        """The first of some passes with prompts in the middle of those that follow each other from the start, and how
        many, ``most`` at most and half of them. (0, 0) where there are too few."""
        reading = next((i for i, each in enumerate(self.passes) if not each.prompt_tokens), len(self.passes))
        count = min(most, reading // 2)
        return ((reading - count) // 2, count) if count else (0, 0)
