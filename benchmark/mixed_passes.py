"""What passes in pieces are worth: a job on the GPU whole in which prompts come while others are decoded, with passes
of so many tokens at most in pieces, by turns in one engine.

    python -m benchmark.mixed_passes --model llama-3-8b --prompts 1500 --block 500
    python -m benchmark.mixed_passes --model qwen3-0.6b --lengths 20 60 --piece-tokens 0 1024

Ragged prompts, answers of geometric length under a max_tokens that few of them reach (`benchmark.reservation` tells how
they end): sequences end with every pass, and others come. A first run records; then the job runs once for each of
``--piece-tokens``, of which 0 is none, and the results say in how many passes it ran so, which tokens a pass had, and
where the host's time went. Every run has prompts of its own, of the same lengths: those of a run before would be found
in the prefix cache.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmark.gpu_busy import PARTS, Window
from benchmark.machine import publish
from benchmark.part_times import PartTimes
from benchmark.reservation import EndingLLM, Prompt, geometric, run_job
from flexbatch.execution.inputs import MicroBatchInputs
from flexbatch.execution.piece_graphs import PieceGraphs, Pieces
from flexbatch.policy.stdout import run_process

STEP = 256
"""Tokens of a pass, in the counts of passes."""


class Pieced:
    """Limits passes in pieces while a job runs, and counts them."""

    def __init__(self, most: int) -> None:
        self.most, self.passes, self.in_pieces, self.recordings, self.seconds = most, 0, 0, 0, 0.0
        self.tokens: Counter[int] = Counter()
        self.run: Callable[..., Tensor | None] = PieceGraphs.run
        self.capture: Callable[..., Pieces] = PieceGraphs.capture

    def __enter__(self) -> Pieced:
        def run(pieces: PieceGraphs, inputs: MicroBatchInputs) -> Tensor | None:
            self.passes += 1
            self.tokens[inputs.num_tokens // STEP * STEP] += 1
            found = self.run(pieces, inputs) if inputs.num_tokens <= self.most else None
            self.in_pieces += found is not None
            return found

        def capture(pieces: PieceGraphs, bucket: int, inputs: MicroBatchInputs) -> Pieces:
            begun = time.perf_counter()
            try:
                return self.capture(pieces, bucket, inputs)
            finally:
                self.recordings, self.seconds = self.recordings + 1, self.seconds + time.perf_counter() - begun

        PieceGraphs.run, PieceGraphs.capture = run, capture  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        PieceGraphs.run, PieceGraphs.capture = self.run, self.capture  # type: ignore[method-assign]

    def report(self) -> dict[str, Any]:
        return {
            "piece_tokens": self.most,
            "not_one_graph": self.passes,
            "in_pieces": self.in_pieces,
            "recorded_buckets": self.recordings,
            "recording_seconds": round(self.seconds, 3),
            "passes_by_tokens": {tokens: self.tokens[tokens] for tokens in sorted(self.tokens)},
        }


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in ("gpu_memory", "cpu_memory", "hardware", "device")}
    placed = {"percent": (100, 0, 100, 0, 100, 0), "gpu_batch_size": args.block, "num_gpu_batches": 1}
    bits = {"weight_bits": args.weight_bits, "cache_bits": args.cache_bits}
    named = {name: value for name, value in given.items() if value}
    return {**placed, **bits, **named, "piece_tokens": max(args.piece_tokens), "dummy_weights": args.model != "demo"}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    chance, runs = random.Random(args.seed), list[dict[str, Any]]()
    answers = [geometric(chance, args.mean, args.max_tokens) for _ in range(args.prompts)]
    begun = time.perf_counter()
    with cast("EndingLLM", EndingLLM(args.model, **settings_of(args))) as llm:
        loaded, vocabulary = time.perf_counter() - begun, llm.arch.vocab_size
        llm.loop.stop_token = vocabulary - 1
        lengths = [chance.randint(*args.lengths) for _ in answers]
        for most in [max(args.piece_tokens), *args.piece_tokens]:
            prompts: list[Prompt] = [[chance.randrange(10, vocabulary - 2) for _ in range(size)] for size in lengths]
            with Pieced(most) as pieced, PartTimes(PARTS) as host:
                window = Window(args.profile_from, 20)
                if torch.cuda.is_available() and not runs:
                    with window:
                        found = run_job(llm, prompts, answers, args.max_tokens)
                else:
                    found = run_job(llm, prompts, answers, args.max_tokens)
            del found["answers"]
            runs.append({**pieced.report(), "host": host.per_turn(), **found})
            if torch.cuda.is_available() and len(runs) == 1:
                runs[-1]["profiled"] = window.report()
            rate = found["tokens_per_second"]
            print(f"{pieced.report()}: {rate:.0f} tok/s, {found['passes']} passes", file=sys.stderr, flush=True)
        memory = [row for row in llm.report()["memory"] if row["tier"] == "gpu"]
    return {"settings": vars(args), "load_seconds": loaded, "gpu_memory_rows": memory, "runs": runs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a public shape with random weights")
    parser.add_argument("--prompts", type=int, default=1500)
    parser.add_argument("--block", type=int, default=500, help="sequences in flight, at most")
    parser.add_argument("--lengths", type=int, nargs=2, default=(20, 400), help="tokens of a prompt, least and most")
    parser.add_argument("--mean", type=float, default=120, help="tokens of an answer")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--piece-tokens", type=int, nargs="+", default=(2048, 0), help="of the runs, in turn")
    parser.add_argument("--profile-from", type=int, default=200, help="first of 20 passes of the first run profiled")
    parser.add_argument("--weight-bits", type=int, default=16, choices=(16, 8, 4))
    parser.add_argument("--cache-bits", type=int, default=16, choices=(16, 8, 4))
    parser.add_argument("--gpu-memory")
    parser.add_argument("--cpu-memory")
    parser.add_argument("--hardware", help="profile that plans are made by (default: this machine, measured)")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    return publish(lambda: measure(args), args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
