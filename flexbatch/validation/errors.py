"""Errors that say what is wrong and what to do, and the exit codes of every command."""

from __future__ import annotations

import re

DONE, CRASH, USAGE, ROW_ERRORS, DOES_NOT_FIT, INTERRUPTED, HUNG_UP = 0, 1, 2, 3, 4, 130, 129
"""Exit codes: done, crashed, usage or configuration, done with errors in rows, does not fit the budgets, interrupted
and resumable, interrupted as its terminal has gone."""


TEMPORARY = re.compile(r"(^|[/'\"])\.([^/'\"]+)\.[0-9a-z_]{4,}\.tmp\b")
"""A file that is being written, by the name that it has until it is whole (`files.atomic.temporary_name`)."""


def told(error: object) -> str:
    """The text of an error, or a path, with files that are being written by the names that they will have: those that
    the user gave. An error of the system is told as the shell tells it, ``FILE: No such file or directory``."""
    text = reason(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {text}"
    return TEMPORARY.sub(r"\1\2", text)


def reason(error: object) -> str:
    """The text of an error for a message that names the file itself: of one of the system only why, not its number
    and the file once more."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


class CheckpointError(ValueError):
    """A model folder is missing, incomplete, damaged or of an unknown kind. The message names the file, the tensor,
    what was wanted and what was found."""


class ConfigurationError(ValueError):
    """The user's settings are wrong: exit code 2."""


class DoesNotFitError(RuntimeError):
    """The plan needs more memory than the budgets give: exit code 4. The message holds a table of what needs how
    much."""


class EngineBusyError(RuntimeError):
    """An LLM was called while it was running something that cannot be joined or waited for."""


class EngineClosedError(RuntimeError):
    """An LLM was used after it was closed."""


class LostRankError(RuntimeError):
    """Another process of the same engine has ended or failed. The engine cannot go on."""
