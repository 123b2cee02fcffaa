"""Whether whole answers fit their schemas: every schema of `tests.public_schemas`, greedily and by chance.

    python -m benchmark.structured_answers --model smollm2 --output benchmark/results/structured-smollm2.json

Schemas run a few at a time, and the output file is written after each few: a run that was stopped goes on with the
schemas that the file lacks, where model, lengths and drafts are the same. Exits with 1 where an answer that is whole
does not validate, or where one is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmark.machine import machine
from flexbatch import LLM, SamplingParams, StructuredOutputsParams
from flexbatch.files.atomic import replacing
from flexbatch.policy.stdout import data_apart, run_process

WAYS = {"greedy": 0.0, "sampled": 1.0}


@dataclasses.dataclass(frozen=True)
class SchemaAnswer:
    """One answer. problem: why a whole one does not validate; empty where it does, and where it was cut."""

    schema: str
    way: str
    finish_reason: str
    tokens: int
    text: str
    problem: str


def answers(llm: LLM, names: list[str], new_tokens: int, chat: bool) -> Iterator[SchemaAnswer]:
    """Of some schemas in one job, each greedily and by chance."""
    import jsonschema

    from tests.public_schemas import PUBLIC

    rows = list(itertools.product(names, WAYS.items()))
    texts = [f"Make up an example of JSON: {name}" for name, _ in rows]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    params = [
        SamplingParams(
            temperature=temperature, seed=3, max_tokens=new_tokens,
            structured_outputs=StructuredOutputsParams(json=PUBLIC[name], disable_any_whitespace=True),
        )
        for name, (_, temperature) in rows
    ]  # fmt: skip
    for (name, (way, _)), found in zip(rows, llm.generate(prompts, params), strict=True):
        problem = found.error or ""
        if found.finish_reason == "stop":
            try:
                jsonschema.validate(json.loads(found.text), PUBLIC[name])
            except (ValueError, jsonschema.ValidationError) as error:
                problem = f"{type(error).__name__}: {error}"[:300]
        yield SchemaAnswer(name, way, str(found.finish_reason), len(found.token_ids), found.text, problem)


def summary(settings: dict[str, Any], found: list[SchemaAnswer], seconds: float) -> dict[str, Any]:
    whole = [each for each in found if each.finish_reason == "stop"]
    return {
        "machine": machine(),
        "settings": settings,
        "schemas": len({each.schema for each in found}),
        "answers": len(found),
        "whole": dict(Counter(each.way for each in whole)),
        "cut": dict(Counter(each.way for each in found if each.finish_reason == "length")),
        "whole_and_valid": sum(not each.problem for each in whole),
        "problems": [dataclasses.asdict(each) for each in found if each.problem],
        "seconds": round(seconds, 1),
        "rows": [dataclasses.asdict(each) for each in found],
    }


def done_before(output: Path, settings: dict[str, Any]) -> tuple[list[SchemaAnswer], float]:
    """The answers of a run with the same settings that was stopped, and the seconds that it took."""
    if not output.exists():
        return [], 0.0
    document = json.loads(output.read_text(encoding="utf-8"))
    if document["settings"] != settings:
        raise SystemExit(f"{output} holds answers of {document['settings']}; give another --output")
    return [SchemaAnswer(**row) for row in document["rows"]], document["seconds"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tests.public_schemas import PUBLIC

    settings = {"model": args.model, "new_tokens": args.new_tokens, "draft": args.draft, "chat": not args.plain_prompts}
    found, before = done_before(args.output, settings)
    known, begun = {each.schema for each in found}, time.perf_counter()
    missing = [name for name in list(PUBLIC)[: args.schemas] if name not in known]
    with LLM(
        args.model, draft=tuple(args.draft), device=args.device, gpu_batch_size=2 * args.at_once, num_gpu_batches=1
    ) as llm:
        for first in range(0, len(missing), args.at_once):
            found += answers(llm, missing[first : first + args.at_once], args.new_tokens, settings["chat"])
            result = summary(settings, found, before + time.perf_counter() - begun)
            with replacing(args.output) as file:
                file.write((json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
            print(f"{len(found)} answers, {len(result['problems'])} problems", file=sys.stderr)
    return summary(settings, found, before + time.perf_counter() - begun)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--draft", nargs="+", default=[])
    parser.add_argument("--schemas", type=int, help="only the first so many")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--at-once", type=int, default=10, help="schemas in one job")
    parser.add_argument("--plain-prompts", action="store_true", help="no chats, for a model without a chat template")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; a run that was stopped goes on from it")
    args = parser.parse_args(argv)
    with data_apart() as data:
        result = run(args)
        print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1), file=data)
    return 1 if result["problems"] or result["whole_and_valid"] != sum(result["whole"].values()) else 0


if __name__ == "__main__":
    sys.exit(run_process(main))
