"""Engines with drafts, and drafts that say what a test wants them to."""

from __future__ import annotations

from flexbatch import LLM, SamplingParams
from tests.tiny_models import NEW_TOKENS

GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
PLACEMENTS = {
    "gpu": (100, 0, 100, 0, 100, 0),
    "cpu": (0, 100, 0, 100, 0, 100),
    "disk": (0, 0, 0, 0, 100, 0),
    "mixed": (30, 40, 40, 30, 30, 40),
}


class Scripted:
    """A draft that proposes whatever ``make(sequence, max_depth)`` says."""

    name = "scripted"

    def __init__(self, make) -> None:
        self.make = make
        self.peak_bytes = 0
        self.distributions: dict = {}
        self.levels: list = []

    def uncomputed_tokens(self, sequences) -> int:
        return 0

    def draft(self, sequences, plans):
        return [
            self.make(sequence, plan.num_levels).cut(plan.num_levels)
            for sequence, plan in zip(sequences, plans, strict=True)
        ]

    def release(self, sequence) -> None:
        pass

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def engine(model, tmp_path, placement="gpu", **settings) -> LLM:
    """model: a reference, or the folder of a model."""
    common = {
        "gpu_batch_size": 3,
        "num_gpu_batches": 2,
        "gpu_memory": "1GiB",
        "cpu_memory": "1GiB",
        "device": "cpu",
        "prefill_chunk": 50,
    }
    return LLM(
        str(getattr(model, "folder", model)),
        percent=PLACEMENTS[placement],
        offload_dir=str(tmp_path),
        **{**common, **settings},
    )


def tokens(llm: LLM, prompts, params=GREEDY) -> list[list[int]]:
    completions = llm.generate(prompts, params)
    if llm.speculator is not None:
        llm.speculator.check()
    llm.runner.check()
    return [completion.token_ids for completion in completions]


def continuation(model, sequence) -> list[int]:
    """What the target will generate next."""
    return rest_of(sequence, model.prompts, model.token_ids)


def rest_of(sequence, prompts, answers) -> list[int]:
    """The tokens of the sequence's answer that it does not have yet, where each prompt has the answer beside it."""
    index = prompts.index(sequence.token_ids[: sequence.num_prompt_tokens])
    return answers[index][sequence.num_output_tokens :]


def flags_of(model, settings) -> list[str]:
    """The command's flags for the settings of an engine."""
    words = ["--model", str(model)]
    for name, value in settings.items():
        words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,))]
    return words
