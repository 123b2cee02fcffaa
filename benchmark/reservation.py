"""What it is worth to reserve cache for likely answers, at equal memory: learned reservation beside ``--reserve all``.

    python -m benchmark.reservation
    python -m benchmark.reservation --model llama-3-8b --gpu-memory 24GiB --cpu-memory 8GiB --requests 4000 --sudden 240

Two engines with the same budgets, each with a plan of its own, run the same jobs one after the other in this process:

- ``geometric``: answers of geometric length under a max_tokens that few of them reach. The engine that learns begins
  this job without having seen an answer.
- ``sudden``: every answer reaches max_tokens, after the short ones of the job before. The engine that reserves all
  has planned for exactly this.

How long an answer is, no engine knows: the token that a pass draws is replaced by a stop token where the answer is to
end, as if the model had drawn it. Both engines so generate the same number of tokens. Passes and processor time are
counted beside seconds: on a machine that others use as well, seconds say little.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmark.machine import publish_each
from benchmark.set_up import as_words, made_between
from flexbatch import LLM, SamplingParams
from flexbatch.execution.pass_batch import NOTHING_DECODED, DecodedTokens, PassBatch
from flexbatch.execution.sampler import SampledTokens
from flexbatch.loop import EngineLoop
from flexbatch.policy.stdout import run_process

RESERVES = ("all", "expected")
WARM_UP = 48
"""Prompts of the job before the others."""
ALIKE = 8
"""First tokens of a prompt, by which it is known."""

Prompt = list[int]


class EndingLoop(EngineLoop):
    """Ends answers where they are told to end, which nothing else in the engine knows."""

    stop_token = 0
    answers: Mapping[tuple[int, ...], int] = {}

    def begin(self, *arguments: Any, **options: Any) -> None:
        super().begin(*arguments, **options)
        assert self.scheduler is not None
        scheduler, commit = self.scheduler, self.scheduler.commit

        def token_of(id: int, token: int) -> int:
            # Where passes go ahead, those that this pass surely ends have left, and others ended with the pass before.
            sequences = scheduler.running if scheduler.advanced is None else scheduler.advanced
            if (sequence := sequences.get(id)) is None:
                return token
            return self.ended(token, sequence.request.prompt_token_ids, sequence.num_output_tokens)

        def ending(
            batch: PassBatch, sampled: Mapping[int, SampledTokens], decoded: DecodedTokens = NOTHING_DECODED
        ) -> None:
            drawn = {
                id: dataclasses.replace(result, token_ids=[token_of(id, token) for token in result.token_ids])
                for id, result in sampled.items()
            }
            tokens = [token_of(*each) for each in zip(decoded.sequence_ids, decoded.token_ids, strict=True)]
            commit(batch, drawn, DecodedTokens(decoded.sequence_ids, tokens))

        scheduler.commit = ending  # type: ignore[assignment, method-assign]

    def ended(self, token: int, prompt: Prompt, generated: int) -> int:
        """The token that was drawn, or the stop token where the answer ends and nowhere else."""
        answer = self.answers.get(tuple(prompt[:ALIKE]))
        if answer is None:
            return token
        return self.stop_token if generated + 1 == answer else token - (token == self.stop_token)


class EndingLLM(LLM):
    loop_class = EndingLoop

    @property
    def loop(self) -> EndingLoop:
        return cast("EndingLoop", self._loop)


def geometric(chance: random.Random, mean: float, most: int) -> int:
    return min(most, int(np.ceil(np.log(1 - chance.random()) / np.log(1 - 1 / mean))) or 1)


def run_job(llm: EndingLLM, prompts: Sequence[Prompt], answers: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """One job, and what it took."""
    loop, stop = llm.loop, llm.loop.stop_token
    loop.answers = {tuple(prompt[:ALIKE]): answer for prompt, answer in zip(prompts, answers, strict=True)}
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    # A plan for a whole job is made before its clock begins, those in the middle of it count.
    llm.prepare(list(prompts), params)
    before, replans = llm.report(), len(loop.replans)
    started, processor = time.perf_counter(), time.process_time()
    completions = llm.generate(list(prompts), params)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    report, block = llm.report(), llm.engine_plan
    lengths = [len(each.token_ids) for each in completions]
    if lengths != [min(answer, max_tokens) for answer in answers]:
        raise RuntimeError(f"{llm.config.reserve}: answers do not have the lengths that they were to have")
    in_passes = report["seconds"] - before["seconds"]
    return {
        "tokens": sum(lengths),
        "passes": report["passes"] - before["passes"],
        "seconds": seconds,
        "seconds_in_passes": in_passes,
        "set_up": made_between(before, report),
        "processor_seconds": processor,
        "tokens_per_second": sum(lengths) / seconds,
        "sequences_per_pass": sum(lengths) / (report["passes"] - before["passes"]),
        "preemptions": {name: value - before["preemptions"][name] for name, value in report["preemptions"].items()},
        "replans": [reason for reason in loop.replans[replans:] if "answers" in reason],
        "last_block": block.block_policy.block_size,
        "percent": block.policy.percent,
        "job": report.get("job", {}),
        "answers": [each.token_ids for each in completions],
    }


def warm_up(prompts: Sequence[Prompt], max_tokens: int) -> tuple[list[Prompt], list[SamplingParams]]:
    """A job that compiles what the measured ones need: contexts of all lengths, passes with and without prompts. The
    first job of an H200 compiled for 9.8 of its 70 s, and the second found it done. Nothing is learned of requests that
    only max_tokens ends."""
    limits = [max(1, max_tokens * (i + 1) // len(prompts)) for i in range(len(prompts))]
    return list(prompts), [SamplingParams(max_tokens=most, temperature=0, ignore_eos=True) for most in limits]


def compared(name: str, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Both runs of a job, and the ratios of the one that learns to the one that reserves all."""
    answers = [run.pop("answers") for run in runs.values()]
    reserved, learned = (runs[reserve] for reserve in RESERVES)
    ratios = {
        f"{what}_ratio": reserved[of] / learned[of]
        for what, of in (("throughput", "seconds"), ("pass", "passes"), ("processor", "processor_seconds"))
    }
    alike = sum(one == other for one, other in zip(*answers, strict=True)) / len(answers[0])
    found = {"job": name, **ratios, "answers_alike": alike, **runs}
    counts = ", ".join(
        f"{reserve}: {run['passes']} passes, {run['seconds']:.4g} s, {run['preemptions']['total']} preemptions, "
        f"{len(run['replans'])} re-plans, set-up: {as_words(run['set_up'])}"
        for reserve, run in runs.items()
    )
    words = ", ".join(f"{what.replace('_', ' ')} {ratio:.3g}" for what, ratio in ratios.items())
    print(f"{name}: {words}; {counts}", file=sys.stderr, flush=True)
    return found


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """After every job what is known by then."""
    chance = random.Random(args.seed)
    settings = {
        "dummy_weights": args.model != "demo",
        "gpu_memory": args.gpu_memory,
        "cpu_memory": args.cpu_memory,
        "weight_bits": args.weight_bits,
        **({"hardware": args.hardware} if args.hardware else {}),
        **({"dtype": args.dtype} if args.dtype else {}),
        **({"device": args.device} if args.device else {}),
    }
    jobs = {
        "geometric": [geometric(chance, args.mean, args.max_tokens) for _ in range(args.requests)],
        "sudden": [args.max_tokens + 1] * args.sudden,
    }
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        engines = {
            reserve: cast("EndingLLM", stack.enter_context(EndingLLM(args.model, reserve=reserve, **settings)))
            for reserve in RESERVES
        }
        for name, answers in jobs.items():
            runs, vocabulary = {}, engines["all"].arch.vocab_size
            prompts = [[chance.randrange(10, vocabulary - 2) for _ in range(args.prompt)] for _ in answers]
            for reserve, llm in engines.items():
                llm.loop.stop_token = vocabulary - 1
                if not found:
                    llm.generate(*warm_up([prompt[::-1] for prompt in prompts[:WARM_UP]], args.max_tokens))
                if answers:
                    runs[reserve] = run_job(llm, prompts, answers, args.max_tokens)
                    shown = {what: value for what, value in runs[reserve].items() if what not in ("answers", "job")}
                    print(f"{name}, {reserve}: {shown}", file=sys.stderr, flush=True)
            if runs:
                found.append(compared(name, runs))
                yield {"settings": vars(args), "jobs": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a public shape with random weights")
    parser.add_argument("--gpu-memory", default="48MiB", help="budget of each engine; both are in memory")
    parser.add_argument("--cpu-memory", default="64MiB")
    parser.add_argument("--weight-bits", type=int, default=16)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--hardware", help="profile that plans are made by (default: this machine, measured)")
    parser.add_argument("--requests", type=int, default=400, help="of the geometric job")
    parser.add_argument("--sudden", type=int, default=64, help="requests of the job whose answers are suddenly long")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of every prompt")
    parser.add_argument("--mean", type=float, default=120, help="tokens of an answer")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    return publish_each(lambda: measure(args), args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
