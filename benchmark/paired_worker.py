"""Jobs of one tree, for `benchmark.paired`: requests come as lines of JSON and are answered so.

It is run as text with the tree that it measures first on the path, and that may be an older one: nothing is imported
here but what every tree has had.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP_TOKENS = 8
"""Of each answer of a warm-up: kernels are compiled by then, and graphs recorded."""


class Worker:
    """One engine, and jobs of it."""

    def __init__(self, model: str, settings: dict[str, Any], gpu_bytes: int | None) -> None:
        """gpu_bytes: that the allocator may take, so that two processes share a GPU."""
        from flexbatch import LLM  # before torch, whose threads it has wait for less long

        import torch  # isort: skip

        if gpu_bytes is not None and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_bytes / total))
        self.llm = LLM(model, dummy_weights=True, **settings)

    def job(self, num_prompts: int, prompt_len: int, gen_len: int, seed: int) -> dict[str, Any]:
        """With what it takes until every prompt has a token, in a job of its own with other prompts: trees of all ages
        tell no pass from another."""
        found = self.timed(num_prompts, prompt_len, gen_len, seed)
        return {**found, "first_tokens": self.timed(num_prompts, prompt_len, 1, -1 - seed)}

    def timed(self, num_prompts: int, prompt_len: int, gen_len: int, seed: int) -> dict[str, Any]:
        from flexbatch import SamplingParams

        draw = random.Random(f"prompts {seed}")
        vocab_size = self.llm.arch.vocab_size
        prompts = [[draw.randrange(10, vocab_size) for _ in range(prompt_len)] for _ in range(num_prompts)]
        params = SamplingParams(max_tokens=gen_len, temperature=0, ignore_eos=True)
        self.llm.prepare(prompts, params)
        before, begun = self.llm.report(), time.perf_counter()
        completions = self.llm.generate(prompts, params)
        wall, after = time.perf_counter() - begun, self.llm.report()
        generated = sum(len(completion.token_ids) for completion in completions)
        assert generated == num_prompts * gen_len, f"{generated} tokens of {num_prompts} answers of {gen_len} each"
        passes, seconds = after["passes"] - before["passes"], after["seconds"] - before["seconds"]
        return {"wall_seconds": wall, "seconds": seconds, "passes": passes, "generated_tokens": generated}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        kind = request.pop("kind")
        if kind == "warm up":
            request["gen_len"] = min(request["gen_len"], WARM_UP_TOKENS)
        return self.job(**request)


def main() -> None:
    # What libraries print goes elsewhere; answers alone are read.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        request, begun = json.loads(line), time.perf_counter()
        try:
            if worker is None:
                worker = Worker(**request)
                import flexbatch

                found: dict[str, Any] = {"tree": str(Path(flexbatch.__file__).parent.parent)}
            else:
                found = worker.answer(request)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"took": time.perf_counter() - begun, **found}), file=answers, flush=True)
    if worker is not None:
        worker.llm.close()


if __name__ == "__main__":
    main()
