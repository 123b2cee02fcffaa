"""Complete prompts, or chat, with the text on the screen as passes finish.

    flexbatch complete "The capital of France is" --model M --max-tokens 20
    printf 'one prompt\\nanother\\n' | flexbatch complete --json
    flexbatch complete --chat --system "Answer in one word." --model M

Prompts come from the arguments, from --prompts FILE, or from standard input (one a line). Text goes to stdout,
everything else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from flexbatch.cli import prompt_files, result_file, result_rows
from flexbatch.cli.answers import OrderedOutput, answer_texts, prompt_lines, token_lines
from flexbatch.cli.command import run_command, set_up_logging
from flexbatch.cli.early_checks import (
    check_files,
    check_files_to_write,
    check_machine,
    check_models,
    check_rows_file,
    check_sampling,
)
from flexbatch.cli.help import CommandParser
from flexbatch.cli.loras import for_all_rows
from flexbatch.cli.prompt_files import PromptRow
from flexbatch.cli.run_settings import InputConfig, SamplingConfig
from flexbatch.cli.settings import (
    add_arguments,
    add_engine_arguments,
    read_settings,
    refuse_measurements,
)
from flexbatch.config import EngineConfig, option
from flexbatch.policy.stdout import run_process
from flexbatch.request import Completion, SamplingParams
from flexbatch.text.files import MARK, json_text
from flexbatch.validation.errors import DONE, ROW_ERRORS, ConfigurationError

if TYPE_CHECKING:
    from flexbatch import LLM


@dataclass(frozen=True)
class CompletionConfig(InputConfig):
    """The settings of what to complete, and of how it is shown."""

    chat: bool = option(
        False, "talk: every argument or line is what the user says next; the model's chat template makes the prompt"
    )
    system: str | None = option(None, "the system message of a chat", metavar="TEXT")
    json: bool = option(False, "print one JSON object for every prompt, when it is done")
    flexflow_output: str | None = option(
        None, "write latency, token ids and text of every prompt as FlexFlow does", metavar="FILE"
    )


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "flexbatch complete",
        description="Complete a few prompts, or chat, with the text on the screen as it comes. Prompts are arguments, "
        "lines of --prompts FILE, or lines of standard input.",
        first="prompts chat json model max_tokens temperature gpu_memory cpu_memory draft config",
        examples="""
            flexbatch complete "The capital of France is" --model gpt2
            printf 'one prompt\\nanother\\n' | flexbatch complete --json
            """,
    )
    parser.add_argument("words", nargs="*", metavar="PROMPT", help="what to complete, or with --chat to say")
    add_arguments(parser, CompletionConfig, "completion")
    add_arguments(parser, SamplingConfig, "sampling")
    add_engine_arguments(parser)
    return parser


def flexflow_record(completion: Completion, seconds: float, prompt: str, text: str) -> str:
    """Returns one prompt in the format of FlexFlow's ``-output-file``: latency in microseconds, the ids of prompt
    and output, and their text."""
    ids = ",".join(map(str, [*completion.prompt_token_ids, *completion.token_ids]))
    return f"end-to-end latency: {seconds * 1e6:.3f}\ntoken IDs: {ids}\n{prompt}{text}\n"


def complete(
    llm: LLM, prompts: Sequence[Any], params: SamplingParams, config: CompletionConfig, stdout: IO[str]
) -> int:
    """Completes all prompts in one block; returns the exit code."""
    shown = [prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in prompts]
    output = None if config.json else OrderedOutput(stdout, shown, titles=len(prompts) > 1)
    began = time.perf_counter()
    records: dict[int, str] = {}
    lines: dict[int, str] = {}
    failed = 0
    # With several samples of one prompt their texts would run into each other; and of several engines only whole
    # completions come.
    report: Any = output.add if output and params.n == 1 and llm.config.data_parallel_size == 1 else None
    for key, completion in llm.stream(items_of(llm, prompts, params, config.truncate), report):
        number: int = key  # type: ignore[assignment]
        text = answer_texts(completion)
        if completion.error:
            failed += 1
            print(f"prompt {number}: {completion.bare_error}", file=sys.stderr)
        else:
            texts = "\n".join(sample.text for sample in completion.samples or [completion])
            records[number] = flexflow_record(completion, time.perf_counter() - began, shown[number], texts)
        line = (
            {"prompt": prompts[number], "error": completion.bare_error}
            if completion.error
            else result_rows.output_line(PromptRow(prompts[number]), completion)
        )
        lines[number] = json_text({"index": number, **line}) + "\n"
        if output:
            output.finish(number, text, prompt_lines(completion) + (token_lines(completion) if params.n == 1 else ""))
        else:
            print(lines[number], end="", file=stdout, flush=True)
    if output:
        output.check()
    for path, found in ((config.output, lines), (config.flexflow_output, records)):
        if path is not None:
            with result_file.whole_file(path) as file:
                file.writelines(found[number] for number in sorted(found))
    return ROW_ERRORS if failed else DONE


def items_of(
    llm: LLM, prompts: Sequence[Any], params: SamplingParams, truncate: str | None
) -> Iterator[tuple[int, Any, SamplingParams]]:
    """Yields the items of a stream. Prompts that may be cut come as tokens."""
    from flexbatch.text.prompts import PromptEncoder, PromptError

    encoder = PromptEncoder(
        llm.tokenizer, max_context=llm.arch.context, vocab_size=llm.arch.vocab_size, truncate=truncate
    )
    for number, prompt in enumerate(prompts):
        ready: Any = prompt
        if truncate:
            # What cannot be read is told by the engine, as one prompt's error.
            with contextlib.suppress(PromptError):
                ready = encoder.encode(number, prompt, params.max_tokens)
        yield number, ready, params


def chat(llm: LLM, turns: Iterable[str], params: SamplingParams, config: CompletionConfig, stdout: IO[str]) -> int:
    """Holds one conversation: every turn of the user is answered with all that was said before in view. A turn that
    cannot be run is taken back."""
    messages: list[dict[str, str]] = [{"role": "system", "content": config.system}] if config.system else []
    failed = 0
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        output = None if config.json else OrderedOutput(stdout, [""], titles=False)
        report: Any = output.add if output else None
        ((_, completion),) = llm.stream([(0, list(messages), params)], report)
        if completion.error:
            failed += 1
            messages.pop()
            print(f"{completion.bare_error}; this turn is taken back", file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": completion.text})
        if output:
            output.finish(0, completion.text, token_lines(completion))
        else:
            line = result_rows.output_line(PromptRow(list(messages[:-1])), completion)
            print(json_text(line), file=stdout, flush=True)
    return ROW_ERRORS if failed else DONE


def lines_of(stream: IO[str], question: str = "") -> Iterable[str]:
    """Yields lines as they are typed, without empty ones; ``question`` is asked on stderr before each. A file that
    is piped in may begin with a byte order mark."""
    first = True
    while True:
        if question:
            print(question, end="", file=sys.stderr, flush=True)
        line = stream.readline()
        if not line:
            return
        if first:
            line, first = line.removeprefix(MARK), False
        if line.strip():
            yield line.rstrip("\n")


def command(args: argparse.Namespace, environ: Mapping[str, str], stdin: IO[str], stdout: IO[str]) -> int:
    config, sampling, engine = read_settings(
        [CompletionConfig, SamplingConfig, EngineConfig], args, environ, getattr(args, "config", None)
    )
    refuse_measurements(engine)
    engine = for_all_rows(engine)
    config.check_limit()
    if args.words and config.prompts is not None:
        raise ConfigurationError("prompts come from the arguments or from --prompts FILE; leave one out")
    for_prompts = {
        "--prompts": config.prompts,
        "--output": config.output,
        "--flexflow-output": config.flexflow_output,
        "--limit": config.limit,
        "--truncate": config.truncate,
        "--n": sampling.n if (sampling.n or 1) > 1 else None,
    }
    given_too = [flag for flag, value in for_prompts.items() if value is not None]
    if config.chat and given_too:
        raise ConfigurationError(
            f"--chat takes what the user says from the arguments or standard input; leave out {' and '.join(given_too)}"
        )
    if config.system is not None and not config.chat:
        raise ConfigurationError("--system is for --chat")
    check_sampling(sampling)
    check_files({"--prompts": config.prompts})
    if config.output in result_file.STDOUT:
        raise ConfigurationError(f"--output {config.output}: the text goes there; --json prints the lines of --output")
    check_rows_file(config.output)
    check_files_to_write({"--output": config.output, "--flexflow-output": config.flexflow_output})
    check_machine(engine)
    given = [row.prompt for row in prompt_files.read_prompts(config.prompts)] if config.prompts else args.words
    if not given and not config.chat:
        given = list(lines_of(stdin))
    if not given and not config.chat:
        raise ConfigurationError(
            "no prompts: give some as arguments, with --prompts FILE, or on standard input, one a line"
        )
    given = given[: config.limit]
    check_models(engine)
    from flexbatch.models.generation_config import generation_of

    params = sampling.params(generation_of(engine))
    from flexbatch.engine import LLM

    with LLM.from_config(engine) as llm:
        if not config.chat:
            return complete(llm, given, params, config, stdout)
        if getattr(llm.tokenizer, "chat_template", None) is None:
            raise ConfigurationError(f"{engine.model} has no chat template, so it cannot chat; leave out --chat")
        return chat(llm, given or lines_of(stdin, "> " if stdin.isatty() else ""), params, config, stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    set_up_logging("WARNING", arguments)
    return run_command(lambda data: command(args, os.environ, sys.stdin, data))


if __name__ == "__main__":
    sys.exit(run_process(main))
