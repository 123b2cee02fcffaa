"""The command ``flexbatch``: one subcommand for each main function of the package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from flexbatch.policy.command_line import command_name
from flexbatch.policy.stdout import run_process
from flexbatch.policy.suggest import did_you_mean
from flexbatch.validation.errors import USAGE

Main = Callable[[], Any]


def _run() -> Main:
    from flexbatch.run import main

    return main


def _plan() -> Main:
    from flexbatch.cli.plan import main

    return main


def _batch() -> Main:
    from flexbatch.apps.batch import main

    return main


def _serve() -> Main:
    from flexbatch.apps.serve.command import main

    return main


def _complete() -> Main:
    from flexbatch.apps.completion import main

    return main


def _inspect() -> Main:
    from flexbatch.apps.inspect_model import main

    return main


def _profile() -> Main:
    from flexbatch.calibrate.profile import main

    return main


def _wrangle() -> Main:
    from flexbatch.apps.wrangle.__main__ import main

    return main


def _helm() -> Main:
    from flexbatch.apps.helm_run import main

    return main


def _lm_eval() -> Main:
    from flexbatch.apps.lm_eval import main

    return main


COMMANDS: dict[str, tuple[Callable[[], Main], str]] = {
    "run": (_run, "the main job: prompts from a file through a model over the tiers"),
    "plan": (_plan, "what a job would take on a machine one has or has not; no weights needed"),
    "batch": (_batch, "a resumable job from Parquet, JSON lines or CSV to Parquet"),
    "serve": (_serve, "a server for clients of the OpenAI API: files, batches, chats"),
    "complete": (_complete, "a few prompts, or a chat, with the text as it comes"),
    "inspect": (_inspect, "what a model is, how it would be stored and what would fit where"),
    "profile": (_profile, "measure a machine, for plans of jobs that run on it"),
    "wrangle": (_wrangle, "entity matching, imputation and error detection on tables"),
    "helm": (_helm, "HELM scenarios, each in one block (in HELM's environment)"),
    "lm-eval": (_lm_eval, "lm-evaluation-harness with FlexBatch as a model"),
}
"""By name: what imports its main function, and a line of help."""


def usage() -> str:
    name = command_name("flexbatch")
    lines = [f"  {command:<12}{text}" for command, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {name} COMMAND [ARGUMENTS]",
            "",
            "Large batches of prompts through language models that do not fit the GPU.",
            "",
            "commands:",
            *lines,
            "",
            f"{name} COMMAND --help tells the arguments of one; {name} run alone is a first try.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the subcommand; returns its exit code, 2 for an unknown one. Without `arguments` it is the main function of
    the process.

    Only the subcommand's module is imported, because importing torch takes seconds that ``--help`` must not.
    """
    if arguments is None:
        return run_process(lambda: main(sys.argv[1:]))
    words = arguments
    if len(words) > 1 and words[0] == "help" and words[1] in COMMANDS:
        words = [words[1], "--help"]
    if words and words[0] in ("-h", "--help", "--help-all", "help"):
        print(usage())
        return 0
    if words and words[0] == "--version":
        from flexbatch import __version__

        print(f"flexbatch {__version__}")
        return 0
    if not words or words[0] not in COMMANDS:
        name = command_name("flexbatch")
        if words:
            hint = did_you_mean(words[0], [*COMMANDS, "--help", "--version"]) or f"; {name} --help lists them"
            print(f"{name}: unknown command {words[0]}{hint}", file=sys.stderr)
        else:
            print(f"{name}: a command is needed\n\n{usage()}", file=sys.stderr)
        return USAGE
    # The harness behind lm-eval reads sys.argv itself, so the words are handed over there and not as an argument.
    sys.argv = [f"flexbatch {words[0]}", *words[1:]]
    load, _ = COMMANDS[words[0]]
    return load()() or 0


if __name__ == "__main__":
    sys.exit(main())
