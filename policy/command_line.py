"""The parser of every command: help that fits a screen, all of it on request, and errors of one line."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from flexbatch.policy.suggest import did_you_mean

USAGE_ERROR = 2
WIDEST = 100
"""Columns of help: longer lines are hard to read."""
FLAG_COLUMNS = 30
"""Of the first help, for a flag and its value."""
OPTIONS_WITH_VALUE = ("-X", "-W")
"""Of the Python interpreter."""


def typed_words(words: Sequence[str]) -> list[str]:
    """The words of a process (`sys.orig_argv`) as somebody types them: an installed command by its name, not as the
    interpreter and a path."""
    index = _index_of_program(words)
    if index < len(words) and words[index] != "-m" and os.path.basename(words[index]) == "flexbatch":
        return ["flexbatch", *words[index + 1 :]]
    return list(words)


def command_name(command: str, words: Sequence[str] | None = None) -> str:
    """The beginning of the command that was typed, such as ``python -m flexbatch run``; ``command``, say ``flexbatch
    run``, where another program called it."""
    words = sys.orig_argv if words is None else words
    index = _index_of_program(words)
    if words[index : index + 1] != ["-m"] or len(words) < index + 2:
        return command
    python, module = os.path.basename(words[0]), words[index + 1]
    if module == "flexbatch":
        return f"{python} -m {command}"
    return f"{python} -m {module}" if module.startswith("flexbatch.") else command


def _index_of_program(words: Sequence[str]) -> int:
    """Where the words of an interpreter name what it runs: ``-m``, or a file."""
    index = 1
    while index < len(words) and words[index].startswith("-") and words[index] not in ("-m", "-c"):
        index += 2 if words[index] in OPTIONS_WITH_VALUE else 1
    return index


class Parser(argparse.ArgumentParser):
    """``--help`` shows the flags of ``first`` with a short text each, ``--help-all`` all flags by group.

    ``command`` is the command's name when it is installed. ``groups`` are the titles under which flags are shown, in
    this order.
    """

    def __init__(
        self,
        command: str,
        *,
        description: str,
        first: Mapping[str, str],
        groups: Sequence[str] = (),
        examples: str = "",
    ) -> None:
        super().__init__(
            command_name(command),
            description=description,
            add_help=False,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=28, width=width()
            ),
        )
        self.groups = {title: self.add_argument_group(title) for title in groups}
        self._first, self._typed = first, list[str]()
        self._examples = textwrap.dedent(examples).strip().replace(command, self.prog)
        show = self.add_argument_group("help").add_argument
        show("-h", "--help", action=_Show, text=self.format_first, help="show the flags that most people need")
        show("--help-all", action=_Show, text=self.format_help, help="show all flags")

    def format_usage(self) -> str:
        return f"usage: {self._usage()}\n"

    def _usage(self) -> str:
        words = [self.prog]
        for action in self._actions:
            if not action.option_strings:
                name = str(action.metavar or action.dest)
                words.append(
                    {"*": f"[{name} ...]", "+": f"{name} [...]", "?": f"[{name}]"}.get(str(action.nargs), name)
                )
            elif action.required:
                words.append(_flag_with_value(action))
        return " ".join([*words, "[flags]"])

    def format_help(self) -> str:
        """All flags, by group."""
        self.description = textwrap.fill(self.description or "", width())
        self.usage = self._usage().replace("%", "%%")
        self.epilog = f"examples:\n{textwrap.indent(self._examples, '  ')}" if self._examples else None
        return super().format_help()

    def format_first(self) -> str:
        """What fits a screen: usage, what the command does, its arguments, the first flags, examples."""
        actions = {action.option_strings[-1]: action for action in self._actions if action.option_strings}
        named = {name: action for action in actions.values() for name in action.option_strings}
        lines = [f"usage: {self._usage()}", "", *textwrap.wrap(self.description or "", width()), ""]
        positional = [action for action in self._actions if not action.option_strings]
        lines += [_row(str(action.metavar or action.dest), str(action.help)) for action in positional]
        shown = [(named[flag], text) for flag, text in self._first.items() if flag in named]
        lines += [_row(_flag_with_value(action), text) for action, text in shown]
        if self._examples:
            lines += ["", "examples:", *(f"  {line}" for line in self._examples.splitlines())]
        hidden = sum(action.help is not argparse.SUPPRESS for action in actions.values()) - len(shown) - 2
        if hidden > 0:
            lines += ["", f"{self.prog} --help-all shows {hidden} more flags."]
        return "\n".join([*lines, ""])

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of argparse, but an unknown flag comes before whatever else is wrong: the words after it are read as what
        they are not. A list of ``words`` may go on between and behind the flags; argparse takes one run of them."""
        words = sys.argv[1:] if args is None else list(args)
        known = set(self._option_string_actions)
        for word in words[: words.index("--")] if "--" in words else words:
            flag = word.partition("=")[0]
            if word.startswith("--") and flag not in known:
                self.error(f"unknown flag {flag}{self._suggestion(flag)}")
        self._typed = words
        found, left = self.parse_known_args(words, namespace)
        if hasattr(found, "words"):
            found.words = [*found.words, *(word for word in left if not word.startswith("-"))]
            left = [word for word in left if word.startswith("-")]
        for word in left:
            if word.startswith("-") and not word.lstrip("-")[:1].isdigit():
                self.error(f"unknown flag {word}{self._suggestion(word.partition('=')[0])}")
        if left:
            prompts = "--prompts" in known and not any(word.startswith("-") for word in left)
            self.error(f"unrecognized arguments: {' '.join(left)}{f'; did you mean --prompts {left[0]}?' * prompts}")
        return found

    def meant(self, flag: str) -> str | None:
        """The flag here by what other programs call it; None where it is not known."""
        return None

    def _suggestion(self, flag: str) -> str:
        other = self.meant(flag)
        if other is not None and other in self._option_string_actions:
            return f"; did you mean {other}?"
        shown = [name for name, action in self._option_string_actions.items() if action.help is not argparse.SUPPRESS]
        return did_you_mean(flag, shown) or f"; {self.prog} --help-all lists the flags"

    def _dash_remedy(self, message: str) -> str:
        """What to write where the word behind a flag begins with a dash, and is read as a flag for that."""
        flags, expected, _ = message.partition(": expected ")
        for flag, word in itertools.pairwise(self._typed if expected else ()):
            known = word.partition("=")[0] in self._option_string_actions
            if flag in flags.split("/") and word.startswith("-") and not known:
                return f", and {word} is read as a flag: where it is the value, write {flag}={word}"
        return ""

    def error(self, message: str) -> NoReturn:
        """One line, and exit code 2."""
        message = message.removeprefix("argument ")
        choice = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
        if choice is not None:
            message += did_you_mean(choice[1], [name.strip("' ") for name in choice[2].split(",")])
        message = message.replace("the following arguments are required: ", "missing ")
        message += self._dash_remedy(message)
        hint = "" if "did you mean" in message or "--help" in message else f"; see {self.prog} --help"
        self.exit(USAGE_ERROR, f"{self.prog}: {message}{hint}\n")


class _Show(argparse.Action):
    """Prints a text and ends the process, as ``--help`` does."""

    def __init__(self, option_strings: Sequence[str], dest: str, text: Any, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self._text = text

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser._print_message(self._text(), sys.stdout)
        parser.exit()


def width() -> int:
    """Columns of help."""
    return min(WIDEST, shutil.get_terminal_size().columns - 2)


def _row(name: str, text: str) -> str:
    """A flag and its text; the text of a long flag stands closer."""
    start = f"  {name}".ljust(FLAG_COLUMNS) if len(name) < FLAG_COLUMNS - 3 else f"  {name}  "
    lines = textwrap.wrap(text, max(width() - len(start), 20)) or [""]
    return "\n".join([start + lines[0], *(" " * FLAG_COLUMNS + line for line in lines[1:])]).rstrip()


def _flag_with_value(action: argparse.Action) -> str:
    flag = next(name for name in action.option_strings if name.startswith("--"))
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return flag
    if action.choices is not None and action.metavar is None:
        return f"{flag} {{{','.join(map(str, action.choices))}}}"
    value = action.metavar or action.dest.upper()
    return f"{flag} {' '.join(value) if isinstance(value, tuple) else value}"
